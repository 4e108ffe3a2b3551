"""Comparisons of two clouds that know which point of one is which point of the other.

The losses on diagrams do not see it when the points of a cloud change places; these do. Point i of
the student and point i of the teacher are the same image, so that an edge (i, j) has a length in
both clouds, whatever their widths. Which edges matter is found on detached points; their lengths
are then read off both clouds, so that gradients need memory for these edges alone.

Widths and scales of two networks differ, so lengths are divided by a unit of each cloud's own:

===================  ==============================================================================
unit                 is
===================  ==============================================================================
``none``             1, lengths as they are
``mean``             the mean distance; its gradient is spread over all points
``median``           the median distance
``quantile``         the 0.9-quantile of the distances
``matrix_quantile``  the 0.9-quantile of the distance matrix, diagonal and both triangles included
``max``              the greatest distance
===================  ==============================================================================

Always over all pairs of different points, never over the tree alone, whose edges are the shortest
of all and shorter the more points there are. A unit of 0, where points coincide, counts as 1.

The gradient passes through the unit, and so it never changes the scale, on which the loss does not
depend. That of a median, quantile or maximum falls on the one or two pairs that attain it, which
then move much more than all others; that of a mean falls on all points. ``detach_unit=True`` takes
units for constants instead. Then the gradient also pulls at the scale of the features, mostly
towards 0, and does so without end, since the loss stays the same.

All units but ``none`` take O(n² d) time and room for n² distances, for a moment; the graph keeps
none of them. Nothing else is detached but what is said to be: gradients reach the teacher where it
requires them, so it is usually given detached, or computed without gradients.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from topkd.topology import _ultrametric
from topkd.topology.rips import edge_lengths, rips

Unit = Literal["none", "mean", "median", "quantile", "matrix_quantile", "max"]
Edges = Literal["tree", "random"]

LEVELS: dict[Unit, float] = {"median": 0.5, "quantile": 0.9, "matrix_quantile": 0.9, "max": 1.0}


def edge_matching(
    student: Tensor,
    teacher: Tensor,
    *,
    unit: Unit = "mean",
    teacher_unit: Unit | None = None,
    detach_unit: bool = False,
    symmetric: bool = True,
    edges: Edges = "tree",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Compares the lengths of the edges of both spanning trees, edge by edge.

    .. math:: \frac{1}{2n} \sum_{e \in E_T} (D_S[e] - D_T[e])^2
        + \frac{1}{2n} \sum_{e \in E_S} (D_S[e] - D_T[e])^2

    with the edges :math:`E` of the minimum spanning trees and lengths :math:`D` in units of their
    cloud. It costs O(n² d) time a cloud, and memory for 4 n lengths.

    The released code of the paper divides the input's lengths by their maximum and those of the
    latent space by a learnt scalar, and has no ½: ``edge_matching(latent / scalar, input,
    unit="none", teacher_unit="max")``, twice.

    Args:
        student: Points :math:`S`, (n, d) or (clouds, n, d).
        teacher: Points :math:`T`, as many; their width may differ.
        unit: What lengths are divided by, see :mod:`topkd.topology.labelled`.
        teacher_unit: The teacher's, if it is another.
        detach_unit: Whether units count as constants.
        symmetric: Whether the second sum is there, over the edges of the student's tree.
        edges: ``random`` is the control: each sum is then over n - 1 pairs of different points,
            drawn uniformly and with replacement, instead of a tree.
        generator: What draws them; the global one of torch, if not told.

    Returns:
        One number for each cloud, (clouds); a scalar for a single cloud.

    Raises:
        ValueError: If the clouds are not floats of these shapes, differ in their number of points,
            or have a coordinate that is NaN or infinite; if an option is unknown.

    References:
        Topological Autoencoders (Moor et al., ICML 2020)
        https://arxiv.org/abs/1906.00722

    Examples:
        >>> points = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> edge_matching(3 * points, points).item() < 1e-9  # it does not see scale
        True
        >>> edge_matching(points.flip(0), points).item() > 0.1  # but which point is which
        True
    """
    if edges not in get_args(Edges):
        raise ValueError(f"edges are one of {', '.join(get_args(Edges))}; got {edges!r}")
    pair = _paired(student, teacher, unit, teacher_unit or unit, detach_unit)
    clouds, n, _ = pair.student.shape
    total = pair.student.new_zeros(clouds)
    for chosen_by in (pair.teacher, pair.student) if symmetric else (pair.teacher,):
        if edges == "tree":
            chosen = rips(chosen_by.detach()).death_edges
        else:
            chosen = _random_edges(clouds, n, chosen_by.device, generator)
        total = total + pair.gap(chosen).square().sum(1)
    return pair.result(total / (2 * n))


