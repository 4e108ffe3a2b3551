"""Data sets, registered by the name that recipes use."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping

from topkd.data import sources
from topkd.data.augmented import Augmentation, Augmented, with_augmentation
from topkd.data.base import Data, DataIssues, Images, InMemory, Subset, same_order, stratified_order
from topkd.data.batches import plain_batches, refuse_few, training_batches
from topkd.data.pictures import with_crop
from topkd.data.sources.dataset import from_dataset


def _find() -> tuple[dict[str, Callable[..., Data]], dict[str, int]]:
    """Collects the functions in ``sources`` that take keyword arguments and return ``Data``."""
    found: dict[str, Callable[..., Data]] = {}
    counts: dict[str, int] = {}
    for place in pkgutil.iter_modules(sources.__path__):
        module = importlib.import_module(f"{sources.__name__}.{place.name}")
        counts |= getattr(module, "TRAINING_IMAGES", {})
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                signature = inspect.signature(value)
                kinds = {parameter.kind for parameter in signature.parameters.values()}
                is_source = signature.return_annotation in (Data, "Data")
                if is_source and kinds <= {inspect.Parameter.KEYWORD_ONLY} and name[0] != "_":
                    found[name] = value
    return found, counts


_FOUND = _find()

DATA: Mapping[str, Callable[..., Data]] = _FOUND[0]
"""Name -> function that loads it; its arguments are the options of ``data`` in a recipe."""

TRAINING_IMAGES: Mapping[str, int] = _FOUND[1]
"""Name -> number of training images, where it is always the same."""

__all__ = [
    "DATA",
    "TRAINING_IMAGES",
    "Augmentation",
    "Augmented",
    "Data",
    "DataIssues",
    "Images",
    "InMemory",
    "Subset",
    "from_dataset",
    "plain_batches",
    "refuse_few",
    "same_order",
    "stratified_order",
    "training_batches",
    "with_augmentation",
    "with_crop",
]
