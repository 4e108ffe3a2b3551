"""Changes of settings on the command line, written ``key=value``."""

from __future__ import annotations

import re
from typing import Any

from topkd.config.validation import RecipeError, read_yaml


def change_by(tree: dict[str, Any], change: str) -> None:
    """Applies a change ``key=value`` in place.

    Raises:
        RecipeError: If the change is malformed, or its key does not exist.
    """
    change_inside(tree, change, change)


def change_inside(tree: Any, part: str, change: str) -> None:
    """Applies the part of a change that refers to a key inside a mapping or a list, in place.

    Args:
        tree: The mapping or list.
        part: The part, ``key=value``, with a key inside ``tree``.
        change: The whole change, for messages.

    Raises:
        RecipeError: If the change is malformed, or its key does not exist.
    """
    key, new = read_change(part, change)
    steps = re.findall(r"[^.\[\]]+", key)
    if not steps:
        raise RecipeError(f"a change is written key=value, got {change!r}")
    here: Any = tree
    for step in steps[:-1]:
        if isinstance(here, list):
            here = here[_place(here, step, change)]
        else:
            if here.get(step) is None:
                here[step] = {}
            here = here[step]
        if not isinstance(here, dict | list):
            raise RecipeError(f"{change}: {step} has no keys, it is {here!r}")
    if isinstance(here, list):
        here[_place(here, steps[-1], change)] = new
    else:
        here[steps[-1]] = new


def read_change(part: str, change: str) -> tuple[str, Any]:
    """Reads ``key=value``, with a value in YAML.

    Args:
        part: The text.
        change: The whole change, for messages.

    Raises:
        RecipeError: If there is no ``=``, or the value is not YAML.
    """
    key, equals, value = part.partition("=")
    if not equals:
        raise RecipeError(f"a change is written key=value, got {change!r}")
    return key, read_yaml(value, f"{_shortened(change)}: the value")


def _place(items: list[Any], step: str, change: str) -> int:
    """Finds the position of a list item by index or name."""
    found = [item.get("name") if isinstance(item, dict) else item for item in items]
    if step in found:
        return found.index(step)
    if step.isascii() and step.isdigit() and int(step) < len(items):
        return int(step)
    raise RecipeError(f"{change}: there is no {step!r}; there are {', '.join(map(str, found))}")


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
