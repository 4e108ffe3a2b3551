"""A student, its teacher and their losses as one module, for anybody's own training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

from topkd._io.progress import Progress
from topkd.features import Batch, Features, Teacher
from topkd.losses.base import Loss, LossContext, LossTerm, needed_taps
from topkd.models import checkpoint, factory
from topkd.training.objective import GradientBalancer

Sample = Tensor | tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
MEASURED_EVERY = 16  # steps, where a term has a share of the gradient


@dataclass(frozen=True)
class Distilled:
    """Output of a :class:`Distiller`."""

    loss: Tensor
    """Weighted sum of all active terms, a scalar."""
    logits: Tensor
    """The student's logits, (n, classes)."""
    values: dict[str, Tensor]
    """Title of each active term -> its value at weight 1."""
    weights: dict[str, float]
    """Title of each term -> its weight in this step."""


class Distiller(nn.Module):
    r"""Computes distillation losses of a student for images in anybody's training loop.

    .. math:: L = \sum_i w_i(e)\, L_i(f^s, f^t, y)

    with the features f of both networks, the labels y and weights that may depend on the epoch e.
    Parameters are those of the student and of the losses' adapters; the teacher is frozen, in eval
    mode, and not in the state dict.

    Args:
        student: A classifier, any :class:`torch.nn.Module`. :meth:`setup` finds its embedding and
            maps, as :func:`topkd.models.wrap` does; wrap it yourself to choose them.
        teacher: A trained classifier; None if no loss needs one.
        losses: Losses, or terms such as ``2 * KD()`` and ``TopKD().term(share=0.1)``.
        epochs: Length of the training, for terms whose weight decays at its end.

    Raises:
        ValueError: If a loss needs a teacher and there is none, or two terms have the same title.

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
        self.student = student
        self.losses = nn.ModuleList(term.loss for term in self.terms)
        self._teacher = [teacher]  # in a list: not a submodule
        self.epoch, self.epochs = 1, epochs
        self._balancer, self._steps, self._is_bound = GradientBalancer(), 0, False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)
        if self.teacher is not None:  # so that .to() reaches it too
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
            sample: Images as in training, (n, 3, h, w), with labels or without, or an iterable of
                ``(images, labels)`` such as a data loader. Losses that are fitted to the teacher,
                such as RipsNet, need the training set; adapters need one batch.
            labels: Labels of all training images, for losses that keep a memory of them (CRD).
            folder: Where fitted networks are stored, to be reused. Defaults to a temporary folder.

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
            made = student.eval()(images)
            answer = made if teacher is None else teacher(images)
        self.student, self._teacher = student.train(was_training), [teacher]
        context = LossContext(
            lambda epoch: batches.features(teacher, device),
            batches.labels() if labels is None else labels,
            student,
            teacher,
            "" if teacher is None else checkpoint.hash_of(teacher.network.network),
            Path(mkdtemp(prefix="topkd-")) if folder is None else folder,
            Progress(),
        )
        for term in self.terms:
            term.setup(made, answer, context)
        self.losses.to(device)
        self._is_bound = True
        return self

    def on_epoch_start(self, epoch: int) -> None:
        """Tells the terms the number of the epoch, counted from 1, for schedules and memories."""
        self.epoch = epoch
        for term in self.terms:
            term.on_epoch_start(epoch)

    def forward(self, images: Tensor, target: Tensor, index: Tensor | None = None) -> Distilled:
        """Computes the losses of a batch.

        Args:
            images: (n, 3, h, w), as both networks take them.
            target: Labels, (n,).
            index: Numbers of the images in the training set, (n,), for losses that keep a memory.
                Defaults to a running count.

        Raises:
            ValueError: If :meth:`setup` was not called, or a loss cannot be computed.
        """
        if not self._is_bound:
            raise ValueError("call setup(sample) once before the first batch")
        if index is None:
            start = self._steps * len(images)
            index = torch.arange(start, start + len(images), device=images.device)
        made = self.student(images)
        answer = made if self.teacher is None else self.teacher(images)
        batch = Batch(images, target, index)
        values = {
            term.title: term.value(_float(made), _float(answer), batch)
            for term in self.terms
            if term.is_active(self.epoch, self._last_epoch)
        }
        weights = self._weights(values, made)
        self._steps += self.training
        total = torch.stack([weights[title] * value for title, value in values.items()]).sum()
        return Distilled(total, made.logits, values, weights)

    @property
    def _last_epoch(self) -> int:
        return self.epoch if self.epochs is None else self.epochs

    def _weights(self, values: dict[str, Tensor], made: Features) -> dict[str, float]:
        """Weights of all terms; gradients are measured where a term has a share of them."""
        settings = [term.settings for term in self.terms]
        is_shared = any(each.share for each in settings)
        if is_shared and torch.is_grad_enabled() and self._steps % MEASURED_EVERY == 0:
            found = {
                title: torch.autograd.grad(
                    value, made.embedding, retain_graph=True, allow_unused=True
                )[0]
                for title, value in values.items()
            }
            norms = {title: g.norm().item() for title, g in found.items() if g is not None}
            self._balancer.update(norms)
        if not torch.is_grad_enabled():  # nothing may have been measured before an evaluation
            known = self._balancer.norms
            settings = [each for each in settings if not each.share or each.title in known]
            unknown = dict.fromkeys(values, 0.0)
            return unknown | self._balancer.weights(settings, self.epoch, self._last_epoch)
        return self._balancer.weights(settings, self.epoch, self._last_epoch)


def _frozen(network: nn.Module | None, shape: Sequence[int]) -> Teacher | None:
    """Wraps a teacher, which is then in eval mode and without gradients."""
    if network is None or isinstance(network, Teacher):
        return network
    return Teacher(factory.wrap(network, shape=shape))


def _float(features: Features) -> Features:
    """Features in float32 at least, in which losses are computed under autocast too."""
    return features.apply(lambda t: t.float() if t.dtype in (torch.half, torch.bfloat16) else t)


class _Batches:
    """Sample batches for setup, numbered in order."""

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
