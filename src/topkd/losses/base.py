"""The protocol of losses: options first, networks later."""

from __future__ import annotations

import inspect
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
from topkd.config.terms import Taps, Term, View
from topkd.config.validation import near
from topkd.features import Batch, FeatureExtractor, Features, Teacher

MIN_GRADIENT_SHARE = 0.001  # below this share of the gradient, a term has no measurable effect

Group = Literal["logits", "feature maps", "relations", "classifier", "topology"]


@dataclass(frozen=True)
class LossInfo:
    """Description of a method, from which the registry and the documentation are generated."""

    name: str
    """Name in recipes."""
    group: Group
    compares: str
    """Short description of the compared quantities."""
    paper: str
    url: str
    cost: str
    """Complexity for n samples, d numbers per sample and c classes; adapters, if any."""
    zero: bool = True
    """Whether the loss is 0 for a student that equals its teacher."""
    any_width: bool = True
    """Whether student and teacher may have different numbers of channels."""


@dataclass(frozen=True)
class LossContext:
    """Resources that a loss may use during setup, beyond one batch of features."""

    teacher_batches: Callable[[int], Iterator[tuple[Batch, Features]]]
    """Epoch -> batches of augmented training images with the teacher's features; lazy."""
    target: Tensor
    """Labels of all training images, (images,)."""
    student: FeatureExtractor
    """The student. A loss must not register it as a submodule."""
    teacher: Teacher | None
    """The teacher; None if no loss needs one."""
    teacher_hash: str
    """Hash of the teacher's weights."""
    folder: Path
    """Folder in which fitted networks are stored."""
    progress: Progress
    sample: Tensor
    """Images of the features that the setup receives, (n, 3, h, w)."""
    taps: Taps = Taps()
    """Taps of this term, which override those of the networks."""

    @property
    def images(self) -> int:
        """Number of training images."""
        return len(self.target)


