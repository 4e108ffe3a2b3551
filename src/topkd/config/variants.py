"""Variants of a study: the terms of each, and their expansion by a grid."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from topkd.config import recipe as recipes
from topkd.config.study_file import StudyFile, Variant
from topkd.config.validation import RecipeError, near

Changes = list[tuple[str, Any]]  # changes of a recipe, in the order in which they apply
_EXCLUSIVE = {"share": "weight", "weight": "share"}
Variants = dict[str, tuple[list[dict[str, Any]], Changes]]  # name -> terms, other changes


def parent_of(tree: dict[str, Any], key: str, where: str) -> tuple[dict[str, Any], str]:
    """Returns the mapping that contains a dotted key, and the last step of the key.

    Raises:
        RecipeError: If a step has no keys.
    """
    *steps, last = key.split(".")
    for step in steps:
        if tree.get(step) is None:
            tree[step] = {}
        tree = tree[step]
        if not isinstance(tree, dict):
            raise RecipeError(f"{where}: {key}: {step} has no keys, it is {tree!r}")
    return tree, last


def of_file(file: StudyFile, beside: Path, common: Mapping[str, Any]) -> Variants:
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
            terms, changes = listed(recipe_tree(given.recipe, beside)["losses"]), Changes()
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
        here, last = parent_of(term, option, key)
        here[last] = value
    return bool(found)


def titles_of(terms: Sequence[Mapping[str, Any]]) -> set[str]:
    """Returns the names and labels of terms."""
    return {title for term in terms for title in (term.get("label"), term.get("name")) if title}


def _grid_keys(terms: Sequence[Mapping[str, Any]], file: StudyFile) -> list[str]:
    """Lists the keys of the grid that apply to a variant with these terms."""
    return [key for key in file.grid if term_option(key)[0] in titles_of(terms)]


def number_in_grid(variants: Variants, file: StudyFile) -> int:
    """Counts the variants that :func:`in_grid` returns."""
    total = 0
    for name, (terms, _) in variants.items():
        keys = _grid_keys(terms, file)
        total += math.prod(len(file.grid[key]) for key in keys)
        total += bool(keys) and name == file.baseline
    return total


def in_grid(variants: Variants, file: StudyFile) -> Iterator[tuple[str, Any]]:
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


def recipe_tree(name: str, beside: Path) -> dict[str, Any]:
    """Loads a recipe as plain values; a file is looked up beside the study first."""
    place = beside / name
    recipe = recipes.load(str(place) if place.is_file() else name)
    return recipe.model_dump(mode="json")
