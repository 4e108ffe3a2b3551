"""The ``Distiller``: student, teacher and losses as a module for custom training loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

from topkd._io.progress import Progress
from topkd.config.terms import Term
from topkd.features import Batch, Features, Teacher
from topkd.losses.base import Loss, LossContext, LossTerm, naming_term, needed_taps
from topkd.models import checkpoint, factory
from topkd.training.objective import MEASURED_EVERY, GradientBalancer, backbone, measured_at

Sample = Tensor | tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Distilled:
    """Output of a :class:`Distiller`."""

    loss: Tensor
    """Weighted sum of all active terms, a scalar."""
    logits: Tensor
    """The student's logits, (n, classes)."""
    values: dict[str, Tensor]
    """Title of each active term -> unweighted value."""
    weights: dict[str, float]
    """Title of each term -> weight in this step."""


class Distiller(nn.Module):
    r"""Computes the distillation losses of a student in a custom training loop.

    .. math:: L = \sum_i w_i(e)\, L_i(f^s, f^t, y)

    with the features f of both networks, the labels y and weights that may depend on the epoch e.
    The parameters are those of the student and of the adapters. The teacher is frozen, in eval mode
    and excluded from the state dict.

    Args:
        student: A classifier, any :class:`torch.nn.Module`. :meth:`setup` detects its embedding and
            feature maps; use :func:`topkd.models.wrap` to select them.
        teacher: A trained classifier; None if no loss needs one.
        losses: Losses, or terms such as ``2 * KD()`` and ``TopKD().term(share=0.1)``.
        epochs: Total number of epochs, for terms whose weight decays at the end of training, or
            that start or stop at a fraction of the epochs.

    Raises:
        ValueError: If a loss needs a teacher but there is none, two terms have the same title, or
            a term is never active.

    Examples:
        >>> from topkd.losses import CE, KD
        >>> from topkd.models import create
        >>> images, target = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
        >>> student, teacher = (create(name, classes=4) for name in ("resnet8x0.25", "resnet8"))
        >>> distiller = Distiller(student, teacher, [CE(), 2 * KD()]).setup(images)
        >>> out = distiller(images, target)
        >>> out.loss.backward()
        >>> sorted(out.values)
        ['ce', 'kd']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        losses: Sequence[Loss | LossTerm],
        *,
        epochs: int | None = None,
    ) -> None:
        super().__init__()
        self.terms = [each if isinstance(each, LossTerm) else each.term() for each in losses]
        titles = [term.title for term in self.terms]
        doubled = sorted({title for title in titles if titles.count(title) > 1})
        if doubled:
            raise ValueError(f"{', '.join(doubled)} appears twice; give a label to each term")
        needing = [term.title for term in self.terms if term.loss.needs_teacher]
        if teacher is None and needing:
            raise ValueError(f"{', '.join(needing)} cannot be computed without a teacher")
        _check_schedules([term.settings for term in self.terms], epochs)
        self.student = student
        self.losses = nn.ModuleList(term.loss for term in self.terms)
        self._teacher = [teacher]  # in a list, so that it is not a submodule
        self.epoch, self.epochs = 1, epochs
        self._balancer, self._steps, self._is_bound = GradientBalancer(), 0, False
        self._measured_terms: set[str] = set()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)
        if self.teacher is not None:  # .to() also moves the teacher
            self.teacher._apply(fn, recurse)
        return self

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher, which :meth:`setup` freezes."""
        return self._teacher[0]

    def setup(
        self, sample: Sample, *, labels: Tensor | None = None, folder: Path | None = None
    ) -> Distiller:
        """Binds the losses to both networks. Call it once, before the optimizer is created.

        Args:
            sample: A batch of training images (n, 3, h, w), with or without labels, or an iterable
                of ``(images, labels)`` such as a data loader. Losses that are fitted to the
                teacher, such as RipsNet, need the training set; adapters need one batch.
            labels: Labels of all training images, for losses with a memory bank (CRD).
            folder: Folder that stores fitted networks for reuse. Defaults to a temporary one.

        Raises:
            ValueError: If a loss cannot compare these networks; the message names the term.
        """
        batches = _Batches(sample)
        shape, device = batches.first.images.shape[1:], next(self.student.parameters()).device
        student, teacher = factory.wrap(self.student, shape=shape), _frozen(self.teacher, shape)
        for term in self.terms:
            student.also(needed_taps(term.settings.taps.student))
            if teacher is not None:
                teacher.network.also(needed_taps(term.settings.taps.teacher))
        images, was_training = batches.first.images.to(device), student.training
        with torch.no_grad():
            student_output = student.eval()(images)
            teacher_output = student_output if teacher is None else teacher(images)
        self.student, self._teacher = student.train(was_training), [teacher]
        context = LossContext(
            lambda epoch: batches.features(teacher, device),
            batches.labels() if labels is None else labels,
            student,
            teacher,
            "" if teacher is None else checkpoint.hash_of(teacher.network.network),
            Path(mkdtemp(prefix="topkd-")) if folder is None else folder,
            Progress(),
            images,
        )
        for term in self.terms:
            term.setup(student_output, teacher_output, context)
        self.losses.to(device)
        self._is_bound = True
        return self

    def on_epoch_start(self, epoch: int) -> None:
        """Sets the epoch, counted from 1, for schedules and memory banks."""
        self.epoch = epoch
        for term in self.terms:
            term.on_epoch_start(epoch)

    def forward(self, images: Tensor, target: Tensor, index: Tensor | None = None) -> Distilled:
        """Computes the losses of a batch.

        Args:
            images: Input images, (n, 3, h, w).
            target: Labels, (n,).
            index: Indices of the images in the training set, (n,), for losses with a memory bank.
                Defaults to a running count.

        Raises:
            ValueError: If :meth:`setup` was not called, or a loss cannot be computed.
        """
        if not self._is_bound:
            raise ValueError("call setup(sample) once before the first batch")
        if index is None:
            start = self._steps * len(images)
            index = torch.arange(start, start + len(images), device=images.device)
        student_output = self.student(images)
        teacher_output = student_output if self.teacher is None else self.teacher(images)
        batch = Batch(images, target, index)
        values = {
            term.title: term.value(_float(student_output), _float(teacher_output), batch)
            for term in self.terms
            if term.is_active(self.epoch, self._last_epoch)
        }
        weights = self._weights(values, student_output)
        self._steps += self.training
        total = torch.stack([weights[title] * value for title, value in values.items()]).sum()
        return Distilled(total, student_output.logits, values, weights)

    @property
    def _last_epoch(self) -> int:
        return self.epoch if self.epochs is None else self.epochs

    def _weights(self, values: dict[str, Tensor], student_output: Features) -> dict[str, float]:
        """Returns the weights of all terms; measures gradients if a term has a share."""
        settings = [term.settings for term in self.terms]
        if any(each.share for each in settings) and torch.is_grad_enabled():
            self._measure(values, student_output)
        if not torch.is_grad_enabled():  # gradients may not have been measured yet
            known = self._balancer.norms
            settings = [each for each in settings if not each.share or each.title in known]
            unknown = dict.fromkeys(values, 0.0)
            return unknown | self._balancer.weights(settings, self.epoch, self._last_epoch)
        return self._balancer.weights(settings, self.epoch, self._last_epoch)

    def _measure(self, values: dict[str, Tensor], student_output: Features) -> None:
        """Measures the gradient norms of the terms at some steps, and when a term starts."""
        place = measured_at(self.terms, self.epoch, self._last_epoch)
        every = MEASURED_EVERY[place]
        is_known = values.keys() <= self._measured_terms and place == self._balancer.at
        if self._steps % every and is_known:
            return
        embedding, norms = student_output.embedding, {}
        places = [embedding] if place == "embedding" else backbone(self.student, embedding)
        for title, value in values.items() if places else ():
            found = torch.autograd.grad(value, places, retain_graph=True, allow_unused=True)
            reached = [gradient.norm() for gradient in found if gradient is not None]
            if reached:
                norms[title] = math.hypot(*torch.stack(reached).tolist())
        self._balancer.update(norms, place, times=every / MEASURED_EVERY["embedding"])
        self._measured_terms = set(values)