def rtd_lite(
    student: Tensor,
    teacher: Tensor,
    *,
    unit: Unit = "quantile",
    detach_unit: bool = False,
) -> Tensor:
    r"""Compares at which lengths the same clusters form, by the weights of three spanning trees.

    .. math:: \tfrac{1}{2} \big(M(A) + M(B)\big) - M\big(\min(A, B)\big)

    with the distance matrices :math:`A` of the teacher and :math:`B` of the student, in units of
    their cloud, and the weight :math:`M` of the minimum spanning tree. It is never negative; it is
    0 if both clouds merge the same clusters at the same lengths. It is a sum of about n lengths,
    and grows with n. O(n² d) time and, for a moment, O(n²) memory a cloud.

    The unit of the paper is the 0.9-quantile; its released code takes it over the whole matrix,
    ``unit="matrix_quantile"``, with gradient.

    Args:
        student: Points, (n, d) or (clouds, n, d).
        teacher: Points, as many; their width may differ.
        unit: What lengths are divided by, see :mod:`topkd.topology.labelled`.
        detach_unit: Whether units count as constants.

    Returns:
        One number for each cloud, (clouds); a scalar for a single cloud.

    Raises:
        ValueError: If the clouds are not floats of these shapes, differ in their number of points,
            or have a coordinate that is NaN or infinite; if the unit is unknown.

    References:
        RTD-Lite: Scalable Topological Analysis for Comparing Weighted Graphs in Learning Tasks
        (Tulchinskii et al., AISTATS 2025)
        https://arxiv.org/abs/2503.11910

    Examples:
        >>> segment = torch.tensor([[0.0], [1.0], [3.0]])
        >>> rtd_lite(segment, segment[[1, 0, 2]], unit="none")  # 1 + 2 twice, and 1 + 2 of both
        tensor(0.)
        >>> rtd_lite(segment, segment[[0, 2, 1]], unit="none")  # 1 + 2 twice, and 1 + 1 of both
        tensor(1.)
    """
    pair = _paired(student, teacher, unit, unit, detach_unit)
    least = torch.minimum(
        _distances(pair.student) / pair.student_unit.detach()[..., None],
        _distances(pair.teacher) / pair.teacher_unit.detach()[..., None],
    )
    shared = rips(distances=least).death_edges
    ours, theirs = pair.lengths(shared)
    student_tree = rips(pair.student).deaths / pair.student_unit
    teacher_tree = rips(pair.teacher).deaths / pair.teacher_unit
    gap = (student_tree + teacher_tree) / 2 - torch.minimum(ours, theirs)
    return pair.result(gap.sum(1).clamp(min=0))  # nothing but rounding makes it negative


def single_linkage(points: Tensor) -> Tensor:
    r"""Computes at which length any two points fall into one cluster of single linkage.

    .. math:: U_{uv} = \min_{\text{paths from } u \text{ to } v} \; \max_{\text{edges } e} D[e]

    which is the greatest edge between them in the minimum spanning tree: an ultrametric, and the
    greatest that is nowhere above the distances. Gradients pass through the n - 1 edges of the
    tree. The edges are found on the CPU in O(n²) time beyond that for the tree.

    Args:
        points: (n, d) or (clouds, n, d).

    Returns:
        (n (n - 1) / 2) or (clouds, n (n - 1) / 2), pairs u < v in the order of scipy's ``pdist``.

    Raises:
        ValueError: If the points are not floats of that shape, or not finite.

    References:
        Characterization, Stability and Convergence of Hierarchical Clustering Methods
        (Carlsson & Mémoli, JMLR 2010) https://jmlr.org/papers/v11/carlsson10a.html

    Examples:
        >>> single_linkage(torch.tensor([[0.0], [1.0], [3.0]]))  # of 0 and 1, 0 and 2, 1 and 2
        tensor([1., 2., 2.])
    """
    tree = rips(points)
    edges = tree.death_edges[None] if points.ndim == 2 else tree.death_edges
    index = attaining_edges(edges)
    return tree.deaths.gather(-1, index[0] if points.ndim == 2 else index)


