"""Comparisons of two clouds that know which point of one is which point of the other.

The losses on diagrams do not see it when the points of a cloud change places; these do. Point i of
the student and point i of the teacher are the same image, so that an edge (i, j) has a length in
both clouds, whatever their widths. Which edges matter is found on detached points; their lengths
are then read off both clouds, so that gradients need memory for these edges alone.

Widths and scales of two networks differ, so lengths are divided by a unit of each cloud's own, see
the module ``correspondence``. Nothing else is detached but what is said to be: gradients reach the
teacher where it requires them, so it is usually given detached, or computed without gradients.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.library import custom_op

from topkd.topology import _ultrametric
from topkd.topology.correspondence import Unit, distances_of, paired
from topkd.topology.lengths import edge_lengths
from topkd.topology.rips import rips

Edges = Literal["tree", "random"]


def edge_matching(
    student: Tensor,
    teacher: Tensor,
    *,
    unit: Unit = "mean",
    teacher_unit: Unit | None = None,
    detach_unit: bool = False,
    symmetric: bool = True,
    edges: Edges | Tensor = "tree",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Compares the lengths of the edges of both spanning trees, edge by edge.

    .. math:: \frac{1}{2n} \sum_{e \in E_T} (D_S[e] - D_T[e])^2
        + \frac{1}{2n} \sum_{e \in E_S} (D_S[e] - D_T[e])^2

    with the edges :math:`E` of the minimum spanning trees and lengths :math:`D` in units of their
    cloud. It costs O(n² d) time a cloud, and memory for 4 n lengths.

    The released code of the paper divides the input's lengths by their maximum and those of the
    latent space by a learned scalar, and has no ½: ``edge_matching(latent / scalar, input,
    unit="none", teacher_unit="max")``, twice.

    Args:
        student: Points :math:`S`, (n, d) or (clouds, n, d).
        teacher: Points :math:`T`, as many; their width may differ.
        unit: What lengths are divided by, see :mod:`topkd.topology.correspondence`.
        teacher_unit: The teacher's, if it is another.
        detach_unit: Whether units count as constants.
        symmetric: Whether the second sum is there, over the edges of the student's tree.
        edges: ``random`` is a control: each sum is then over n - 1 pairs of different points,
            drawn uniformly and with replacement, instead of a tree. So are edges that are given,
            (k, 2) or (clouds, k, 2): both sums are over these.
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
    if not isinstance(edges, Tensor) and edges not in get_args(Edges):
        raise ValueError(f"edges are one of {', '.join(get_args(Edges))}; got {edges!r}")
    pair = paired(student, teacher, unit, teacher_unit or unit, detach_unit)
    clouds, n, _ = pair.student.shape
    total = pair.student.new_zeros(clouds)
    for chosen_by in (pair.teacher, pair.student) if symmetric else (pair.teacher,):
        if isinstance(edges, Tensor):
            chosen = edges.expand(clouds, -1, -1)
        elif edges == "tree":
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
    edges: Tensor | None = None,
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
        unit: What lengths are divided by, see :mod:`topkd.topology.correspondence`.
        detach_unit: Whether units count as constants.
        edges: Of a tree that stands in for all three, as a control, (n - 1, 2) or (clouds, n - 1,
            2); the loss is then half the sum of the differences of their lengths.

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
    pair = paired(student, teacher, unit, unit, detach_unit)
    if edges is not None:
        ours, theirs = pair.lengths(edges.expand(len(pair.student), -1, -1))
        return pair.result((ours - theirs).abs().sum(1) / 2)
    least = torch.minimum(
        distances_of(pair.student) / pair.student_unit.detach()[..., None],
        distances_of(pair.teacher) / pair.teacher_unit.detach()[..., None],
    )
    shared = rips(distances=least).death_edges
    ours, theirs = pair.lengths(shared)
    student_tree, teacher_tree = pair.told(rips(pair.student).deaths, rips(pair.teacher).deaths)
    gap = (student_tree + teacher_tree) / 2 - torch.minimum(ours, theirs)
    return pair.result(gap.sum(1).clamp(min=0))  # nothing but rounding makes it negative


def single_linkage(points: Tensor, *, edges: Tensor | None = None) -> Tensor:
    r"""Computes at which length any two points fall into one cluster of single linkage.

    .. math:: U_{uv} = \min_{\text{paths from } u \text{ to } v} \; \max_{\text{edges } e} D[e]

    which is the greatest edge between them in the minimum spanning tree: an ultrametric, and the
    greatest that is nowhere above the distances. Gradients pass through the n - 1 edges of the
    tree. The edges are found on the CPU in O(n²) time beyond that for the tree.

    Args:
        points: (n, d) or (clouds, n, d).
        edges: Of a tree that stands in for the minimum spanning tree, as a control, (n - 1, 2) or
            (clouds, n - 1, 2).

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
    clouds = points[None] if points.ndim == 2 else points
    if edges is None:
        tree = rips(clouds)
        edges, lengths = tree.death_edges, tree.deaths
    else:
        edges = edges.expand(len(clouds), -1, -1)
        lengths, order = edge_lengths(clouds, edges).sort(-1)
        edges = edges.gather(1, order[..., None].expand_as(edges))
    heights = lengths.gather(-1, attaining_edges(edges))
    return heights[0] if points.ndim == 2 else heights


def ultrametric(
    student: Tensor,
    teacher: Tensor,
    *,
    order: float = 1.0,
    unit: Unit = "mean",
    detach_unit: bool = False,
    edges: Tensor | None = None,
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
        unit: What lengths are divided by, see :mod:`topkd.topology.correspondence`.
        detach_unit: Whether units count as constants.
        edges: Of a tree that stands in for both, as a control, see :func:`single_linkage`.

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
    pair = paired(student, teacher, unit, unit, detach_unit)
    ours, theirs = pair.told(
        single_linkage(pair.student, edges=edges), single_linkage(pair.teacher, edges=edges)
    )
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
        unit: What lengths are divided by, see :mod:`topkd.topology.correspondence`.
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
    pair = paired(student, teacher, unit, unit, detach_unit)
    total = pair.student.new_zeros(len(pair.student))
    for chosen_by in (pair.teacher, pair.student) if symmetric else (pair.teacher,):
        chosen, weights = _weighted_edges(chosen_by.detach(), power, max_dim)
        sums = weights.sum(1)
        gaps = (weights * pair.gap(chosen).square()).sum(1)
        total = total + gaps / torch.where(sums > 0, sums, 1.0)
    return pair.result(total)


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


@custom_op("topkd::attaining_edges", mutates_args=())
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
