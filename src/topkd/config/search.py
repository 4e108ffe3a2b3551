"""Search spaces: options of a recipe and the values to try."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topkd.config import recipe as recipes
from topkd.config.changes import change_by
from topkd.config.recipe import Recipe
from topkd.config.validation import RecipeError, near, read_yaml
from topkd.config.variants import set_term

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, tried on a logarithmic scale if both are positive."""

    low: float
    high: float

    @property
    def is_logarithmic(self) -> bool:
        """Whether the scale is logarithmic."""
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


Candidates = tuple[Any, ...] | Range
Space = Mapping[str, Candidates]
"""Key of a recipe -> the values to try."""


def read_space(changes: Sequence[str]) -> Space:
    """Reads a search space.

    Args:
        changes: One ``key=value,value,...`` or ``key=low..high`` per option. Values are YAML.

    Raises:
        RecipeError: If one is malformed, or a key or a value appears twice.

    Examples:
        >>> read_space(["optimizer.lr=0.05,0.1", "kd.weight=0.5..8"])
        {'optimizer.lr': (0.05, 0.1), 'kd.weight': Range(low=0.5, high=8.0)}
    """
    space: dict[str, Candidates] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise RecipeError(f"expected KEY=VALUE,VALUE,... or KEY=LOW..HIGH, got {change!r}")
        if key in space:
            raise RecipeError(f"{key} appears twice")
        space[key] = _candidates(text, change)
    return space


def _candidates(text: str, change: str) -> Candidates:
    bounds = _RANGE.fullmatch(text.strip())
    if bounds:
        low, high = map(float, bounds.groups())
        if not low < high < math.inf:
            raise RecipeError(f"{change}: a range is written LOW..HIGH, with LOW < HIGH")
        return Range(low, high)
    values = read_yaml(f"[{text}]", f"{change}: the list of values")
    if not values:
        raise RecipeError(f"{change}: there is no value to try")
    for number, value in enumerate(values):
        if isinstance(value, str) and _RANGE.fullmatch(value):
            raise RecipeError(f"{change}: a range cannot be combined with other values")
        if value in values[:number]:
            raise RecipeError(f"{change}: {json.dumps(value)} appears twice")
    return tuple(values)


def size(space: Space) -> int | None:
    """Returns the number of combinations of values; None if there is a range."""
    count = 1
    for candidates in space.values():
        if isinstance(candidates, Range):
            return None
        count *= len(candidates)
    return count


def one_by_one(space: Space) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each value of each key together with the first values of all other keys.

    A range is represented by its bounds.

    Examples:
        >>> [values for _, values in one_by_one({"a": (1, 2), "b": (3,)})]
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}, {'a': 1, 'b': 3}]
    """
    ends = {key: (c.low, c.high) if isinstance(c, Range) else c for key, c in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    for key, values in ends.items():
        for value in values:
            yield key, first | {key: value}


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Sets options of a recipe and disables ``data.validation``.

    Options of a term are set in the losses and in every control with this term, so that a control
    still differs from the losses in the other terms alone. A control that differs from the losses
    in this option alone keeps its value.

    Args:
        recipe: The recipe.
        values: Key -> value. A key is one of the recipe, such as ``optimizer.lr``, or
            ``TERM.option`` or ``losses.TERM.option``, where ``TERM`` is the name or label of a
            term.

    Raises:
        RecipeError: If a key does not exist or cannot be tuned, or a value is invalid.
    """
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    tree["data"].pop("validation", None)
    for key, value in values.items():
        _set(tree, key, value)
    return recipes.parse(tree)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    if set_term(tree["losses"], key, value):
        for terms in tree.get("controls", {}).values():
            changed = copy.deepcopy(terms)
            set_term(changed, key, value)
            if changed != tree["losses"]:
                terms[:] = changed
        return
    first = re.split(r"[.\[]", key)[0]
    titles = [name for term in tree["losses"] for name in (term.get("label"), term["name"]) if name]
    if first not in Recipe.model_fields:
        known = [*titles, *Recipe.model_fields]
        raise RecipeError(f"there is no key or term {first!r}{near(first, known)}")
    if first in ("name", "controls", "evaluation") or key == "data.validation":
        raise RecipeError(f"{key} cannot be tuned: it has no effect on a trial")
    change_by(tree, f"{key}={json.dumps(value)}")
