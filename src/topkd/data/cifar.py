"""CIFAR-10 and CIFAR-100, from torchvision's files or the Hugging Face parquet layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topkd.data.base import Data, Faults, InMemory
from topkd.data.pictures import UNREADABLE, OnError, in_color, open_bytes, reason, same_class
from topkd.data.shards import refuse_gaps


@dataclass(frozen=True)
class _Kind:
    name: str
    classes: int
    label: str  # column of the parquet files
    mean: tuple[float, float, float]  # as the public benchmark normalises
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
        download: Whether to fetch torchvision's files into the folder where it has neither.
        on_error: Whether a training image that cannot be read stops the work or is replaced by the
            next of its class. A test image always stops it.

    Raises:
        FileNotFoundError: If the folder has neither and nothing may be downloaded.
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
        download: Whether to fetch torchvision's files into the folder where it has neither.
        on_error: Whether a training image that cannot be read stops the work or is replaced by the
            next of its class. A test image always stops it.

    Raises:
        FileNotFoundError: If the folder has neither and nothing may be downloaded.
        ValueError: If a file cannot be read, or an image in it; the message names it.

    References:
        Learning Multiple Layers of Features from Tiny Images (Krizhevsky, 2009)
        https://www.cs.toronto.edu/~kriz/cifar.html
    """
    return _load(_CIFAR100, Path(root).expanduser(), download, on_error)


def _load(kind: _Kind, root: Path, download: bool, on_error: OnError) -> Data:
    faults = Faults()
    shards = {part: sorted(root.rglob(f"{part}-*.parquet")) for part in ("train", "test")}
    if any(shards.values()):
        missing = [part for part, files in shards.items() if not files]
        if missing:
            raise FileNotFoundError(f"{root} has no {missing[0]}-*.parquet: is it half copied?")
        for files in shards.values():
            refuse_gaps([str(file) for file in files])
        train, classes = _parquet(kind, shards["train"], faults if on_error == "skip" else None)
        test, _ = _parquet(kind, shards["test"], None)
    else:
        (train, classes), (test, _) = (_torchvision(kind, root, t, download) for t in (True, False))
    if len(classes) != kind.classes:
        raise ValueError(f"{root} has {len(classes)} classes, {kind.name} has {kind.classes}")
    return Data(kind.name, train, test, classes, kind.mean, kind.std, faults=faults)


def _images(kind: _Kind, pixels: np.ndarray, target: Sequence[int]) -> InMemory:
    images, labels = torch.from_numpy(pixels), torch.tensor(target, dtype=torch.long)
    return InMemory(images, labels, kind.mean, kind.std, padding=4, flip=True)


def _torchvision(
    kind: _Kind, root: Path, train: bool, download: bool
) -> tuple[InMemory, Sequence[str]]:
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind.name]
    try:
        # torchvision compares the hash of every file before it reads one.
        dataset = source(str(root), train=train, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{root} holds neither parquet files (train-*.parquet, test-*.parquet) nor the whole "
            f"of torchvision's {source.base_folder}; set data.root to the folder that does, "
            "or data.download=true to fetch it"
        ) from error
    return _images(kind, dataset.data, dataset.targets), dataset.classes


def _parquet(
    kind: _Kind, files: Sequence[Path], faults: Faults | None
) -> tuple[InMemory, Sequence[str]]:
    """Reads a split; where faults are taken, they are noted and do not stop the work."""
    pixels: list[np.ndarray | None] = []
    target: list[int] = []
    names: Sequence[str] = [str(label) for label in range(kind.classes)]
    for file in files:
        table, names = _read_table(kind, file, names)
        column = "img" if "img" in table.column_names else "image"
        for row, (image, label) in enumerate(
            zip(table[column].to_pylist(), table[kind.label].to_pylist(), strict=True)
        ):
            try:
                pixels.append(_decode(image, f"{file}, row {row}"))
            except ValueError as error:
                if faults is None:
                    raise
                pixels.append(None)
                faults.unreadable[f"{file}, row {row}"] = str(error)
            if not isinstance(label, int):
                raise ValueError(
                    f"{file}, row {row}: expected a whole number as label, got {label!r}"
                )
            target.append(label)
    if not pixels:
        raise ValueError(f"{files[0].parent}: the parquet files hold no image")
    return _images(kind, np.stack(_replaced(pixels, target)), target), names


def _replaced(pixels: list[np.ndarray | None], target: list[int]) -> list[np.ndarray]:
    """Puts the next image of the same class in the place of each that could not be read."""
    labels, whole = torch.tensor(target), []
    for row, image in enumerate(pixels):
        same = iter([row]) if image is not None else same_class(labels, row)
        found = next((there for there in map(pixels.__getitem__, same) if there is not None), None)
        if found is None:
            raise ValueError(f"no training image of class {target[row]} can be read")
        whole.append(found)
    return whole


def _read_table(kind: _Kind, file: Path, names: Sequence[str]) -> tuple[Any, Sequence[str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}") from error
    wanted = {"img", kind.label} if "img" in table.column_names else {"image", kind.label}
    if not wanted <= set(table.column_names):
        raise ValueError(
            f"{file} has the columns {', '.join(table.column_names)}; "
            f"{kind.name} needs img (or image) and {kind.label}"
        )
    described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = described.get("info", {}).get("features", {})
    return table, features.get(kind.label, {}).get("names", names)


def _decode(image: dict[str, bytes], where: str) -> np.ndarray:
    try:
        with open_bytes(image["bytes"]) as picture:
            pixels = np.asarray(in_color(picture))
    except UNREADABLE as error:
        raise ValueError(f"{where}: not a readable image: {reason(error)}") from error
    if pixels.shape != (32, 32, 3):
        raise ValueError(f"{where}: expected 32 x 32 pixels, got {pixels.shape[1]} x {len(pixels)}")
    return pixels
