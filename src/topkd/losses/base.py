"""What every loss is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from topkd.features import Batch, Features
from topkd.progress import Progress


@dataclass(frozen=True)
class Source:
    """Where a loss learns what it must know of a teacher before any student is trained."""

    answers: Callable[[int], Iterator[tuple[Batch, Features]]]
    """Epoch -> the teacher's answers to augmented training images, batch by batch, made lazily."""
    images: int  # in the training set
    teacher: str  # hash of the teacher's weights
    folder: Path  # where to keep what was learnt
    progress: Progress


class Loss(nn.Module, ABC):
    """A distance from what a student makes of a batch to what its teacher makes of it."""

    needs_teacher = True
    reads_maps = False  # feature maps, which otherwise are not kept for it
    learns = False  # from the teacher: then its options are those of `between`

    @classmethod
    def between(cls, student: Features, teacher: Features, source: Source, **options: Any) -> Loss:
        """Builds the loss for one pair of networks.

        This is the one place that reads sizes off features.

        Args:
            student: What the student makes of some batch.
            teacher: What the teacher makes of it.
            source: Where a loss that must learn from the teacher first can do so.
            options: Of the loss, as a recipe gives them.
        """
        return cls(**options)

    @abstractmethod
    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Computes the loss, a scalar: the mean over the batch."""

    def facts(self) -> dict[str, Any]:
        """Tells what a reader of the results should know of how this loss was made."""
        return {}
