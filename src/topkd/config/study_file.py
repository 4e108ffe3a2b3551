"""Study files: their schema, and changes of them on the command line."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from topkd.config.changes import change_by, change_inside, read_change
from topkd.config.recipe import Recipe
from topkd.config.sections import DataSection
from topkd.config.seeds import distinct, read_seeds
from topkd.config.validation import (
    RecipeError,
    Section,
    is_section_of,
    near,
    read_yaml,
    validated,
)

Terms = tuple[dict[str, Any], ...]


class Variant(Section):
    """Losses of one variant, derived from the baseline, another variant or a recipe."""

    add: Terms | None = None
    """Terms to add to those of the baseline, or of the variant ``of``."""
    of: str | None = None
    """Variant to start from. Defaults to the baseline."""
    set: dict[str, Any] = {}
    """Changes: ``TERM.key: value`` for a term, any other key for the recipe."""
    recipe: str | None = None
    """Recipe whose losses are used, in place of ``of`` and ``add``."""

    @model_validator(mode="after")
    def _starts_from_one(self) -> Variant:
        if self.recipe is not None and (self.add is not None or self.of is not None):
            raise ValueError("recipe replaces add and of; set only one of them")
        return self


class Primary(Section):
    """Primary endpoint of the comparison of variants."""

    metric: str = "top1"
    margin: Annotated[float, Field(gt=0)] | None = None
    """Smallest difference that matters, in the unit of the metric."""


class StudyFile(Section):
    """A grid of runs: settings x variants x seeds."""

    name: str = ""
    recipe: str
    set: dict[str, Any] = {}
    """Changes to the recipe in every run."""
    baseline: str
    """Variant that all others are compared with."""
    variants: Annotated[dict[str, Terms | Variant], Field(min_length=1)]
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """``TERM.key: [values]``: expands each variant that has the term to one variant per value. The
    unchanged baseline is kept."""
    settings: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = {"main": {}}
    """Name -> changes to the recipe; variants are compared within a setting."""
    seeds: str | Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=0)], ...]
    primary: Primary = Primary()

    @field_validator("grid")
    @classmethod
    def _names_differ(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in grid.items():
            names = [str(value) for value in values]  # variants are named after them
            for number, value in enumerate(values):
                if value in values[:number] or names[number] in names[:number]:
                    raise ValueError(f"{key}: the value {value!r} appears twice")
        return grid

    @field_validator("seeds")
    @classmethod
    def _reads_ranges(cls, value: str | int | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(value, str):
            return read_seeds(value)
        return distinct((value,) if isinstance(value, int) else value)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds as numbers."""
        assert isinstance(self.seeds, tuple)
        return self.seeds

    @model_validator(mode="after")
    def _has_its_baseline(self) -> StudyFile:
        if self.baseline not in self.variants:
            raise ValueError(
                f"baseline: there is no variant {self.baseline!r}"
                f"{near(self.baseline, list(self.variants))}"
            )
        return self


def read(path: Path, changes: Sequence[str] = ()) -> StudyFile:
    """Reads a study file and applies changes.

    Args:
        path: The file.
        changes: Changes ``key=value``, such as ``seeds=0-2`` or ``set.optimizer.lr=0.1``.

    Raises:
        RecipeError: If the file or a change is invalid; the message locates the error.
    """
    if not path.is_file():
        raise RecipeError(f"there is no study {path}; `topkd study new RECIPE` writes one")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8: {error}") from error
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a study is a mapping of keys to values")
    tree.setdefault("name", path.stem)
    for change in changes:
        _change_file(tree, change)
    file: StudyFile = validated(StudyFile, tree, str(path))
    return file


def _change_file(tree: dict[str, Any], change: str) -> None:
    """Applies a change to the values of a study file, in place.

    What follows ``set.``, ``grid.``, ``settings.NAME.`` and ``variants.NAME.set.`` is a key of the
    recipe or of a term, and remains one dotted key.
    """
    first, separator, rest = _split(change)
    if "=" in change and first and first not in StudyFile.model_fields:
        known = list(StudyFile.model_fields)
        if first in Recipe.model_fields or (separator == "." and not near(first, known, "")):
            raise RecipeError(
                f"{change}: a study has no key {first!r}; to change the recipe in every run, write "
                f"set.{change}"
            )
        raise RecipeError(f"{change}: a study has no key {first!r}{near(first, known)}")
    if first not in ("set", "grid", "settings", "variants") or separator not in (".", "["):
        change_by(tree, change)
        return
    if separator == "[":
        raise RecipeError(f"{change}: write a dot after {first}, as in {first}.KEY=value")
    here = _mapping(tree, first, change)
    if first in ("set", "grid"):
        _change_dotted(here, rest, change)
        return
    if first == "settings" and not here:
        here |= {"main": {}}
    name, separator, rest = _split(rest, here)
    if separator == "=":
        here[name] = read_change(f"={rest}", change)[1]
    elif name not in here:
        raise RecipeError(f"{change}: {first} has no {name!r}{near(name, list(here))}")
    elif first == "settings":
        _change_dotted(_mapping(here, name, change), rest, change)
    elif rest.startswith("set.") and isinstance(here[name], dict):
        _change_dotted(_mapping(here[name], "set", change), rest.removeprefix("set."), change)
    elif isinstance(here[name], dict | list):
        change_inside(here[name], rest, change)
    else:
        raise RecipeError(f"{change}: {name} has no keys, it is {here[name]!r}")


def _split(text: str, names: Collection[str] = ()) -> tuple[str, str, str]:
    """Splits the first step from a change: the longest of the names, or up to a separator.

    Examples:
        >>> _split("lr-0.1.epochs=3", ["lr-0", "lr-0.1"])
        ('lr-0.1', '.', 'epochs=3')
        >>> _split("seeds=0-4")
        ('seeds', '=', '0-4')
    """
    for name in sorted(names, key=len, reverse=True):
        if text.startswith(name) and text[len(name) :][:1] in (".", "=", "["):
            break
    else:
        name = re.split(r"[.=\[]", text, maxsplit=1)[0]
    return name, text[len(name) :][:1], text[len(name) + 1 :]


def _mapping(tree: dict[str, Any], key: str, change: str) -> dict[str, Any]:
    """Returns the mapping at a key, which may be missing."""
    if tree.get(key) is None:
        tree[key] = {}
    here = tree[key]
    if not isinstance(here, dict):
        raise RecipeError(f"{change}: {key} has no keys, it is {here!r}")
    return here


def _change_dotted(changes: dict[str, Any], part: str, change: str) -> None:
    """Adds a change of a recipe or a term to others, after which it is applied."""
    key, value = read_change(part, change)
    if not key:
        raise RecipeError(f"a change is written key=value, got {change!r}")
    changes[key] = merged(key, changes.pop(key, None), value)


def merged(key: str, old: Any, new: Any) -> Any:
    """Returns the value of a key of a recipe after a change.

    A mapping changes only those keys of a section that it lists. The options of a data set do not
    apply to another one.
    """
    are_mappings = isinstance(old, Mapping) and isinstance(new, Mapping)
    if not are_mappings or not is_section_of(Recipe, key):
        return new
    if key == "data" and new.get("name", old.get("name")) != old.get("name"):
        old = {option: old[option] for option in old if option in DataSection.model_fields}
    return {**old, **{k: merged(f"{key}.{k}", old.get(k), value) for k, value in new.items()}}
