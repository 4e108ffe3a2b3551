"""Study files: variants of a recipe in several settings, with many seeds."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from topkd.config import recipe as recipes
from topkd.config.recipe import DataSection, Recipe
from topkd.config.seeds import distinct, read_seeds
from topkd.config.validation import (
    RecipeError,
    Section,
    change_by,
    change_inside,
    is_section_of,
    near,
    read_change,
    read_yaml,
    validated,
)

Terms = tuple[dict[str, Any], ...]
Changes = list[tuple[str, Any]]  # changes of a recipe, in the order in which they apply
MOST_JOBS = 100_000
LONGEST_NAME = 200  # bytes of a setting and a variant in a file name, which has at most 255
_EXCLUSIVE = {"share": "weight", "weight": "share"}
_OF_STUDY = ("name", "losses", "controls")  # keys of a recipe that the study sets itself


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


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    setting: str
    variant: str
    seed: int
    recipe: Recipe

    @property
    def title(self) -> str:
        """Name for messages."""
        return f"{self.setting}/{self.variant} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All runs of a study, with the recipe of each variant in each setting."""

    file: StudyFile
    recipes: Mapping[tuple[str, str], Recipe]
    """(setting, variant) -> recipe."""
    compared: int
    """Number of variants of the whole study, without the baseline."""

    @property
    def settings(self) -> list[str]:
        """Names of the settings."""
        return list(dict.fromkeys(setting for setting, _ in self.recipes))

    @property
    def variants(self) -> list[str]:
        """Names of all variants, the baseline first."""
        return list(dict.fromkeys(variant for _, variant in self.recipes))

    def only(self, variants: Sequence[str]) -> Plan:
        """Returns the part of the plan with the named variants and the baseline.

        Raises:
            RecipeError: If there is no such variant; the message suggests one.
        """
        for name in variants:
            if name not in self.variants:
                raise RecipeError(f"there is no variant {name!r}{near(name, self.variants)}")
        kept = {self.file.baseline, *variants}
        recipes = {place: recipe for place, recipe in self.recipes.items() if place[1] in kept}
        return replace(self, recipes=recipes)

    def jobs(self) -> list[Job]:
        """Lists the runs of each setting seed by seed, so that all variants progress equally."""
        return [
            Job(setting, variant, seed, self.recipes[setting, variant])
            for setting in self.settings
            for seed in self.file.all_seeds
            for variant in self.variants
        ]


def load(path: str | Path, changes: tuple[str, ...] = ()) -> Plan:
    """Loads a study file and expands it to a plan.

    Args:
        path: The study file.
        changes: Changes ``key=value``, such as ``seeds=0-2`` or ``set.optimizer.lr=0.1``.

    Raises:
        RecipeError: If the file, a variant or a recipe is invalid; the message locates the error.
    """
    path = Path(path)
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
    return expand(validated(StudyFile, tree, str(path)), path.parent)


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
    changes[key] = _merged(key, changes.pop(key, None), value)


def _merged(key: str, old: Any, new: Any) -> Any:
    """Returns the value of a key of a recipe after a change.

    A mapping changes only those keys of a section that it lists. The options of a data set do not
    apply to another one.
    """
    are_mappings = isinstance(old, Mapping) and isinstance(new, Mapping)
    if not are_mappings or not is_section_of(Recipe, key):
        return new
    if key == "data" and new.get("name", old.get("name")) != old.get("name"):
        old = {option: old[option] for option in old if option in DataSection.model_fields}
    return {**old, **{k: _merged(f"{key}.{k}", old.get(k), value) for k, value in new.items()}}


