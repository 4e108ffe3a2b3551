"""Studies: variants of a recipe in several settings, with many seeds."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from topkd.config import recipe as recipes
from topkd.config import study_file
from topkd.config.recipe import Recipe
from topkd.config.study_file import StudyFile, merged
from topkd.config.validation import RecipeError, near
from topkd.config.variants import (
    Changes,
    in_grid,
    number_in_grid,
    of_file,
    parent_of,
    recipe_tree,
    term_option,
    titles_of,
)

MOST_JOBS = 100_000
_OF_STUDY = ("name", "losses", "controls")  # keys of a recipe that the study sets itself
LONGEST_NAME = 200  # bytes of a setting and a variant in a file name, which has at most 255


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
    return expand(study_file.read(path, changes), path.parent)


def expand(file: StudyFile, beside: Path = Path()) -> Plan:
    """Builds the recipe of every variant in every setting.

    Args:
        file: The study.
        beside: Folder that relative paths of recipes refer to.

    Raises:
        RecipeError: If a variant or a change is invalid; the message locates the error.
    """
    base = recipe_tree(file.recipe, beside)
    _have_own_folders("name", [file.name])
    _have_own_folders("settings", list(file.settings))
    listed = {
        setting: of_file(file, beside, {**file.set, **changes})
        for setting, changes in file.settings.items()
    }
    jobs = sum(number_in_grid(variants, file) for variants in listed.values()) * len(file.all_seeds)
    if jobs > MOST_JOBS:  # before their recipes are built, which would take hours
        raise RecipeError(f"{jobs:,} jobs are more than {MOST_JOBS:,}")
    found = {}
    for setting, changes in file.settings.items():
        expanded = list(in_grid(listed[setting], file))
        names = [file.baseline, *(name for name, _ in expanded if name != file.baseline)]
        _have_own_folders("variants", names, folder_name(setting))
        variants = dict(expanded)
        titles = {title for terms, _ in variants.values() for title in titles_of(terms)}
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
        first = key.partition(".")[0]
        if first in _OF_STUDY:
            raise RecipeError(
                f"{where}: {key}: {first} cannot be changed here; `variants` sets the losses, "
                "and runs are named after the study"
            )
        here, last = parent_of(tree, key, where)
        here[last] = merged(key, here.get(last), value)
