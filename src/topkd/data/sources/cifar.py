"""CIFAR-10 and CIFAR-100, from torchvision's files or the Hugging Face parquet layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from topkd.data.base import Data, DataIssues, InMemory
from topkd.data.pictures import CropConfig, OnError, Pictures
from topkd.data.shards import listing, numbered, refuse_gaps
from topkd.data.sources.parquet import Rows, labels_of, schema

TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000}  # always the same

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class _Kind:
    name: str
    classes: int
    label: str  # label column of the parquet files
    mean: tuple[float, float, float]  # normalization of the public benchmark
    std: tuple[float, float, float]


_CIFAR10 = _Kind("cifar10", 10, "label", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = _Kind("cifar100", 100, "fine_label", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def cifar10(
    *, root: str = "data/cifar10", download: bool = False, on_error: OnError = "stop"
) -> Data:
    """Loads CIFAR-10: 50,000 + 10,000 images of 32 x 32, 10 classes.

    Args:
        root: Folder with torchvision's files (``cifar-10-batches-py``) or with the parquet files of
            the Hugging Face layout (``train-*.parquet``, ``test-*.parquet``).
        download: Whether to download torchvision's files if the folder has neither.
        on_error: Whether an unreadable training image raises an error or is replaced by the next
            image of its class. An unreadable test image always raises an error.

    Raises:
        FileNotFoundError: If the folder has neither and ``download`` is false.
        ValueError: If a file cannot be read, or an image in it; the message names it.

    References:
        Learning Multiple Layers of Features from Tiny Images (Krizhevsky, 2009)
        https://www.cs.toronto.edu/~kriz/cifar.html
    """
    return _load(_CIFAR10, Path(root).expanduser(), download, on_error)


def cifar100(
    *, root: str = "data/cifar100", download: bool = False, on_error: OnError = "stop"
) -> Data:
    """Loads CIFAR-100: 50,000 + 10,000 images of 32 x 32, 100 classes.

    Args:
        root: Folder with torchvision's files (``cifar-100-python``) or with the parquet files of
            the Hugging Face layout (``train-*.parquet``, ``test-*.parquet``).
        download: Whether to download torchvision's files if the folder has neither.
        on_error: Whether an unreadable training image raises an error or is replaced by the next
            image of its class. An unreadable test image always raises an error.

    Raises:
        FileNotFoundError: If the folder has neither and ``download`` is false.
        ValueError: If a file cannot be read, or an image in it; the message names it.

    References:
        Learning Multiple Layers of Features from Tiny Images (Krizhevsky, 2009)
        https://www.cs.toronto.edu/~kriz/cifar.html
    """
    return _load(_CIFAR100, Path(root).expanduser(), download, on_error)


def _load(kind: _Kind, root: Path, download: bool, on_error: OnError) -> Data:
    faults = DataIssues()
    shards = {part: sorted(root.rglob(f"{part}-*.parquet")) for part in ("train", "test")}
    if any(shards.values()):
        missing = [part for part, files in shards.items() if not files]
        if missing:
            raise FileNotFoundError(f"{root} has no {missing[0]}-*.parquet; the copy is incomplete")
        for files in shards.values():
            refuse_gaps([str(file) for file in files])
        train, classes = _parquet(kind, shards["train"], on_error, faults)
        test, _ = _parquet(kind, shards["test"], "stop", faults)
    else:
        (train, classes), (test, _) = (_torchvision(kind, root, t, download) for t in (True, False))
    if len(classes) != kind.classes:
        raise ValueError(f"{root} has {len(classes)} classes, {kind.name} has {kind.classes}")
    return Data(kind.name, train, test, classes, kind.mean, kind.std, faults=faults)


def _images(kind: _Kind, pixels: Tensor, target: Tensor) -> InMemory:
    return InMemory(pixels, target, kind.mean, kind.std, padding=4, flip=True)


def _torchvision(
    kind: _Kind, root: Path, train: bool, download: bool
) -> tuple[InMemory, Sequence[str]]:
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind.name]
    try:
        # torchvision verifies the hash of every file first.
        dataset = source(str(root), train=train, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{root} contains neither parquet files (train-*.parquet, test-*.parquet) nor all "
            f"files of torchvision's {source.base_folder}; set data.root to the folder that does, "
            "or data.download=true to download them"
        ) from error
    pixels, target = torch.from_numpy(dataset.data), torch.tensor(dataset.targets)
    return _images(kind, pixels, target), dataset.classes


class _Rows(Rows):
    """Rows whose pictures must be 32 x 32."""

    def open(self, index: int) -> Image.Image:
        picture = super().open(index)
        if picture.size != (32, 32):
            raise ValueError(f"expected 32 x 32 pixels, got {picture.width} x {picture.height}")
        return picture


def _parquet(
    kind: _Kind, files: Sequence[Path], on_error: OnError, faults: DataIssues
) -> tuple[InMemory, Sequence[str]]:
    names: Sequence[str] = [str(label) for label in range(kind.classes)]
    for file in files:
        columns, described = schema(file)
        image = "img" if "img" in columns else "image"
        if not {image, kind.label} <= set(columns):
            raise ValueError(
                f"{file} has the columns {listing(columns)}; "
                f"{kind.name} needs img (or image) and {kind.label}"
            )
        names = described.get(kind.label, {}).get("names", names)
    labels = labels_of(files, kind.label)
    foreign = next((label for label in labels if isinstance(label, str)), None)
    if foreign is not None:
        raise ValueError(f"{files[0].parent}: {kind.label} needs whole numbers, got {foreign!r}")
    rows = _Rows(files, image, buffer=0)  # read once, sequentially
    classes, (target,) = numbered([labels], names, [rows], str(files[0].parent), DataIssues())
    pictures = Pictures(rows, target, CropConfig(32, padding=0), on_error, faults)
    return _images(kind, pictures.read_bytes(torch.arange(len(target)), None), target), classes
