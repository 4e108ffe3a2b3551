"""Losses between persistence diagrams, invariant to permutations of the images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from topkd.features import Batch, FeatureExtractor, Features
from topkd.losses._validation import (
    at_least_one,
    check_floats,
    one_of,
    positive,
    refuse_unused,
)
from topkd.losses.base import LossContext, LossInfo
from topkd.losses.controls import Edges, PermutationInvariant, Target, check_tree, tree_diagram
from topkd.losses.relations import directions
from topkd.topology import Diagrams, length_scale, rips, wasserstein
from topkd.topology.scaling import TreeScale, normalized

Form = Literal["pce", "em-pce"]
Norm = Literal["maximum", "euclidean"]

CALIBRATION_BATCHES = 8


class Wasserstein(PermutationInvariant):
    r"""The :func:`~topkd.topology.wasserstein` distance between the diagrams of both embeddings.

    .. math:: W_p\big(D(f^s), D(f^t)\big)

    In dimension 0 it compares the sorted edge lengths of both spanning trees. In dimension 1 it
    matches loops with loops or with the diagonal. The distance is a sum over bars and grows with
    their number. The gradient reaches the points that determine a bar.

    Args:
        dimension: 0 for clusters, 1 for loops.
        order: The exponent p, at least 1.
        ground_norm: Norm of the difference of two bars, in dimension 1 or with ``diagonal``.
        diagonal: Whether bars of dimension 0 may also be matched with the diagonal.
        scale: Scale of lengths: a statistic of the edges of the minimum spanning tree, see
            :mod:`topkd.topology.scaling`. Defaults to their mean.
        edges: ``random`` for a random tree, see :mod:`topkd.losses.controls`.
        target: ``other`` for the teacher's features of other images, ``mean`` for the mean of the
            teacher's sorted lengths, see :mod:`topkd.losses.controls`.

    Raises:
        ValueError: If an option is out of range or has no effect with the others, or the control
            does not apply to this loss.

    References:
        Geometry Helps to Compare Persistence Diagrams (Kerber, Morozov & Nigmetov, 2017)
        https://arxiv.org/abs/1606.03357

    Examples:
        >>> cloud = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        >>> teacher, student = Features(cloud, cloud), Features(cloud, 3 * cloud.flip(0))
        >>> batch = Batch(torch.zeros(64, 3, 8, 8), torch.zeros(64).long(), torch.arange(64))
        >>> Wasserstein()(student, teacher, batch).item() < 1e-4  # invariant to scale and order
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
                "target: mean needs the same number of bars in all clouds, but the number of loops "
                "varies; use other"
            )
        one_of("dimension", dimension, Literal[0, 1])
        one_of("scale", scale, TreeScale)
        at_least_one("order", order, finite=False)
        self.dimension, self.order, self.diagonal, self.scale = dimension, order, diagonal, scale
        one_of("ground_norm", ground_norm, Norm)
        if dimension == 1:
            refuse_unused(self.options, ("diagonal",), "dimension: 1")
        elif not diagonal:
            refuse_unused(self.options, ("ground_norm",), "diagonal: false in dimension 0")
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
    r"""Compares the densities of lifetimes around each lifetime of the teacher.

    .. math::
        A_u(D) = \sum_{v \in D} e^{-(u - v)^2 / 2 \eta^2} \frac{v}{1 + v}, \qquad
        \Delta(u) = A_u(D_S) - A_u(D_T), \qquad \pi(u) = u \Big/ \sum_{t \in D_T} t

    .. math::
        \mathrm{PCE} = \frac{1}{2 \tau^2} \sum_{u \in D_T} \pi(u)\, \Delta(u)^2, \qquad
        \mathrm{EM\text{-}PCE} = \mathrm{PCE}
        + \log \sum_{u \in D_T} \pi(u)\, e^{-\Delta(u)^2 / 2 \tau^2}

    PCE is the divergence of :math:`\pi` from :math:`\pi e^{-\Delta^2 / 2 \tau^2}`; EM-PCE is the
    divergence from the same after normalization to sum 1, and is invariant to a constant
    difference. The teacher is the reference: lifetimes of the student that are far from all of the
    teacher's do not count. If all lifetimes of the teacher are 0, they are weighted equally.

    Args:
        student: Lifetimes :math:`D_S`, (bars).
        teacher: Lifetimes :math:`D_T`, (bars), at least one.
        bandwidth: Kernel bandwidth :math:`\eta`.
        tolerance: Scale :math:`\tau` of the density differences.
        form: "pce" or "em-pce".

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the lifetimes are not floating-point (bars), or an option is out of range.

    References:
        Persistent Cross Entropy (Yeom & Jung 2026)
        https://arxiv.org/abs/2608.24549

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
    if student.device.type != "mps":  # EM-PCE suffers from cancellation in float32
        student, teacher = student.double(), teacher.double()
    total = teacher.sum()
    share = (teacher / total.where(total > 0, 1)).where(total > 0, 1 / len(teacher))
    gaussian_nll = 0.5 * (_density_differences(student, teacher, bandwidth) / tolerance).square()
    value = (share * gaussian_nll).sum()
    if form == "em-pce":
        value = value + torch.logsumexp(share.log() - gaussian_nll, 0)
    return value.to(dtype)


def calibrate(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    r"""Chooses bandwidth and tolerance of :func:`persistent_cross_entropy`.

    The bandwidth is the median over batches of the median nonzero difference between two of the
    teacher's lifetimes. The tolerance is the median of all :math:`|\Delta(u)| > 0`, or 1 if there
    is none.

    Args:
        pairs: Lifetimes of the student and of the teacher for each batch.

    Returns:
        Bandwidth and tolerance.

    Raises:
        ValueError: If no two lifetimes of the teacher differ.
    """
    pairs = [(student.double(), teacher.double()) for student, teacher in pairs]
    apart = [torch.nn.functional.pdist(teacher[:, None]) for _, teacher in pairs]
    medians = [_median(gaps[gaps > 0]) for gaps in apart if (gaps > 0).any()]
    if not medians:
        raise ValueError(
            "no two lifetimes of the teacher's clouds differ, so the bandwidth is undefined; "
            "give bandwidth and tolerance"
        )
    bandwidth = float(np.median(medians))
    gaps = torch.cat([_density_differences(*pair, bandwidth).abs() for pair in pairs])
    return bandwidth, _median(gaps[gaps > 0]) if (gaps > 0).any() else 1.0


def _density_differences(student: Tensor, teacher: Tensor, bandwidth: float | Tensor) -> Tensor:
    """Computes the density of the student's minus that of the teacher's lifetimes, (bars)."""

    def density(lifetimes: Tensor) -> Tensor:
        near = (-0.5 * ((teacher[:, None] - lifetimes) / bandwidth).square()).exp()
        return (near * (lifetimes / (1 + lifetimes))).sum(1)

    return density(student) - density(teacher)


def _median(values: Tensor) -> float:
    return float(np.median(values.numpy()))


class PCE(PermutationInvariant):
    """:func:`persistent_cross_entropy` of the H0 lifetimes of normalized embeddings, PCE.

    Embeddings are scaled to unit length; their lifetimes are the edge lengths of the spanning tree.
    By default, bandwidth and tolerance are calibrated by :func:`calibrate` once before training, on
    8 batches of teacher embeddings and of the student's in eval mode. They are buffers, so a
    resumed run keeps them.

    The authors use weight 5 for EM-PCE. For PCE, they adapt the weight in each step so that the
    norm of its gradient equals that of five times TopKD's; ``share`` in a recipe is the closest
    setting.

    Args:
        bandwidth: Kernel bandwidth. Calibrated by default.
        tolerance: Scale of the density differences. Calibrated by default.
        form: ``pce`` or ``em-pce``.
        edges: ``random`` for a random tree, see :mod:`topkd.losses.controls`.
        target: ``other`` for the teacher's features of other images, ``mean`` for the mean of the
            teacher's sorted lifetimes, see :mod:`topkd.losses.controls`.

    Raises:
        ValueError: If only one of bandwidth and tolerance is given, or an option is out of range.

    References:
        Persistent Cross Entropy (Yeom & Jung 2026)
        https://arxiv.org/abs/2608.24549

    Examples:
        >>> cloud = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
        >>> teacher, student = Features(cloud, cloud), Features(cloud, 3 * cloud.flip(0))
        >>> batch = Batch(torch.zeros(8, 3, 8, 8), torch.zeros(8).long(), torch.arange(8))
        >>> PCE(bandwidth=0.1, tolerance=1.0)(student, teacher, batch).item() < 1e-6
        True
    """

    info = LossInfo(
        name="pce",
        group="topology",
        compares="how densely lifetimes of the embeddings lie",
        paper="Yeom & Jung 2026",
        url="https://arxiv.org/abs/2608.24549",
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
        """Calibrates bandwidth and tolerance unless they are given.

        Raises:
            ValueError: If no two lifetimes of the teacher differ.
        """
        if self.is_calibrated:
            self._calibrate(context)
        super().setup(student, teacher, context)

    def _calibrate(self, context: LossContext) -> None:
        pairs = []
        for batch, features in islice(context.teacher_batches(0), CALIBRATION_BATCHES):
            tree, student = self.tree(batch), _in_eval_mode(context.student, batch)
            clouds = student.embedding.cpu(), features.embedding.cpu()
            pairs.append((self.described(clouds[0], tree), self.described(clouds[1], tree)))
        bandwidth, tolerance = calibrate(pairs)
        self.bandwidth.fill_(bandwidth)
        self.tolerance.fill_(tolerance)

    def described(self, points: Tensor, tree: Tensor | None) -> Tensor:
        """Computes the lifetimes of the normalized points, (n - 1)."""
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