def ultrametric(
    student: Tensor,
    teacher: Tensor,
    *,
    order: float = 1.0,
    unit: Unit = "mean",
    detach_unit: bool = False,
) -> Tensor:
    r"""Compares at which lengths any two points fall into one cluster of single linkage.

    .. math:: \frac{2}{n (n - 1)} \sum_{u < v} \lvert U^S_{uv} - U^T_{uv} \rvert^p

    with the ultrametrics :math:`U` of :func:`single_linkage` in units of their cloud. Every pair
    counts, and all gradient passes through the n - 1 edges of the student's tree, to each as much
    as there are pairs in the two clusters that it joins. Without a unit, and for order 1, it is at
    most the greatest change of a distance. O(n² d) time and O(n²) memory a cloud.

    Args:
        student: Points, (n, d) or (clouds, n, d).
        teacher: Points, as many; their width may differ.
        order: The exponent p, at least 1.
        unit: What lengths are divided by, see :mod:`topkd.topology.labelled`.
        detach_unit: Whether units count as constants.

    Returns:
        One number for each cloud, (clouds); a scalar for a single cloud.

    Raises:
        ValueError: If the clouds are not floats of these shapes, differ in their number of points,
            or have a coordinate that is NaN or infinite; if the order is below 1 or the unit is
            unknown.

    References:
        Characterization, Stability and Convergence of Hierarchical Clustering Methods
        (Carlsson & Mémoli, JMLR 2010), for the ultrametric and its stability
        https://jmlr.org/papers/v11/carlsson10a.html

    Examples:
        >>> segment = torch.tensor([[0.0], [1.0], [3.0]])  # 1, 2, 2 between its points
        >>> ultrametric(segment[[0, 2, 1]], segment, unit="none")  # 2, 1, 2
        tensor(0.6667)
    """
    if not 1 <= order < math.inf:
        raise ValueError(f"the order is a finite number of at least 1, got {order}")
    pair = _paired(student, teacher, unit, unit, detach_unit)
    ours = single_linkage(pair.student) / pair.student_unit
    theirs = single_linkage(pair.teacher) / pair.teacher_unit
    gap = (ours - theirs).abs().pow(order)
    return pair.result(gap.sum(1) / max(gap.shape[1], 1))


