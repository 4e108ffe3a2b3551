"""The protocol of losses: options are given first, networks later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from topkd._io import files
from topkd._io.progress import Progress
from topkd._runtime.memory_format import formatted, memory_format
from topkd.config.recipe import Taps, Term, View
from topkd.features import Batch, FeatureExtractor, Features, Teacher

MIN_GRADIENT_SHARE = 0.001  # below this share of the gradient, a term has no measurable effect

Group = Literal["logits", "feature maps", "relations", "classifier", "topology"]


@dataclass(frozen=True)
class LossInfo:
    """Description of a method, from which the registry and the documentation are made."""

    name: str
    """Name in recipes."""
    group: Group
    compares: str
    """What is compared, in a few words."""
    paper: str
    url: str
    cost: str
    """Growth of the work with n samples, d numbers of each and c classes; adapters, if any."""
    zero: bool = True
    """Whether the loss is 0 for a student that equals its teacher."""
    any_width: bool = True
    """Whether student and teacher may differ in their numbers of channels."""


@dataclass(frozen=True)
class LossContext:
    """What a loss may use during setup, beyond one batch of features."""

    teacher_batches: Callable[[int], Iterator[tuple[Batch, Features]]]
    """Epoch -> augmented training images with the teacher's features, computed lazily."""
    target: Tensor
    """Labels of all training images, (images,)."""
    student: FeatureExtractor
    """The student. A loss must not register it: its weights are not the loss's own."""
    teacher: Teacher | None
    """The teacher; None if no loss needs one."""
    teacher_hash: str
    """Hash of the teacher's weights."""
    folder: Path
    """Where fitted networks are stored."""
    progress: Progress
    taps: Taps = Taps()
    """Taps of this term, in place of those of the networks."""

    @property
    def images(self) -> int:
        """Number of training images."""
        return len(self.target)


