"""A teacher's answers to augmented training images, computed once for many students."""

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
    r"""Keeps logits and embeddings by (epoch, index), in bfloat16.

    What a teacher answers depends on the image as it was augmented, and augmentation is a pure
    function of (seed, epoch, index): a second student that is shown the same finds the answers
    here. Every student learns from the rounded numbers, the first one too, so that it makes no
    difference which of them came first.

    An epoch is a file of :math:`2 (c + d) + 4` bytes an image, for c classes and embeddings of d
    numbers. It is read and written through a memory map: what a run has computed is there even if
    it was stopped. Each image has a checksum: what is missing, half-written or damaged is computed
    again.

    Args:
        folder: Above the folder in which they are kept.
        about: All that the answers depend on: teacher, images, augmentation, precision.
        images: In the training set.
        classes: c.
        width: d.

    Examples:
        >>> from tempfile import mkdtemp
        >>> ask = lambda images: Features(images.mean((2, 3)), images[:, :2, 0, 0])
        >>> answers = TeacherCache(Path(mkdtemp()), {}, images=8, classes=3, width=2)
        >>> batch = Batch(torch.ones(4, 3, 2, 2), torch.zeros(4).long(), torch.arange(4))
        >>> answers(batch, 1, ask).embedding.shape, answers.computed
        (torch.Size([4, 2]), 4)
        >>> answers(batch, 1, ask).embedding.shape, answers.computed
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
        self.computed = 0  # images that the teacher was asked about
        self._epoch = 0
        self._open: tuple[NDArray[np.int16], NDArray[np.uint32]]
        # Odd, so that no flipped bit goes unnoticed.
        self._factors = np.random.default_rng(0).integers(
            2**32, size=classes + width, dtype=np.uint32
        ) | np.uint32(1)

    def __call__(self, batch: Batch, epoch: int, ask: Callable[[Tensor], Features]) -> Features:
        """Finds the answers to a batch; where one is missing, asks about all of it.

        Args:
            batch: Of training images.
            epoch: In which they were augmented.
            ask: The teacher.

        Raises:
            OSError: If there is no space left for an epoch.
        """
        kept, sums = self._of(epoch)
        index = batch.index.cpu().numpy()
        if (self._checksums(kept[index]) != sums[index]).any():
            answer = ask(batch.images)
            both = torch.cat([answer.logits, answer.embedding], 1)
            kept[index] = both.bfloat16().cpu().view(torch.int16).numpy()
            sums[index] = self._checksums(kept[index])
            self.computed += len(index)
        both = torch.from_numpy(kept[index]).view(torch.bfloat16).to(batch.images.device)
        return Features(both[:, : self.classes], both[:, self.classes :])

    def _of(self, epoch: int) -> tuple[NDArray[np.int16], NDArray[np.uint32]]:
        if epoch != self._epoch:
            size = self.images * (4 + 2 * (self.classes + self.width))
            path = self.folder / f"epoch{epoch}.bin"
            _reserve(path, size)
            whole = np.memmap(path, np.uint8, "r+", shape=(size,))
            sums = whole[: 4 * self.images].view(np.uint32)
            kept = whole[4 * self.images :].view(np.int16).reshape(self.images, -1)
            self._epoch, self._open = epoch, (kept, sums)
        return self._open

    def _checksums(self, rows: NDArray[np.int16]) -> NDArray[np.uint32]:
        """Computes a checksum of each row; that of a row of zeros is one."""
        weighted = rows.view(np.uint16) * self._factors
        return weighted.sum(1, dtype=np.uint32) + np.uint32(1)


def _reserve(path: Path, size: int) -> None:
    """Makes a file of zeros where there is none; several processes may do so at once.

    The space is taken at once: a map would end the process where the disk is full later.
    """
    with path.open("ab") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
