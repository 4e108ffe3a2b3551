"""Data options that a file of unknown origin may set."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from topkd.config.changes import change_by

PLAIN = frozenset(
    {
        "name",
        "validation",
        "limit",
        "fraction",
        "test_limit",
        "randaugment",
        "augmentation_seed",
        "mixup",
        "cutmix",
        "views",
        "workers",
        "size",
        "padding",
        "crop",
        "flip",
        "mean",
        "std",
        "split",
        "image",
        "label",
        "buffer",
        "keep",
        "on_error",
    }
)
"""Options that open nothing. All others may name a path, an address or code."""


def changed(
    data: Mapping[str, Any], changes: Sequence[str], origin: str, *, trust: bool
) -> dict[str, Any]:
    """Applies a user's changes to the data section of a weights file.

    Args:
        data: The file's section; empty if it has none.
        changes: ``key=value`` replaces one option; a bare name replaces the section.
        origin: Name of the file, for messages.
        trust: Whether the file may set any option.

    Returns:
        The section to load.

    Raises:
        RecipeError: If a change cannot be applied.
        ValueError: If the file itself sets an option outside :data:`PLAIN`.

    Examples:
        >>> described = {"name": "folder", "root": "theirs", "size": 32}
        >>> changed(described, ["root=mine"], "w.safetensors", trust=False)
        {'name': 'folder', 'root': 'mine', 'size': 32}
        >>> changed(described, [], "w.safetensors", trust=False)
        Traceback (most recent call last):
        ValueError: w.safetensors asks to open data.root='theirs', ...
    """
    tree = copy.deepcopy(dict(data))
    for change in changes:
        if "=" in change:
            change_by(tree, change)
        else:
            tree, data = {"name": change}, {}
    given = {change.partition("=")[0] for change in changes}
    asked = [key for key in data.keys() - PLAIN - given if tree.get(key) is not None]
    if asked and not trust:
        listed = ", ".join(f"data.{key}={_short(tree[key])}" for key in sorted(asked))
        named = " ".join(f"--data {key}=..." for key in sorted(asked))
        raise ValueError(
            f"{origin} asks to open {listed}, which an untrusted file may not; "
            f"specify it yourself ({named}), or pass --trust"
        )
    return tree


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