def expand(file: StudyFile, beside: Path = Path()) -> Plan:
    """Builds the recipe of every variant in every setting.

    Args:
        file: The study.
        beside: Folder that relative paths of recipes refer to.

    Raises:
        RecipeError: If a variant or a change is invalid; the message locates the error.
    """
    base = _tree(file.recipe, beside)
    _have_own_folders("name", [file.name])
    _have_own_folders("settings", list(file.settings))
    listed = {
        setting: _variants(file, beside, {**file.set, **changes})
        for setting, changes in file.settings.items()
    }
    jobs = sum(_number(variants, file) for variants in listed.values()) * len(file.all_seeds)
    if jobs > MOST_JOBS:  # before their recipes are built, which would take hours
        raise RecipeError(f"{jobs:,} jobs are more than {MOST_JOBS:,}")
    found = {}
    for setting, changes in file.settings.items():
        expanded = list(_in_grid(listed[setting], file))
        names = [file.baseline, *(name for name, _ in expanded if name != file.baseline)]
        _have_own_folders("variants", names, folder_name(setting))
        variants = dict(expanded)
        titles = {title for terms, _ in variants.values() for title in _titles(terms)}
        for name in names:
            terms, overrides = variants[name]
            tree = copy.deepcopy(base) | {"controls": {}, "losses": copy.deepcopy(terms)}
            for given, where in ((file.set, "set"), (changes, f"settings.{setting}")):
                _change_recipe(tree, _of_recipe(given, titles, where), where)
            _change_recipe(tree, overrides, f"variants.{name}.set")
            tree["name"] = "/".join(map(folder_name, (file.name, setting, name)))
            try:
                found[setting, name] = recipes.parse(tree)
            except RecipeError as error:
                raise RecipeError(f"{setting}, variant {name}: {error}") from error
    return Plan(file, found, len({variant for _, variant in found}) - 1)


def _have_own_folders(where: str, names: Sequence[str], setting: str = "") -> None:
    """Refuses names without a folder name, or a long one, and equal ones in any case.

    Args:
        where: Location in the study file.
        names: Names of settings or variants.
        setting: Folder name of the setting of the variants, with which names of logs begin.
    """
    owners: dict[str, str] = {}
    for name in names:
        folder = folder_name(name).casefold()
        if not folder:
            raise RecipeError(f"{where}: {name!r} has no letter or digit to name a folder by")
        if folder in owners:
            raise RecipeError(
                f"{where}: {owners[folder]!r} and {name!r} would share the folder {folder}; "
                "rename one"
            )
        owners[folder] = name
        length = len(f"{setting}-{folder_name(name)}".encode())
        if length > LONGEST_NAME:
            shown = name if len(name) <= 60 else f"{name[:57]}..."
            raise RecipeError(
                f"{where}: {shown!r} makes a file name of {length} bytes, and at most "
                f"{LONGEST_NAME} are possible; choose a shorter name, or shorter values in the grid"
            )


def folder_name(name: str) -> str:
    """Returns the folder name of a variant, whose name may contain brackets.

    Examples:
        >>> folder_name("topkd[share=0.02]")
        'topkd-share-0.02'
    """
    return "".join(c if c.isalnum() or c in "._+-" else "-" for c in name).strip("-")


def _tree(name: str, beside: Path) -> dict[str, Any]:
    place = beside / name
    recipe = recipes.load(str(place) if place.is_file() else name)
    return recipe.model_dump(mode="json")


def _of_recipe(changes: Mapping[str, Any], titles: Collection[str], where: str) -> Changes:
    """Selects the changes of keys of a recipe, i.e. not of options of terms."""
    kept = [each for each in changes.items() if term_option(each[0])[0] not in titles]
    for key, _ in kept:
        first = key.partition(".")[0]
        if first not in recipes.Recipe.model_fields:
            known = [*titles, *recipes.Recipe.model_fields]
            raise RecipeError(f"{where}: there is no key or term {first!r}{near(first, known)}")
    return kept


def _change_recipe(tree: dict[str, Any], changes: Changes, where: str) -> None:
    for key, value in changes:
        here, last = _above(tree, key, where)
        here[last] = _merged(key, here.get(last), value)


def _above(tree: dict[str, Any], key: str, where: str) -> tuple[dict[str, Any], str]:
    """Returns the mapping that contains a dotted key, and the last step of the key."""
    *steps, last = key.split(".")
    first = key.partition(".")[0]
    if first in _OF_STUDY:
        raise RecipeError(
            f"{where}: {key}: {first} cannot be changed here; `variants` sets the losses, "
            "and runs are named after the study"
        )
    for step in steps:
        if tree.get(step) is None:
            tree[step] = {}
        tree = tree[step]
        if not isinstance(tree, dict):
            raise RecipeError(f"{where}: {key}: {step} has no keys, it is {tree!r}")
    return tree, last


Variants = dict[str, tuple[list[dict[str, Any]], Changes]]  # name -> terms, other changes