def persistence_weighted(
    student: Tensor,
    teacher: Tensor,
    *,
    power: float = 1.0,
    max_dim: int = 0,
    symmetric: bool = False,
    unit: Unit = "mean",
    detach_unit: bool = False,
) -> Tensor:
    r"""Compares the lengths of the teacher's critical edges, those of long bars most.

    .. math:: \sum_{(e, \pi)} \pi^q (D_S[e] - D_T[e])^2 \Big/ \sum_{(e, \pi)} \pi^q

    over the edges :math:`e` at which a class of the teacher's diagram is born or dies, with the
    detached persistence :math:`\pi` of its bar: of H0 the edges of the spanning tree and their
    lengths, of H1 the edges of birth and of death, both with death less birth. Lengths :math:`D`
    are in units of their cloud. A power of 0 counts all edges alike. Where no bar has any length
    the loss is 0.

    Args:
        student: Points, (n, d) or (clouds, n, d).
        teacher: Points, as many; their width may differ.
        power: The exponent q, not negative.
        max_dim: The highest dimension of the diagrams, see :func:`~topkd.topology.rips`.
        symmetric: Whether the same is added for the student's critical edges, weighted by the
            detached persistence of the student's bars.
        unit: What lengths are divided by, see :mod:`topkd.topology.labelled`.
        detach_unit: Whether units count as constants.

    Returns:
        One number for each cloud, (clouds); a scalar for a single cloud.

    Raises:
        ValueError: If the clouds are not floats of these shapes, differ in their number of points,
            or have a coordinate that is NaN or infinite; if the power is negative or an option is
            unknown.
        ImportError: If :func:`~topkd.topology.rips` needs redzed-tda for that dimension.

    References:
        Defined here; with power 0 it is one side of the matching of
        Topological Autoencoders (Moor et al., ICML 2020) https://arxiv.org/abs/1906.00722

    Examples:
        >>> segment = torch.tensor([[0.0], [1.0], [4.0]])  # bars of length 1 and 3
        >>> student = torch.tensor([[0.0], [1.0], [5.0]])  # the second is longer by 1
        >>> persistence_weighted(student, segment, unit="none")
        tensor(0.7500)
    """
    if not 0 <= power < math.inf:
        raise ValueError(f"the power is a finite number of at least 0, got {power}")
    pair = _paired(student, teacher, unit, unit, detach_unit)
    total = pair.student.new_zeros(len(pair.student))
    for chosen_by in (pair.teacher, pair.student) if symmetric else (pair.teacher,):
        chosen, weights = _weighted_edges(chosen_by.detach(), power, max_dim)
        sums = weights.sum(1)
        gaps = (weights * pair.gap(chosen).square()).sum(1)
        total = total + gaps / torch.where(sums > 0, sums, 1.0)
    return pair.result(total)


