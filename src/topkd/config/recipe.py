"""Recipes: the YAML schema of an experiment, with strict validation and overrides."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from topkd.config.changes import change_by
from topkd.config.sections import DataSection, Optimizer, StudentSection, TeacherSection
from topkd.config.terms import Term, variant_name
from topkd.config.validation import (
    RecipeError,
    Section,
    near,
    read_yaml,
    validated,
    write_yaml,
)


class Recipe(Section):
    """All settings that affect the result of a run, except its seed."""

    name: str = ""
    data: DataSection
    teacher: TeacherSection | None = None
    student: StudentSection
    losses: Annotated[tuple[Term, ...], Field(min_length=1)]
    controls: Mapping[str, Annotated[tuple[Term, ...], Field(min_length=1)]] = {}
    """Name -> losses of a control run. The first one is the baseline of comparisons."""
    epochs: Annotated[int, Field(gt=0)] = 240
    evaluate_every: Annotated[int, Field(gt=0)] = 1
    """Number of epochs between evaluations; the last epoch is always evaluated."""
    evaluation: tuple[str, ...] = ()
    """Additional metrics of the finished student, such as ``knn``, and ``per_class``."""
    batch_size: Annotated[int, Field(gt=1)] = 64
    optimizer: Optimizer = Optimizer()
    gradient_clip: Annotated[float, Field(gt=0)] | None = None
    """Maximum gradient norm."""
    sync_batchnorm: bool = False
    """With several processes: whether to synchronize the student's batch normalization."""
    threads: Annotated[int, Field(gt=0)] | None = None
    """CPU threads. Defaults to all; small networks are often fastest with one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype of the networks; auto selects bfloat16 if the device supports it."""
    compile: Literal["auto", True, False] = "auto"
    """Whether to compile the networks; auto compiles for long runs on a GPU."""

    @model_validator(mode="after")
    def _name_is_a_folder(self) -> Recipe:
        if self.name and not re.fullmatch(r"\w[\w .+-]*(/\w[\w .+-]*)*", self.name):
            raise ValueError(
                f"name: {self.name!r} cannot name a folder below --out; use letters, digits, "
                "' ', '.', '+', '-' and '_', with '/' between folders"
            )
        return self

    @model_validator(mode="after")
    def _control_names_are_folders(self) -> Recipe:
        for name in self.controls:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
                raise ValueError(
                    f"controls: {name!r} cannot name a run; use letters, digits, '.', '-' and '_'"
                )
            if name == self.main:
                raise ValueError(
                    f"controls: {name!r} is the name of the runs with `losses`, which are named "
                    "after their terms; rename the control, or label a term"
                )
        return self

    @model_validator(mode="after")
    def _terms_leave_no_gap(self) -> Recipe:
        for name, terms in self.variants.items():
            variant = self.place(name)
            titles = [term.title for term in terms]
            doubled = sorted({title for title in titles if titles.count(title) > 1})
            if doubled:
                raise ValueError(
                    f"{variant}: {', '.join(doubled)} appears twice; give a label to each"
                )
            if sum(term.share or 0 for term in terms) >= 1 or all(term.share for term in terms):
                raise ValueError(
                    f"{variant}: the sum of shares must be below 1, and a term needs a weight"
                )
            for number, term in enumerate(terms):
                try:
                    term.check_schedule(self.epochs)
                except ValueError as error:
                    raise ValueError(f"{variant}[{number}]: {error}") from error
            spans = [term.span(self.epochs) for term in terms]
            changes = {1, *(first for first, _ in spans), *(last + 1 for _, last in spans)}
            for epoch in sorted(epoch for epoch in changes if epoch <= self.epochs):
                if not any(t.weight * t.schedule(epoch, self.epochs) for t in terms if not t.share):
                    raise ValueError(f"{variant}: no term with a weight is active in epoch {epoch}")
        return self

    @property
    def variants(self) -> dict[str, tuple[Term, ...]]:
        """Variant -> terms: the controls, then the recipe's losses."""
        return {**self.controls, self.main: self.losses}

    @property
    def main(self) -> str:
        """Name of the variant that is trained with ``losses``, e.g. ``kd+topkd``."""
        return variant_name(self.losses)

    def place(self, variant: str) -> str:
        """Returns the key of a variant's terms: ``losses`` or ``controls.NAME``."""
        return "losses" if variant == self.main else f"controls.{variant}"

    def schedule_warnings(self, variant: str) -> list[str]:
        """Lists the terms of a variant whose schedule does not reach their weight, one line each.

        Examples:
            >>> recipe = load("digits", ["losses.kd.warmup=90", "epochs=9"])
            >>> recipe.schedule_warnings(recipe.main)[0].partition(":")[0]
            'losses[1]'
        """
        return [
            f"{self.place(variant)}[{number}]: {warning}"
            for number, term in enumerate(self.variants[variant])
            if (warning := term.schedule_warning(self.epochs))
        ]

    @property
    def hash(self) -> str:
        """Hash of all settings except the name, 12 hexadecimal digits.

        A start or stop that is a fraction of the epochs has the hash of the epoch that it gives.

        Settings at their default are excluded, so a key added by a later version does not change
        the hashes of existing recipes. The default of a setting must therefore never change.

        If ``teacher.recipe`` is a file, its name counts without the folder, so that the hash does
        not depend on the working directory. Before a run is reused, its content is compared.
        """
        update = {
            "losses": tuple(term.resolved(self.epochs) for term in self.losses),
            "controls": {
                name: tuple(term.resolved(self.epochs) for term in terms)
                for name, terms in self.controls.items()
            },
        }
        recipe = self.model_copy(update=update)
        tree = recipe.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
        content = _without_folder(tree)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def names() -> list[str]:
    """Lists the recipes that ship with the package."""
    top = resources.files("topkd") / "recipes"
    with resources.as_file(top) as folder:
        return sorted(
            p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml")
        )


