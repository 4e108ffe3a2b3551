"""Map-style Python data sets: ``len`` and ``[index]``, which returns a picture and a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from topkd._runtime.imports import imported
from topkd.data.base import Data, DataIssues
from topkd.data.pictures import (
    CropConfig,
    CropOptions,
    OnError,
    StorageError,
    picture_data,
    with_crop_options,
)
from topkd.data.shards import numbered

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Unpack


class Indexed(Protocol):
    """A map-style ``Dataset`` of torch."""

    def __len__(self) -> int:
        """Returns the number of samples."""

    def __getitem__(self, index: int) -> Any:
        """Returns a picture and its label."""


@dataclass(frozen=True)
class Items:
    """Pictures of a map-style data set."""

    dataset: Indexed
    origin: str

    @property
    def blocks(self) -> None:
        """None, since samples can be read in any order."""

    def name(self, index: int) -> str:
        """Returns the data set and the index."""
        return f"{self.origin}[{index}]"

    def open(self, index: int) -> Image.Image:
        """Converts a sample to a picture."""
        return _picture(self.dataset[index][0], self.name(index))


@with_crop_options
def from_dataset(
    train: Indexed,
    test: Indexed,
    *,
    classes: Sequence[str] | None = None,
    on_error: OnError = "stop",
    **pictures: Unpack[CropOptions],
) -> Data:
    """Builds a data set from two map-style data sets.

    They return pictures without normalization and augmentation, which topkd applies: a PIL image,
    an array (h, w, 3) of bytes, or a tensor (1 or 3, h, w) of bytes or of floats in [0, 1]. Several
    threads read at a time.

    Labels are read from the attribute ``targets`` or ``labels``; without it, every sample is read
    once.

    Args:
        train: Training samples.
        test: Evaluation samples.
        classes: Class names in order. Defaults to the attribute ``classes``, or else to numbers.
        on_error: Whether an unreadable training picture raises an error or is replaced by the next
            picture of its class. An unreadable evaluation picture always raises an error.
        **pictures: Cropping and normalization: see :class:`topkd.data.pictures.CropConfig`.

    Raises:
        ValueError: If a data set is empty, or a label is not the number of a class.

    Examples:
        >>> samples = [(torch.zeros(3, 8, 8), label) for label in (0, 1)]
        >>> data = from_dataset(samples, samples, size=8)
        >>> data.classes, data.test.read(torch.arange(2), None).shape
        (['0', '1'], torch.Size([2, 3, 8, 8]))
    """
    faults, frame = DataIssues(), CropConfig(**pictures)
    names = classes or getattr(train, "classes", None)
    origins = [f"{part} {type(d).__name__}" for part, d in (("train", train), ("test", test))]
    labels = [_labels(d, origin) for d, origin in zip((train, test), origins, strict=True)]
    items = [Items(d, origin) for d, origin in zip((train, test), origins, strict=True)]
    known = None if names is None else list(names)
    found, target = numbered(labels, known, items, origins[0], faults)
    return picture_data(type(train).__name__, items, target, found, frame, on_error, faults)


@with_crop_options
def dataset(
    *,
    train: str,
    test: str,
    classes: tuple[str, ...] | None = None,
    on_error: OnError = "stop",
    **pictures: Unpack[CropOptions],
) -> Data:
    """Loads data sets returned by Python functions, given as MODULE:CALLABLE.

    Args:
        train: Training data as ``module:function``, which is imported and called without arguments.
        test: Evaluation data in the same form.
        classes: Class names in order. Defaults to the attribute ``classes``, or else to numbers.
        on_error: Whether an unreadable training picture raises an error or is replaced by the next
            picture of its class. An unreadable evaluation picture always raises an error.
        **pictures: Cropping and normalization: see :class:`topkd.data.pictures.CropConfig`.

    Raises:
        ValueError: If there is no such function, or :func:`from_dataset` raises it.
    """
    parts = [_called(name, f"data.{key}") for key, name in (("train", train), ("test", test))]
    return from_dataset(*parts, classes=classes, on_error=on_error, **pictures)


def _called(name: str, where: str) -> Indexed:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"{where}: expected module:function, got {name!r}")
    try:
        found: Indexed = getattr(imported(module), function)()
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, but an import in it fails
        raise ValueError(f"{where}: there is no module {module!r}") from error
    except AttributeError as error:
        if not hasattr(imported(module), function):
            raise ValueError(f"{where}: {module} has no {function!r}") from error
        raise
    return found


def _labels(dataset: Indexed, origin: str) -> list[int | str]:
    if not len(dataset):
        raise ValueError(f"{origin} is empty")
    if isinstance(dataset, torch.utils.data.Subset):
        labels = _labels(dataset.dataset, origin)  # type: ignore[arg-type]
        return [labels[place] for place in dataset.indices]
    kept = [getattr(dataset, name, None) for name in ("targets", "labels")]
    changes = getattr(dataset, "target_transform", None) is not None
    given = next((labels for labels in kept if labels is not None and not changes), None)
    if given is None:
        given = [dataset[index][1] for index in range(len(dataset))]
    if len(given) != len(dataset):
        raise ValueError(f"{origin} has {len(dataset)} samples and {len(given)} labels")
    return [_integer(label, f"{origin}[{index}]") for index, label in enumerate(given)]


def _integer(label: Any, where: str) -> int:
    try:
        if isinstance(label, bool | np.bool_) or getattr(label, "dtype", None) == torch.bool:
            raise TypeError
        return int(label.__index__())
    except (AttributeError, TypeError):
        raise ValueError(f"{where}: expected a whole number as label, got {label!r}") from None


def _picture(image: Any, where: str) -> Image.Image:
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] in (1, 3):
        if image.is_floating_point():
            if not (image.min() >= 0 and image.max() <= 1):
                raise StorageError(
                    f"{where}: floats must be in [0, 1], got {image.min():.4g} to "
                    f"{image.max():.4g}; data.mean and data.std set the normalization"
                )
            image = (image * 255).round().to(torch.uint8)
        image = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return Image.fromarray(np.ascontiguousarray(image))
    got = f"{type(image).__name__} {tuple(getattr(image, 'shape', ()))}"
    raise StorageError(
        f"{where}: expected a PIL image, bytes (h, w, 3) or a tensor (3, h, w), got {got}"
    )