def _variants(file: StudyFile, beside: Path, common: Mapping[str, Any]) -> Variants:
    """Resolves every variant to its terms, following ``of``.

    Changes of the file and of the setting apply to terms where they are listed, so that a variant
    or the grid can change them again.
    """
    resolved: Variants = {}

    def resolve(name: str, above: tuple[str, ...]) -> tuple[list[dict[str, Any]], Changes]:
        if name not in file.variants:
            known = near(name, list(file.variants))
            raise RecipeError(f"variants.{above[-1]}.of: there is no variant {name!r}{known}")
        if name in above:
            raise RecipeError(f"variants: {' of '.join((*above, name))} is a circular reference")
        if name not in resolved:
            resolved[name] = from_file(name, above)
        return resolved[name]

    def listed(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        terms = copy.deepcopy([dict(term) for term in given])
        for key, value in common.items():
            set_term(terms, key, value)
        return terms

    def from_file(name: str, above: tuple[str, ...]) -> tuple[list[Any], Changes]:
        given = file.variants[name]
        if not isinstance(given, Variant):
            return listed(given), []
        if given.recipe is not None:
            terms, changes = listed(_tree(given.recipe, beside)["losses"]), Changes()
        else:
            if name == file.baseline and given.of is None:
                raise RecipeError(f"variants.{name}: the baseline must list its terms")
            terms, changes = resolve(given.of or file.baseline, (*above, name))
            terms, changes = copy.deepcopy(terms), list(changes)
        terms += listed(given.add or ())
        for key, value in given.set.items():
            if not set_term(terms, key, value):
                changes.append((key, value))
        return terms, changes

    for name in file.variants:
        resolve(name, ())
    return resolved


def term_option(key: str) -> tuple[str, str]:
    """Splits ``TERM.option`` or ``losses.TERM.option`` into title of the term and option."""
    title, _, option = key.removeprefix("losses.").partition(".")
    return title, option


def set_term(terms: list[dict[str, Any]], key: str, value: Any) -> bool:
    """Sets ``TERM.option`` of the terms with this title; returns False if there is none.

    Raises:
        RecipeError: If the key names a term without an option.
    """
    title, option = term_option(key)
    found = [term for term in terms if title in (term.get("label"), term.get("name"))]
    for term in found:
        if not option:
            raise RecipeError(f"{key} is a term; set one of its options, such as {key}.weight")
        if option in _EXCLUSIVE:
            term.pop(_EXCLUSIVE[option], None)
        here, last = _above(term, option, key)
        here[last] = value
    return bool(found)


def _titles(terms: Sequence[Mapping[str, Any]]) -> set[str]:
    """Returns the names and labels of terms."""
    return {title for term in terms for title in (term.get("label"), term.get("name")) if title}


def _grid_keys(terms: Sequence[Mapping[str, Any]], file: StudyFile) -> list[str]:
    """Lists the keys of the grid that apply to a variant with these terms."""
    return [key for key in file.grid if term_option(key)[0] in _titles(terms)]


def _number(variants: Variants, file: StudyFile) -> int:
    """Counts the variants that :func:`_in_grid` returns."""
    total = 0
    for name, (terms, _) in variants.items():
        keys = _grid_keys(terms, file)
        total += math.prod(len(file.grid[key]) for key in keys)
        total += bool(keys) and name == file.baseline
    return total


def _in_grid(variants: Variants, file: StudyFile) -> Iterator[tuple[str, Any]]:
    """Expands each variant with terms of the grid to one variant per combination of values."""
    used = set()
    for name, (terms, changes) in variants.items():
        keys = _grid_keys(terms, file)
        used |= set(keys)
        if keys and name == file.baseline:
            yield name, (terms, changes)
        for values in itertools.product(*(file.grid[key] for key in keys)):
            copied = copy.deepcopy(terms)
            for key, value in zip(keys, values, strict=True):
                set_term(copied, key, value)
            suffix = ",".join(
                f"{term_option(key)[1]}={value}" for key, value in zip(keys, values, strict=True)
            )
            yield (f"{name}[{suffix}]" if suffix else name), (copied, changes)
    for key in file.grid.keys() - used:
        raise RecipeError(f"grid: no variant has a term {term_option(key)[0]!r}, from {key}")