def text(name: str) -> str:
    """Returns the YAML of a recipe, including comments: a file, or one of :func:`names`.

    Raises:
        RecipeError: If the recipe does not exist, or the file is not UTF-8.
    """
    if Path(name).is_file():
        try:
            return Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{name} is not UTF-8: {error}") from error
    if name in names():
        return (resources.files("topkd") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    if Path(name).suffix in (".yaml", ".yml"):
        raise RecipeError(f"there is no file {name}")
    raise RecipeError(
        f"there is no recipe {name!r}{near(name, names(), '; `topkd list recipes` lists them')}"
    )


def about(name: str) -> str:
    """Returns the first line of a recipe's leading comment."""
    first = text(name).splitlines()[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def load(name: str, changes: Sequence[str] = ()) -> Recipe:
    """Loads a recipe and applies changes.

    Args:
        name: A file, or one of :func:`names`.
        changes: Changes ``key=value``, with a dotted key (``optimizer.lr=0.1``,
            ``losses.kd.weight=2``) and a value in YAML.

    Raises:
        RecipeError: If the recipe or a change is invalid.
    """
    tree = read_yaml(text(name), name)
    if not isinstance(tree, dict):
        raise RecipeError(f"{name}: a recipe is a mapping of keys to values")
    default = Path(name).stem if Path(name).is_file() else name
    tree.setdefault("name", default)
    for change in changes:
        change_by(tree, change)
    _find_beside(tree, Path(name))
    return parse(tree)


def _find_beside(tree: dict[str, Any], file: Path) -> None:
    """Resolves ``teacher.recipe`` relative to the folder of the recipe."""
    teacher = tree.get("teacher")
    name = teacher.get("recipe") if isinstance(teacher, dict) else None
    if isinstance(name, str) and file.is_file() and (file.parent / name).is_file():
        tree["teacher"] = {**tree["teacher"], "recipe": str(file.parent / name)}


def parse(tree: Mapping[str, Any]) -> Recipe:
    """Validates plain values and returns a recipe.

    Raises:
        RecipeError: If a key or a value is invalid; the message lists all of them.
    """
    return validated(Recipe, tree, "recipe")


def write(recipe: Recipe) -> str:
    """Writes a recipe as YAML; reading it returns an equal recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def difference(there: Recipe, here: Recipe) -> str:
    """Describes the first key that differs between two recipes, with both values."""

    def leaf(key: str, a: Any, b: Any) -> str | None:
        if a == b:
            return None
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            a, b = dict(enumerate(a)), dict(enumerate(b))
        if isinstance(a, dict) and isinstance(b, dict):
            inner = (leaf(f"{key}.{k}", a.get(k), b.get(k)) for k in dict.fromkeys((*a, *b)))
            return next(found for found in inner if found is not None)
        return f"{key.removeprefix('.')}: {_shown(a)} there, {_shown(b)} here"

    exclude = {"name"}
    trees = (recipe.model_dump(mode="json", exclude=exclude) for recipe in (there, here))
    return leaf("", *map(_without_folder, trees)) or "no difference"


def _without_folder(tree: dict[str, Any]) -> dict[str, Any]:
    """Removes the folder from ``teacher.recipe`` if it is the path of a file."""
    teacher = tree.get("teacher") or {}
    path = Path(teacher.get("recipe") or "")
    if path.suffix not in (".yaml", ".yml"):
        return tree
    return tree | {"teacher": teacher | {"recipe": path.name}}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