class _Pair(NamedTuple):
    """Student and teacher as batches, and their units."""

    student: Tensor  # (clouds, n, d)
    teacher: Tensor
    student_unit: Tensor  # (clouds, 1)
    teacher_unit: Tensor
    alone: bool  # whether there was no batch axis

    def lengths(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Lengths of edges (clouds, k, 2) in both clouds, in their units."""
        ours = edge_lengths(self.student, edges) / self.student_unit
        return ours, edge_lengths(self.teacher, edges) / self.teacher_unit

    def gap(self, edges: Tensor) -> Tensor:
        ours, theirs = self.lengths(edges)
        return ours - theirs

    def result(self, values: Tensor) -> Tensor:
        return values[0] if self.alone else values


def _paired(
    student: Tensor, teacher: Tensor, unit: Unit, teacher_unit: Unit, detach_unit: bool
) -> _Pair:
    for name in (unit, teacher_unit):
        if name not in get_args(Unit):
            raise ValueError(f"a unit is one of {', '.join(get_args(Unit))}; got {name!r}")
    _check_points("student", student)
    _check_points("teacher", teacher)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"clouds differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}; "
            "both need the same points, and may differ in width alone"
        )
    alone = student.ndim == 2
    ours, theirs = (_batch(points, alone) for points in (student, teacher))
    return _Pair(
        student=ours,
        teacher=theirs,
        student_unit=_unit(ours, unit, detach_unit),
        teacher_unit=_unit(theirs, teacher_unit, detach_unit),
        alone=alone,
    )


def _check_points(name: str, points: Tensor) -> None:
    if points.ndim not in (2, 3) or not points.is_floating_point():
        raise ValueError(
            f"{name} must be floats (n, d) or (clouds, n, d), "
            f"got {points.dtype} {tuple(points.shape)}"
        )
    if points.shape[-2] == 0:
        raise ValueError(f"{name}: a cloud needs at least one point, got {tuple(points.shape)}")
    if torch.compiler.is_compiling():  # rips will see it, but not whose it is
        return
    bad = ~points.detach().isfinite().all(-1)
    if bad.any():
        *cloud, point = bad.nonzero()[0].tolist()
        where = f"cloud {cloud[0]}, point {point}" if cloud else f"point {point}"
        raise ValueError(f"{name}, {where}: a coordinate is NaN or infinite")


def _batch(points: Tensor, alone: bool) -> Tensor:
    points = points[None] if alone else points
    return points.float() if points.dtype in (torch.float16, torch.bfloat16) else points


def _unit(points: Tensor, unit: Unit, detach: bool) -> Tensor:
    """What the lengths of clouds (clouds, n, d) are divided by, (clouds, 1)."""
    clouds, n, _ = points.shape
    if unit == "none" or n == 1:
        return points.new_ones(clouds, 1)
    points = points.detach() if detach else points
    size = _mean(points) if unit == "mean" else _quantile(points, unit)
    return torch.where(size > 0, size, 1.0)[:, None]


def _mean(points: Tensor) -> Tensor:
    n = points.shape[1]
    # The graph keeps the points alone; the matrix is computed again where a gradient is needed.
    total = checkpoint(
        _total_distance, _wide(points), use_reentrant=False, preserve_rng_state=False
    )
    return (total / (n * (n - 1))).to(points.dtype)


def _total_distance(points: Tensor) -> Tensor:
    return _difference_form(points).sum((1, 2))


def _quantile(points: Tensor, unit: Unit) -> Tensor:
    """Interpolates between the two nearest of the sorted distances, read off the points."""
    n = points.shape[1]
    pairs = n * (n - 1) // 2
    whole = unit == "matrix_quantile"
    last = n * n - 1 if whole else pairs - 1
    place = LEVELS[unit] * last
    low = math.floor(place)
    ranks = [low, min(low + 1, last)]
    if whole:  # the diagonal comes first, and each pair twice
        ranks = [(rank - n) // 2 for rank in ranks]
    i, j = torch.triu_indices(n, n, 1, device=points.device)
    distances = _distances(points)[:, i, j]
    values = [distances.kthvalue(rank + 1, dim=1, keepdim=True).values for rank in ranks]
    first = torch.stack([(distances == value).byte().argmax(1) for value in values], dim=1)
    lengths = edge_lengths(points, torch.stack([i[first], j[first]], dim=-1))
    return torch.lerp(lengths[:, 0], lengths[:, 1], place - low)


def _distances(points: Tensor) -> Tensor:
    """Detached distances (clouds, n, n), exactly symmetric, with a diagonal of exact zeros."""
    upper = _difference_form(_wide(points.detach())).triu(1)
    return upper + upper.mT


def _difference_form(points: Tensor) -> Tensor:
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def _wide(points: Tensor) -> Tensor:
    return points if points.device.type == "mps" else points.double()


def _random_edges(
    clouds: int, n: int, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """As many pairs of different points as a tree has edges, (clouds, n - 1, 2), i < j."""
    shape = clouds, n - 1
    place = device if generator is None else generator.device
    start = torch.randint(n, shape, generator=generator, device=place)
    step = torch.randint(1, max(n, 2), shape, generator=generator, device=place)
    return torch.stack([start, (start + step) % n], dim=-1).sort(-1).values.to(device)


def _weighted_edges(points: Tensor, power: float, max_dim: int) -> tuple[Tensor, Tensor]:
    """Critical edges (clouds, k, 2), and powers of the persistence of their bars (clouds, k)."""
    diagrams = rips(points, max_dim=max_dim)
    weights = diagrams.persistence.pow(power) * diagrams.mask
    higher = slice(diagrams.sizes[0], None)  # all bars of H0 are born without an edge
    edges = torch.cat([diagrams.death_edges, diagrams.birth_edges[:, higher]], dim=1)
    return edges, torch.cat([weights, weights[:, higher]], dim=1)


@torch.library.custom_op("topkd::attaining_edges", mutates_args=())
def attaining_edges(edges: Tensor) -> Tensor:
    """Finds the greatest edge on the path between any two points of spanning trees.

    Args:
        edges: Trees by length, (clouds, n - 1, 2).

    Returns:
        For pairs in the order of scipy's ``pdist``, (clouds, n (n - 1) / 2), which row it is.
    """
    clouds, merges, _ = edges.shape
    index = torch.empty((clouds, merges * (merges + 1) // 2), dtype=torch.int64)
    _ultrametric.attaining_edges(edges.cpu().contiguous().numpy(), index.numpy())
    return index.to(edges.device)


@attaining_edges.register_fake
def _(edges: Tensor) -> Tensor:
    clouds, merges, _ = edges.shape
    return edges.new_empty((clouds, merges * (merges + 1) // 2))
