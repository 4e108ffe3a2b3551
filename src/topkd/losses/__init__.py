"""Distillation losses: classes named as in their papers, and their formulas as functions.

Every module of this package may define losses. A class with an :class:`~topkd.losses.base.LossInfo`
is listed in :data:`LOSSES` under the name that recipes use, and can be imported from here.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from topkd.losses.base import Group, Loss, LossContext, LossInfo, LossTerm


def _find() -> dict[str, type[Loss]]:
    """Imports the modules of this package and collects the losses that they define."""
    modules = [
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    ]
    found = [
        value
        for module in modules
        for value in vars(module).values()
        # In Python 3.10 an alias such as `tuple[int, ...]` is an instance of `type`, too.
        if isinstance(value, type) and get_origin(value) is None and issubclass(value, Loss)
        if "info" in vars(value)
        if value.__module__ == module.__name__
    ]
    groups = get_args(Group)
    found.sort(key=lambda loss: (groups.index(loss.info.group), loss.info.name))
    return {loss.info.name: loss for loss in found}


LOSSES: Mapping[str, type[Loss]] = _find()
"""Name in recipes -> class."""

_CLASSES = {loss.__name__: loss for loss in LOSSES.values()}

__all__ = ["LOSSES", "Loss", "LossContext", "LossInfo", "LossTerm", *sorted(_CLASSES)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return _CLASSES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "functional"]
