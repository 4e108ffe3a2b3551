"""Losses between persistence diagrams, which do not see which image is which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from topkd.features import Batch, FeatureExtractor, Features
from topkd.losses._validation import at_least_one, check_floats, one_of, positive
from topkd.losses.base import LossContext, LossInfo
from topkd.losses.controls import Edges, PermutationInvariant, Target, check_tree, tree_diagram
from topkd.losses.relations import directions
from topkd.topology import Diagrams, length_scale, rips, wasserstein
from topkd.topology.scaling import TreeScale, normalized

Form = Literal["pce", "em-pce"]
Norm = Literal["maximum", "euclidean"]

CALIBRATED_ON = 8  # batches


class Wasserstein(PermutationInvariant):
    r"""The :func:`~topkd.topology.wasserstein` distance between the diagrams of both embeddings.

    .. math:: W_p\big(D(f^s), D(f^t)\big)

    In dimension 0 it compares the sorted lengths of both spanning trees one by one, in dimension 1
    it matches loops with loops or with the diagonal. It is a sum over bars, and grows with their
    number. The gradient reaches the points that carry a bar.

    Args:
        dimension: 0 for clusters, 1 for loops.
        order: The exponent p, at least 1.
        ground_norm: By which norm two bars are apart; in sorted lengths they are the same.
        diagonal: Whether bars of dimension 0 may be matched with the diagonal, too.
        scale: Scale of lengths: a statistic of the edges of the minimum spanning tree, see
            :mod:`topkd.topology.scaling`. Defaults to their mean.
        edges: ``random`` for a random tree, see :mod:`topkd.losses.controls`.
        target: ``other`` for the teacher's answers to other images, ``mean`` for the means of the
            teacher's sorted lengths, see there.

    Raises:
        ValueError: If the order is below 1, or the control is none of this loss.

    References:
        Geometry Helps to Compare Persistence Diagrams (Kerber, Morozov & Nigmetov, 2017)
        https://arxiv.org/abs/1606.03357

    Examples:
        >>> cloud = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        >>> teacher, student = Features(cloud, cloud), Features(cloud, 3 * cloud.flip(0))
        >>> batch = Batch(torch.zeros(64, 3, 8, 8), torch.zeros(64).long(), torch.arange(64))
        >>> Wasserstein()(student, teacher, batch).item() < 1e-4  # neither scale nor order count
        True
    """

    info = LossInfo(
        name="wasserstein",
        group="topology",
        compares="persistence of the embeddings, bar by bar",
        paper="Kerber et al. 2017",
        url="https://arxiv.org/abs/1606.03357",
        cost="n² d",
    )

    def __init__(
        self,
        *,
        dimension: Literal[0, 1] = 0,
        order: float = 1.0,
        ground_norm: Norm = "maximum",
        diagonal: bool = False,
        scale: TreeScale = "tree_mean",
        edges: Edges = "persistent",
        target: Target = "own",
    ) -> None:
        super().__init__(edges, target)
        check_tree(edges, dimension)
        if dimension == 1 and target == "mean":
            raise ValueError(
                "target: mean needs equally many bars in all clouds, loops are now more, now fewer;"
                " use other"
            )
        one_of("dimension", dimension, Literal[0, 1])
        one_of("scale", scale, TreeScale)
        at_least_one("order", order, finite=False)
        self.dimension, self.order, self.diagonal, self.scale = dimension, order, diagonal, scale
        one_of("ground_norm", ground_norm, Norm)
        self.ground_norm = math.inf if ground_norm == "maximum" else 2.0

    def described(self, points: Tensor, tree: Tensor | None) -> Tensor:
        """Scaled births and deaths, (bars, 2)."""
        if tree is None:
            diagrams = rips(points, max_dim=self.dimension)
        else:
            diagrams = tree_diagram(points, tree)
        scale = length_scale(diagrams.of(0), self.scale)
        return normalized(diagrams.of(self.dimension), scale).bars

    def compared(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = (Diagrams._of_bars(bars, self.dimension) for bars in (student, teacher))
        return wasserstein(
            ours,
            theirs,
            order=self.order,
            ground_norm=self.ground_norm,
            diagonal=self.diagonal,
        )


def persistent_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    bandwidth: float | Tensor,
    tolerance: float | Tensor,
    form: Form = "pce",
) -> Tensor:
    r"""Compares how densely lifetimes lie around each of the teacher's.

    .. math::
        A_u(D) = \sum_{v \in D} e^{-(u - v)^2 / 2 \eta^2} \frac{v}{1 + v}, \qquad
        \Delta(u) = A_u(D_S) - A_u(D_T), \qquad \pi(u) = u \Big/ \sum_{t \in D_T} t

    .. math::
        \mathrm{PCE} = \frac{1}{2 \tau^2} \sum_{u \in D_T} \pi(u)\, \Delta(u)^2, \qquad
        \mathrm{EM\text{-}PCE} = \mathrm{PCE}
        + \log \sum_{u \in D_T} \pi(u)\, e^{-\Delta(u)^2 / 2 \tau^2}

    The first is the divergence of :math:`\pi` from :math:`\pi e^{-\Delta^2 / 2 \tau^2}`; the second
    is that from the same made to sum to 1, and does not see a difference that is the same
    everywhere. The teacher is the reference: what the student has far from all of its lifetimes
    counts nothing. Where these are 0, all count alike.

    Args:
        student: Lifetimes :math:`D_S`, (bars).
        teacher: Lifetimes :math:`D_T`, (bars), at least one.
        bandwidth: :math:`\eta`, how near lifetimes are one.
        tolerance: :math:`\tau`, how great a difference is one.
        form: Which of both.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If these are no lifetimes, or bandwidth or tolerance is not positive.

    References:
        Persistent Cross Entropy (Yeom & Jung, manuscript 2026, not public), which starts from
        Do Topological Characteristics Help in Knowledge Distillation? (Kim et al., ICML 2024)
        https://proceedings.mlr.press/v235/kim24aj.html

    Examples:
        >>> one, two = torch.tensor([1.0]), torch.tensor([1.0, 1.0])
        >>> persistent_cross_entropy(two, one, bandwidth=0.1, tolerance=1.0)  # (1 - 1/2)² / 2
        tensor(0.1250)
    """
    check_floats("lifetimes", teacher, "(bars)", " of the teacher")
    if student.ndim != 1 or not student.is_floating_point():
        check_floats("lifetimes", student, "(bars)", " of the student")
    positive("bandwidth", bandwidth)
    positive("tolerance", tolerance)
    one_of("form", form, Form)
    dtype = student.dtype
    if student.device.type != "mps":  # EM-PCE is a small difference
        student, teacher = student.double(), teacher.double()
    total = teacher.sum()
    share = (teacher / total.where(total > 0, 1)).where(total > 0, 1 / len(teacher))
    gaussian_nll = 0.5 * (_gaps(student, teacher, bandwidth) / tolerance).square()
    plain = (share * gaussian_nll).sum()
    whole = plain if form == "pce" else plain + torch.logsumexp(share.log() - gaussian_nll, 0)
    return whole.to(dtype)


def calibrated(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    r"""Chooses bandwidth and tolerance of :func:`persistent_cross_entropy`.

    The bandwidth is the median over batches of the median difference, where there is one, between
    two of the teacher's lifetimes. The tolerance is the median of all :math:`|\Delta(u)| > 0`; 1 if
    there is none.

    Args:
        pairs: Lifetimes of the student and of the teacher, of each batch.

    Raises:
        ValueError: If no two lifetimes of the teacher differ.
    """
    pairs = [(student.double(), teacher.double()) for student, teacher in pairs]
    apart = [torch.nn.functional.pdist(teacher[:, None]) for _, teacher in pairs]
    medians = [_median(gaps[gaps > 0]) for gaps in apart if (gaps > 0).any()]
    if not medians:
        raise ValueError(
            "no two lifetimes of the teacher's clouds differ, so that there is no bandwidth; "
            "give bandwidth and tolerance"
        )
    bandwidth = float(np.median(medians))
    gaps = torch.cat([_gaps(*pair, bandwidth).abs() for pair in pairs])
    return bandwidth, _median(gaps[gaps > 0]) if (gaps > 0).any() else 1.0


def _gaps(student: Tensor, teacher: Tensor, bandwidth: float | Tensor) -> Tensor:
    """How much more of the student's lifetimes lies around each of the teacher's."""

    def density(lifetimes: Tensor) -> Tensor:
        near = (-0.5 * ((teacher[:, None] - lifetimes) / bandwidth).square()).exp()
        return (near * (lifetimes / (1 + lifetimes))).sum(1)

    return density(student) - density(teacher)


def _median(values: Tensor) -> float:
    return float(np.median(values.numpy()))


class PCE(PermutationInvariant):
    """:func:`persistent_cross_entropy` of the lifetimes of dimension 0 of directions.

    Embeddings are scaled to length 1; their lifetimes are the lengths of the spanning tree. Unless
    told, bandwidth and tolerance are :func:`calibrated` once, before training, on 8 batches of the
    teacher's answers and of what the student, in eval mode, makes of the same images. They are
    buffers, so that a run that goes on keeps them.

    The authors weigh EM-PCE by 5. PCE they weigh anew in every step, so that its gradient is as
    long as that of five times TopKD's; ``share`` in a recipe comes closest.

    Args:
        bandwidth: How near lifetimes are one.
        tolerance: How great a difference is one.
        form: ``pce`` or ``em-pce``.
        edges: ``random`` for a random tree, see :mod:`topkd.losses.controls`.
        target: ``other`` for the teacher's answers to other images, ``mean`` for the means of the
            teacher's sorted lifetimes, see there.

    Raises:
        ValueError: If bandwidth or tolerance is not positive, or the target is no control.

    References:
        Persistent Cross Entropy (Yeom & Jung, manuscript 2026, not public), which starts from
        Do Topological Characteristics Help in Knowledge Distillation? (Kim et al., ICML 2024)
        https://proceedings.mlr.press/v235/kim24aj.html
    """

    info = LossInfo(
        name="pce",
        group="topology",
        compares="how densely lifetimes of the embeddings lie",
        paper="Yeom & Jung, manuscript 2026",
        url="https://proceedings.mlr.press/v235/kim24aj.html",
        cost="n² d",
    )

    bandwidth: Tensor
    tolerance: Tensor

    def __init__(
        self,
        *,
        bandwidth: float | None = None,
        tolerance: float | None = None,
        form: Form = "pce",
        edges: Edges = "persistent",
        target: Target = "own",
    ) -> None:
        super().__init__(edges, target)
        if (bandwidth is None) != (tolerance is None):
            raise ValueError("give bandwidth and tolerance, or neither to have both calibrated")
        self.is_calibrated = bandwidth is None
        for name, value in {"bandwidth": bandwidth, "tolerance": tolerance}.items():
            given = 1.0 if value is None else positive(name, float(value))
            self.register_buffer(name, torch.tensor(given))
        self.form: Form = one_of("form", form, Form)

    def setup(self, student: Features, teacher: Features, context: LossContext) -> None:
        """Calibrates bandwidth and tolerance, where they are not given.

        Raises:
            ValueError: If they cannot be found.
        """
        if self.is_calibrated:
            self._calibrate(context)
        super().setup(student, teacher, context)

    def _calibrate(self, context: LossContext) -> None:
        pairs = []
        for shown, answer in islice(context.teacher_batches(0), CALIBRATED_ON):
            made, tree = _in_eval_mode(context.student, shown), self.tree(shown)
            ours, theirs = made.embedding.cpu(), answer.embedding.cpu()
            pairs.append((self.described(ours, tree), self.described(theirs, tree)))
        bandwidth, tolerance = calibrated(pairs)
        self.bandwidth.fill_(bandwidth)
        self.tolerance.fill_(tolerance)

    def described(self, points: Tensor, tree: Tensor | None) -> Tensor:
        """Lifetimes of the directions of points, (n - 1)."""
        points = directions(points)
        return (rips(points) if tree is None else tree_diagram(points, tree)).deaths

    def compared(self, student: Tensor, teacher: Tensor) -> Tensor:
        return persistent_cross_entropy(
            student,
            teacher,
            bandwidth=self.bandwidth,
            tolerance=self.tolerance,
            form=self.form,
        )

    def metadata(self) -> dict[str, Any]:
        """Returns bandwidth and tolerance."""
        return {"bandwidth": self.bandwidth.item(), "tolerance": self.tolerance.item()}


@torch.no_grad()
def _in_eval_mode(student: FeatureExtractor, batch: Batch) -> Features:
    was, weight = student.training, next(student.parameters())
    try:
        return student.eval()(batch.images.to(weight))
    finally:
        student.train(was)
