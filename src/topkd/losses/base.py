"""What every loss is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from topkd._io.progress import Progress
from topkd.config.recipe import Taps
from topkd.features import Batch, Features, Tapped, Teacher


@dataclass(frozen=True)
class Source:
    """What a loss may ask for beyond a batch, before its student is trained."""

    answers: Callable[[int], Iterator[tuple[Batch, Features]]]
    """Epoch -> the teacher's answers to augmented training images, batch by batch, made lazily."""
    target: Tensor  # (images,), the labels of all training images
    student: Tapped  # a loss that keeps it must not register it: its weights are not the loss's
    teacher: Teacher | None  # None if no loss needs one
    teacher_hash: str  # of its weights
    folder: Path  # where to keep what was learnt
    progress: Progress
    taps: Taps = Taps()  # in place of those of the networks, if the term has its own

    @property
    def images(self) -> int:
        """Number of training images."""
        return len(self.target)


class Loss(nn.Module, ABC):
    """A distance from what a student makes of a batch to what its teacher makes of it."""

    needs_teacher = True
    replaces_classifier = False  # makes sense only where the student has its teacher's classifier
    reads_maps = False  # feature maps or pre-activations, which otherwise are not kept for it

    @classmethod
    def between(cls, student: Features, teacher: Features, source: Source, **options: Any) -> Loss:
        """Builds the loss for one pair of networks.

        This is the one place that reads sizes off features. A class that replaces it names its
        options here, or hands them on to a constructor that takes sizes first.

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

    def begin(self, epoch: int) -> None:  # noqa: B027  (most losses are the same in every epoch)
        """Is told of every epoch, counted from 1, before its first batch."""

    def facts(self) -> dict[str, Any]:
        """Tells what a reader of the results should know of how this loss was made."""
        return {}