class Loss(nn.Module, ABC):
    """A distillation loss: configured by its constructor, bound to two networks by :meth:`setup`.

    A subclass validates its options in the constructor, so that invalid options are found before
    any work is done. Everything that depends on feature sizes, the training set or pre-training
    belongs in :meth:`setup`.

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
    """Whether the student must use its teacher's classifier."""
    reads_maps: ClassVar[bool] = False
    """Whether the loss reads feature maps or pre-activations; otherwise they are discarded."""
    reads_distilled: ClassVar[bool] = False
    """Whether the loss reads the logits of a distillation head."""

    def __new__(cls, *args: Any, **options: Any) -> Loss:
        loss = super().__new__(cls)
        loss.__dict__["_options"] = _named(cls.__init__, args, options)
        return loss

    _options: dict[str, Any]

    @property
    def options(self) -> Mapping[str, Any]:
        """The options that were given to the constructor, by name."""
        return MappingProxyType(self._options)

    def setup(  # noqa: B027  (most losses need no setup)
        self, student: Features, teacher: Features, context: LossContext
    ) -> None:
        """Creates everything that depends on the networks: adapters, statistics, fitted networks.

        It is called once, before training, with features of the same batch.

        Args:
            student: Features of the student.
            teacher: Features of the teacher.
            context: Training data, networks and the folder for fitted networks.

        Raises:
            ValueError: If the loss cannot compare these networks.
        """

    @abstractmethod
    def forward(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Computes the loss, a scalar: the mean over the batch.

        Args:
            student: Features of the student.
            teacher: Features of the teacher, without gradient.
            batch: The batch from which both were computed.
        """

    def on_epoch_start(self, epoch: int) -> None:  # noqa: B027  (most losses ignore it)
        """Runs before the first batch of each epoch; epochs are counted from 1."""

    def metadata(self) -> dict[str, Any]:
        """Returns facts for the result file: fitted parameters, fidelity, number of negatives."""
        return {}

    def term(self, **settings: Any) -> LossTerm:
        """Creates a term of a training objective from this loss.

        Args:
            settings: ``weight`` or ``share``, ``start``, ``stop``, ``warmup``, ``decay``,
                ``label``, ``batch`` and ``taps``, as in a recipe.

        Raises:
            ValueError: If a setting is unknown or invalid, or the loss has an option of that name.

        Examples:
            >>> from topkd.losses import TopKD
            >>> TopKD().term(share=0.1, start=3).settings.share
            0.1
        """
        known = Term.model_fields.keys() - {"name"}
        for setting in settings.keys() - known:
            raise ValueError(f"a term has no {setting!r}{near(setting, sorted(known))}")
        for option in self.options.keys() & Term.model_fields.keys():
            raise ValueError(
                f"{type(self).__name__}: the option {option!r} has the name of a setting of terms; "
                "rename it"
            )
        name = self.info.name if hasattr(self, "info") else type(self).__name__.lower()
        return LossTerm(Term(name=name, **settings, **self.options), self)

    def __rmul__(self, weight: float) -> LossTerm:
        """Weights the loss: ``2 * KD(temperature=4.0)``."""
        return self.term(weight=float(weight))


def _named(
    function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """Returns positional and keyword arguments of a method by name."""
    signature = inspect.signature(function)
    try:
        bound = signature.bind_partial(None, *args, **options).arguments
    except TypeError:  # which the constructor raises as well
        return options
    names = list(bound)[1:]  # without self
    kinds = {name: signature.parameters[name].kind for name in names}
    named = {name: bound[name] for name in names if kinds[name] != inspect.Parameter.VAR_KEYWORD}
    others = [bound[name] for name in names if kinds[name] == inspect.Parameter.VAR_KEYWORD]
    return named | (others[0] if others else {})


@dataclass(frozen=True)
class LossTerm:
    """A term of a training objective: a loss with its weight or share, schedule and taps.

    Examples:
        >>> from topkd.losses import KD
        >>> term = 2 * KD(temperature=4.0)
        >>> term.title, term.settings.weight, term.is_active(1, epochs=20)
        ('kd', 2.0, True)
    """

    settings: Term
    loss: Loss

    @property
    def title(self) -> str:
        """Name of the term in results and messages."""
        return self.settings.title

    def is_active(self, epoch: int, epochs: int) -> bool:
        """Whether the term has a positive weight in an epoch, given the total number of epochs."""
        return self.settings.schedule(epoch, epochs) > 0

    @property
    def bypasses_embedding(self) -> bool:
        """Whether the term reads features of the student other than its embedding and logits."""
        reads_others = self.loss.reads_maps or self.loss.reads_distilled
        return reads_others or self.settings.taps.student != View()

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Binds the loss to two networks, see :meth:`Loss.setup`.

        Raises:
            ValueError: If the loss cannot compare these networks; the message names the term.
        """
        taps = self.settings.taps
        context = replace(context, taps=taps)
        if taps.teacher != View():  # networks fitted to the teacher depend on its taps
            context = _with_view(context, taps.teacher)
        with naming_term(self.title):
            self.loss.setup(select(student, taps.student), select(teacher, taps.teacher), context)

    def on_epoch_start(self, epoch: int) -> None:
        """Forwards the start of an epoch to the loss.

        Raises:
            ValueError: If the loss cannot continue; the message names the term.
        """
        with naming_term(self.title):
            self.loss.on_epoch_start(epoch)

    def value(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """Computes the unweighted loss from the features that the term's taps select.

        Raises:
            ValueError: If the loss cannot be computed; the message names the term.
        """
        taps, layout = self.settings.taps, memory_format(self.loss)
        with naming_term(self.title):
            features = [select(student, taps.student), select(teacher, taps.teacher)]
            if layout is not torch.channels_last:  # else its convolutions accept any layout
                features = [each.apply(lambda t: formatted(t, layout)) for each in features]
            value: Tensor = self.loss(*features, batch)
        return value


def located(title: str) -> str:
    """Returns the name of a term as a path in a recipe."""
    return f"losses.{title}"


@contextmanager
def naming_term(title: str) -> Iterator[None]:
    """Adds the name of the term to error messages of its loss.

    Raises:
        ValueError: If the body raises one.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{located(title)}: {error}") from error


def select(features: Features, view: View) -> Features:
    """Selects the features that a term reads from one network.

    A feature map used as an embedding is average-pooled per channel.

    Args:
        features: All features of the network.
        view: Taps of the term; None in a field selects the network's default.

    Raises:
        ValueError: If a tap for maps reads a tensor that is not (n, c, h, w).
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
        raise ValueError(f"the tap {tap!r} reads {tuple(read.shape)}, which is not a map")
    return read


def _with_view(context: LossContext, view: View) -> LossContext:
    """Returns a context in which the teacher is read through the taps of a term."""
    described = context.teacher_hash + view.model_dump_json()
    return replace(
        context,
        teacher_batches=lambda epoch: (
            (batch, select(features, view)) for batch, features in context.teacher_batches(epoch)
        ),
        teacher_hash=files.sha256(described.encode()),
    )


def needed_taps(view: View) -> tuple[str, ...]:
    """Lists the taps of a view, beyond the defaults of the network."""
    embedding = [view.embedding] if view.embedding else []
    return (*(view.maps or ()), *(view.preactivations or ()), *embedding)
