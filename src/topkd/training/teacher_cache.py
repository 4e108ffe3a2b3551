"""Memory-mapped cache of teacher logits and embeddings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkd._io import files
from topkd.features import Batch, Features


class TeacherCache:
    r"""Caches logits and embeddings by (epoch, index), in bfloat16.

    The output of a teacher depends on the augmented image, and augmentation is a pure function of
    (seed, epoch, index). A second student with the same augmentation reads the cached features.
    Every student, including the first, is trained with the rounded values, so the order of the runs
    does not affect results.

    Each epoch is a memory-mapped file with :math:`2 (c + d) + 4` bytes per image, for c classes and
    d-dimensional embeddings. Features of an interrupted run are kept. Each image has a checksum:
    missing, partially written or damaged entries are recomputed.

    Args:
        folder: Parent folder of the cache.
        about: Everything the features depend on: teacher, images, augmentation, precision.
        images: Number of training images.
        classes: Number of classes, c.
        width: Dimension of the embedding, d.

    Examples:
        >>> from tempfile import mkdtemp
        >>> teacher = lambda images: Features(images.mean((2, 3)), images[:, :2, 0, 0])
        >>> cache = TeacherCache(Path(mkdtemp()), {}, images=8, classes=3, width=2)
        >>> batch = Batch(torch.ones(4, 3, 2, 2), torch.zeros(4).long(), torch.arange(4))
        >>> cache(batch, 1, teacher).embedding.shape, cache.computed
        (torch.Size([4, 2]), 4)
        >>> cache(batch, 1, teacher).embedding.shape, cache.computed
        (torch.Size([4, 2]), 4)
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        *,
        images: int,
        classes: int,
        width: int,
    ) -> None:
        content = json.dumps(about, sort_keys=True, indent=1).encode()
        self.folder = folder / hashlib.sha256(content).hexdigest()[:12]
        files.write(self.folder / "about.json", content)
        self.images, self.classes, self.width = images, classes, width
        self.computed = 0  # images that the teacher has evaluated
        self._epoch: int | None = None
        self._open: tuple[NDArray[np.int16], NDArray[np.uint32]]
        # Odd factors, so that any flipped bit changes the checksum.
        self._factors = np.random.default_rng(0).integers(
            2**32, size=classes + width, dtype=np.uint32
        ) | np.uint32(1)

    def __call__(self, batch: Batch, epoch: int, teacher: Callable[[Tensor], Features]) -> Features:
        """Returns the features of a batch; evaluates the complete batch if an image is missing.

        Args:
            batch: Batch of training images.
            epoch: Epoch of the augmentation.
            teacher: The teacher.

        Raises:
            OSError: If the disk has no space for an epoch.
        """
        kept, sums = self._epoch_arrays(epoch)
        index = batch.index.cpu().numpy()
        if (self._checksums(kept[index]) != sums[index]).any():
            output = teacher(batch.images)
            both = torch.cat([output.logits, output.embedding], 1)
            kept[index] = both.bfloat16().cpu().view(torch.int16).numpy()
            sums[index] = self._checksums(kept[index])
            self.computed += len(index)
        both = torch.from_numpy(kept[index]).view(torch.bfloat16).to(batch.images.device)
        return Features(both[:, : self.classes], both[:, self.classes :])

    def _epoch_arrays(self, epoch: int) -> tuple[NDArray[np.int16], NDArray[np.uint32]]:
        if epoch != self._epoch:
            size = self.images * (4 + 2 * (self.classes + self.width))
            path = self.folder / f"epoch{epoch}.bin"
            _reserve(path, size)
            content = np.memmap(path, np.uint8, "r+", shape=(size,))
            sums = content[: 4 * self.images].view(np.uint32)
            kept = content[4 * self.images :].view(np.int16).reshape(self.images, -1)
            self._epoch, self._open = epoch, (kept, sums)
        return self._open

    def _checksums(self, rows: NDArray[np.int16]) -> NDArray[np.uint32]:
        """Computes a checksum per row, which is 1 for a row of zeros."""
        weighted = rows.view(np.uint16) * self._factors
        return weighted.sum(1, dtype=np.uint32) + np.uint32(1)


def _reserve(path: Path, size: int) -> None:
    """Creates a file of zeros if there is none; safe with several processes.

    The space is allocated at once: on a full disk, writing to a memory map kills the process.
    """
    with path.open("ab") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