def _check_schedules(terms: Sequence[Term], epochs: int | None) -> None:
    for term in terms:
        with naming_term(term.title):
            if epochs is not None:
                term.check_schedule(epochs)
            elif term.start < 1 or (term.stop or 1) < 1:
                raise ValueError("start or stop is a fraction of the epochs; set epochs")


def _frozen(network: nn.Module | None, shape: Sequence[int]) -> Teacher | None:
    """Wraps a network as a frozen teacher."""
    if network is None or isinstance(network, Teacher):
        return network
    return Teacher(factory.wrap(network, shape=shape))


def _float(features: Features) -> Features:
    """Converts half-precision features to float32, the precision of the losses under autocast."""
    return features.apply(lambda t: t.float() if t.dtype in (torch.half, torch.bfloat16) else t)


class _Batches:
    """Sample batches for setup, with consecutive indices."""

    def __init__(self, sample: Sample) -> None:
        if isinstance(sample, Tensor):
            self._sample: Callable[[], Iterable[Any]] = lambda: [(sample, None)]
        elif isinstance(sample, tuple):
            self._sample = lambda: [sample]
        else:
            self._sample = lambda: sample
        first = next(iter(self), None)
        if first is None:
            raise ValueError("the sample holds no batch")
        self.first: Batch = first

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for images, target, *_ in self._sample():
            count = len(images)
            labels = torch.zeros(count, dtype=torch.long) if target is None else target
            yield Batch(images, labels.cpu(), torch.arange(start, start + count))
            start += count

    def labels(self) -> Tensor:
        return torch.cat([batch.target for batch in self])

    def features(
        self, teacher: Teacher | None, device: torch.device
    ) -> Iterator[tuple[Batch, Features]]:
        assert teacher is not None
        for batch in self:
            yield batch, teacher(batch.images.to(device)).apply(lambda t: t.float().cpu())
