"""Batches: order, read-ahead and worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from topkd.data.augmented import Augmented
from topkd.data.base import Images
from topkd.features import Batch


def training_batches(
    images: Images,
    size: int,
    seed: int,
    epoch: int,
    *,
    augmentation_seed: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """Yields the batches of one epoch; order and augmentation depend only on (seed, epoch).

    An incomplete last batch is dropped, so that point clouds always have the same size.

    Args:
        images: The images to read.
        size: Images per batch; with two views, a batch holds twice as many.
        seed: Seed of the run.
        epoch: Number of the epoch.
        augmentation_seed: Augmentation seed. Defaults to ``seed``, which always sets the order.
        rank: Rank of this process; processes read disjoint images.
        ranks: Number of processes.

    Raises:
        ValueError: If there are fewer images than a batch needs, or one cannot be read.
    """
    count = len(images.target)
    refuse_few(count, size * ranks)
    order = torch.from_numpy(shuffled(images, seed, epoch))
    own = order[: count - count % (size * ranks)].view(-1, ranks, size)[:, rank]
    drawn = seed if augmentation_seed is None else augmentation_seed
    yield from _read_ahead(images, list(own), (drawn, epoch))


def refuse_few(count: int, size: int) -> None:
    """Raises ``ValueError`` if there are fewer training images than a batch needs."""
    if count < size:
        raise ValueError(
            f"{count} training images are too few for a batch of {size}; make batch_size smaller"
        )


def plain_batches(images: Images, size: int, index: Tensor | None = None) -> Iterator[Batch]:
    """Yields batches of images in order, without augmentation.

    Args:
        images: The images to read.
        size: Images per batch.
        index: Indices of the images to read, (n,). Defaults to all.

    Raises:
        ValueError: If one cannot be read.
    """
    if index is None:
        index = torch.arange(len(images.target))
    yield from _read_ahead(images, list(index.split(size)), None)


def shuffled(images: Images, seed: int, epoch: int) -> np.ndarray:
    r"""Computes a random order that depends only on (seed, epoch).

    With read groups, the groups are shuffled, and each image moves back by up to ``buffer`` places:
    image :math:`i` of a group that starts at place :math:`b` is sorted by
    :math:`b + u_i \cdot \mathrm{buffer}`, with :math:`u_i` uniform in [0, 1). About ``buffer``
    images are in memory at a time. A set no larger than the buffer is shuffled completely.

    Returns:
        A permutation of the indices, (images,).
    """
    count, blocks = len(images.target), images.blocks
    generator = np.random.default_rng((seed, epoch))
    if blocks is None or count <= blocks.buffer:
        return generator.permutation(count)
    _, block, sizes = np.unique(blocks.of, return_inverse=True, return_counts=True)
    order = generator.permutation(len(sizes))
    begin = np.empty(len(sizes))
    begin[order] = np.cumsum(sizes[order]) - sizes[order]
    return np.argsort(begin[block] + generator.random(count) * blocks.buffer, kind="stable")


def _read_ahead(
    images: Images, indices: list[Tensor], augmented: tuple[int, int] | None
) -> Iterator[Batch]:
    """Reads the next batch while the current one is in use."""
    if isinstance(images, Augmented) and images.workers and augmented is not None:
        yield from _by_processes(images, indices, augmented)
        return
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(_read, images, index, augmented) for index in indices[:1]]
        for here, _ in enumerate(indices):
            batch = coming.pop().result()
            if here + 1 < len(indices):
                coming.append(reader.submit(_read, images, indices[here + 1], augmented))
            yield batch


def _read(images: Images, index: Tensor, augmented: tuple[int, int] | None) -> Batch:
    batch = _batch(images, index, augmented)
    # Pinned memory allows asynchronous copies to the GPU.
    return batch.apply(torch.Tensor.pin_memory) if torch.cuda.is_available() else batch


def _batch(images: Images, index: Tensor, augmented: tuple[int, int] | None) -> Batch:
    if isinstance(images, Augmented) and augmented is not None:
        return images.batch(index, augmented)
    return Batch(images.read(index, augmented), images.target[index], index)


def _by_processes(
    images: Augmented, indices: list[Tensor], augmented: tuple[int, int]
) -> Iterator[Batch]:
    loader = DataLoader(
        _Reader(images, augmented),
        batch_size=None,
        sampler=[index.tolist() for index in indices],
        num_workers=min(images.workers, len(indices)),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the default would advance the global generator
    )
    for read, unreadable in loader:
        if isinstance(read, ValueError):
            raise read
        images.faults.unreadable.update(unreadable)
        yield Batch(*read)


@dataclass
class _Reader(Dataset[Any]):
    """The data set of a worker process."""

    images: Augmented
    augmented: tuple[int, int]

    def __getitem__(self, index: list[int]) -> Any:
        try:
            batch = _batch(self.images, torch.tensor(index), self.augmented)
        except ValueError as error:  # raised by the caller, without the worker's traceback
            return error, {}
        read = (batch.images, batch.target, batch.index, batch.soft)
        return read, dict(self.images.faults.unreadable)
