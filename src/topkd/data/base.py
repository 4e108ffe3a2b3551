"""Images with labels, wherever they come from, and how they become batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from topkd.data.augment import crop_and_flip, draws, normalise
from topkd.features import Batch


class Images(Protocol):
    """Labelled images that can be read by index."""

    @property
    def target(self) -> Tensor:
        """(images,)."""

    def read(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads normalised images (n, 3, h, w); ``augmented`` is (seed, epoch), None for plain."""


@dataclass(frozen=True)
class InMemory:
    """Small images of one size, kept as bytes and augmented a whole batch at a time.

    Raises:
        ValueError: If the pixels are not bytes of that shape, or not as many as the labels.

    Examples:
        >>> images = InMemory(torch.zeros(10, 8, 8, 3, dtype=torch.uint8), torch.zeros(10).long(),
        ...                   mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), padding=1, flip=False)
        >>> images.read(torch.arange(4), augmented=(0, 1)).shape
        torch.Size([4, 3, 8, 8])
    """

    pixels: Tensor  # (images, h, w, 3), uint8
    target: Tensor  # (images,)
    mean: Sequence[float]
    std: Sequence[float]
    padding: int  # of the random crop
    flip: bool

    def __post_init__(self) -> None:
        pixels = self.pixels
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            got = f"{pixels.dtype} {tuple(pixels.shape)}"
            raise ValueError(f"pixels must be bytes (images, h, w, 3), got {got}")
        if self.target.shape != pixels.shape[:1]:
            raise ValueError(f"{len(pixels)} images need as many labels, got {len(self.target)}")

    def read(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads normalised images (n, 3, h, w); ``augmented`` is (seed, epoch), None for plain."""
        pixels = self.pixels[index]
        if augmented is not None:
            uniform = draws(*augmented, index, 3)
            pixels = crop_and_flip(pixels, uniform, padding=self.padding, flip=self.flip)
        return normalise(pixels, self.mean, self.std)


@dataclass(frozen=True)
class Subset:
    """Some images of a larger set, with an index of their own."""

    images: Images
    index: Tensor  # (images,), places in the larger set

    @property
    def target(self) -> Tensor:
        """(images,)."""
        return self.images.target[self.index]

    def read(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads normalised images (n, 3, h, w); ``augmented`` is (seed, epoch), None for plain."""
        return self.images.read(self.index[index], augmented)


@dataclass(frozen=True)
class Data:
    """A data set: what to train on and what to judge by."""

    name: str
    train: Images
    test: Images  # the validation split where one was asked for
    classes: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    judged_on: str = "test"

    def __post_init__(self) -> None:
        for part, images in (("training", self.train), ("test", self.test)):
            wrong = (images.target < 0) | (images.target >= len(self.classes))
            if wrong.any():
                where = int(wrong.nonzero()[0])
                raise ValueError(
                    f"{self.name}: {part} image {where} has label {int(images.target[where])}, "
                    f"but there are {len(self.classes)} classes (0 to {len(self.classes) - 1})"
                )

    def with_validation(self, share: float) -> Data:
        """Judges by a share of the training images, the same for each class, and not by the test.

        The split depends on nothing but the labels: it is the same for every seed and method.

        Raises:
            ValueError: If the share leaves a class without an image on either side.
        """
        chosen = _by_class(self.train.target, share)
        kept = np.setdiff1d(np.arange(len(self.train.target)), chosen)
        for side in (chosen, kept):
            if len(set(self.train.target[side].tolist())) < len(set(self.train.target.tolist())):
                raise ValueError(
                    f"{self.name}: a validation share of {share} leaves a class without images"
                )
        train = Subset(self.train, torch.from_numpy(kept))
        held_out = Subset(self.train, torch.from_numpy(chosen))
        return replace(self, train=train, test=held_out, judged_on="validation")

    def with_limit(self, images: int) -> Data:
        """Trains on so many images only, of each class as many as of the others."""
        chosen = _by_class(self.train.target, min(1.0, images / len(self.train.target)))
        return replace(self, train=Subset(self.train, torch.from_numpy(chosen)))


def _by_class(target: Tensor, share: float) -> np.ndarray:
    """Chooses a share of the images of every class, always the same."""
    generator = np.random.default_rng(20240721)  # any number does, as long as it never changes
    labels = target.numpy()
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[: round(share * count)]
        for label, count in zip(*np.unique(labels, return_counts=True), strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def training_batches(
    images: Images, size: int, seed: int, epoch: int, *, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Reads one epoch in an order and with an augmentation that depend on (seed, epoch) alone.

    A last, smaller batch is dropped: a cloud of embeddings always has the same number of points.

    Args:
        images: What to read.
        size: Images in a batch.
        seed: Of the run.
        epoch: Of the run.
        rank: Which of several processes this is; each reads other images.
        ranks: How many processes there are.

    Raises:
        ValueError: If there are fewer images than a batch needs.
    """
    count = len(images.target)
    if count < size * ranks:
        raise ValueError(f"{count} training images are too few for a batch of {size * ranks}")
    order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count))
    own = order[: count - count % (size * ranks)].view(-1, ranks, size)[:, rank]
    yield from _read_ahead(images, list(own), (seed, epoch))


def plain_batches(images: Images, size: int) -> Iterator[Batch]:
    """Reads all images once, in order and as they are."""
    yield from _read_ahead(images, list(torch.arange(len(images.target)).split(size)), None)


def _read_ahead(
    images: Images, indices: list[Tensor], augmented: tuple[int, int] | None
) -> Iterator[Batch]:
    """Reads the next batch in a thread while the last one is being worked on."""
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(images.read, index, augmented) for index in indices[:1]]
        for here, index in enumerate(indices):
            pixels = coming.pop().result()
            if here + 1 < len(indices):
                coming.append(reader.submit(images.read, indices[here + 1], augmented))
            yield Batch(pixels, images.target[index], index)