class Loss(nn.Module, ABC):
    """A distillation loss: configured by its constructor, bound to two networks by :meth:`setup`.

    A subclass validates its options in the constructor, so that every invalid option is found
    before any work is done. Whatever depends on sizes of features, on the training set or on
    pre-training belongs into :meth:`setup`.

    Examples:
        >>> class Mean(Loss):
        ...     def forward(self, student, teacher, batch):
        ...         return (student.logits.mean() - teacher.logits.mean()).square()
        >>> features = Features(torch.ones(2, 3), torch.ones(2, 4))
        >>> (0.5 * Mean()).value(features, features, batch=None)
        tensor(0.)
    """

    info: ClassVar[LossInfo]
    needs_teacher: ClassVar[bool] = True
    replaces_classifier: ClassVar[bool] = False
    """Whether the student must have its teacher's classifier."""
    reads_maps: ClassVar[bool] = False
    """Whether feature maps or pre-activations are read, which otherwise are not kept."""
    options: Mapping[str, Any]
    """The options that were given to the constructor."""

    def __new__(cls, *args: Any, **options: Any) -> Loss:
        loss = super().__new__(cls)
        loss.__dict__["options"] = MappingProxyType(options)
        return loss

    def setup(  # noqa: B027  (most losses need no setup)
        self, student: Features, teacher: Features, context: LossContext
    ) -> None:
        """Creates what depends on the networks: adapters, statistics, fitted networks.

        It is called once, before training, with features of the same batch.

        Raises:
            ValueError: If the loss cannot compare these networks.
        """

    @abstractmethod
    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Computes the loss, a scalar: the mean over the batch."""

    def on_epoch_start(self, epoch: int) -> None:  # noqa: B027  (most losses ignore it)
        """Is called with the number of each epoch, counted from 1, before its first batch."""

    def metadata(self) -> dict[str, Any]:
        """Returns facts for the result: fitted parameters, fidelity, number of negatives."""
        return {}

    def term(self, **settings: Any) -> LossTerm:
        """Makes a term of a training objective from this loss.

        Args:
            settings: ``weight`` or ``share``, ``start``, ``stop``, ``warmup``, ``decay``,
                ``label``, ``batch`` and ``taps``, as in a recipe.

        Raises:
            ValueError: If a setting is unknown or invalid.

        Examples:
            >>> from topkd.losses import TopKD
            >>> TopKD().term(share=0.1, start=3).settings.share
            0.1
        """
        name = self.info.name if hasattr(self, "info") else type(self).__name__.lower()
        return LossTerm(Term(name=name, **settings, **self.options), self)

    def __rmul__(self, weight: float) -> LossTerm:
        """Weights the loss: ``2 * KD(temperature=4.0)``."""
        return self.term(weight=float(weight))


@dataclass(frozen=True)
class LossTerm:
    """A term of a training objective: a loss, its weight or share, its schedule and its taps."""

    settings: Term
    loss: Loss

    @property
    def title(self) -> str:
        """Name of the term in results and messages."""
        return self.settings.title

    def is_active(self, epoch: int, epochs: int) -> bool:
        """Whether the term counts in an epoch, of so many."""
        return self.settings.schedule(epoch, epochs) > 0

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Binds the loss to two networks, see :meth:`Loss.setup`.

        Raises:
            ValueError: If the loss cannot compare these networks; the message names the term.
        """
        taps = self.settings.taps
        context = replace(context, taps=taps)
        if taps.teacher != View():  # what is fitted to the teacher depends on where it is read
            context = _seen_through(context, taps.teacher)
        with blamed(self.title):
            self.loss.setup(select(student, taps.student), select(teacher, taps.teacher), context)

    def on_epoch_start(self, epoch: int) -> None:
        """Calls the loss at the start of an epoch.

        Raises:
            ValueError: If the loss cannot go on; the message names the term.
        """
        with blamed(self.title):
            self.loss.on_epoch_start(epoch)

    def value(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Computes the loss at weight 1, from the features that the term's taps select.

        Raises:
            ValueError: If the loss cannot be computed; the message names the term.
        """
        taps, layout = self.settings.taps, memory_format(self.loss)
        with blamed(self.title):
            features = [select(student, taps.student), select(teacher, taps.teacher)]
            if layout is not torch.channels_last:  # else its convolutions take maps as they come
                features = [each.apply(lambda t: formatted(t, layout)) for each in features]
            value: Tensor = self.loss(*features, batch)
        return value


def located(title: str) -> str:
    """Names a term as recipes do."""
    return f"losses.{title}"


@contextmanager
def blamed(title: str) -> Iterator[None]:
    """Names the term in the errors of its loss, which does not know what it is called.

    Raises:
        ValueError: If one is raised inside.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{located(title)}: {error}") from error


def select(features: Features, view: View) -> Features:
    """Selects the features that a term reads from one network.

    Raises:
        ValueError: If a tap that stands for maps did not read one.
    """
    maps, before, embedding = features.maps, features.preactivations, features.embedding
    if view.maps is not None:
        maps = [_map(features, tap) for tap in view.maps]
    if view.preactivations is not None:
        before = [_map(features, tap) for tap in view.preactivations]
    if view.embedding is not None:
        embedding = features.others[view.embedding]
        embedding = embedding.mean((2, 3)) if embedding.ndim == 4 else embedding.flatten(1)
    return replace(features, maps=maps, preactivations=before, embedding=embedding)


def _map(features: Features, tap: str) -> Tensor:
    read = features.others[tap]
    if read.ndim != 4:
        raise ValueError(f"the tap {tap!r} reads {tuple(read.shape)}, which is no map")
    return read


def _seen_through(context: LossContext, view: View) -> LossContext:
    """A context whose teacher is read through the taps of a term."""
    described = context.teacher_hash + view.model_dump_json()
    return replace(
        context,
        teacher_batches=lambda epoch: (
            (batch, select(answer, view)) for batch, answer in context.teacher_batches(epoch)
        ),
        teacher_hash=files.sha256(described.encode()),
    )


def needed_taps(view: View) -> tuple[str, ...]:
    """Lists the taps of a view, beyond those that all terms read."""
    embedding = [view.embedding] if view.embedding else []
    return (*(view.maps or ()), *(view.preactivations or ()), *embedding)
