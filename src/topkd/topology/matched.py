"""Comparisons of two clouds of corresponding points.

Losses on diagrams are invariant to permutations of the points; these are not. Point i of the
student and point i of the teacher belong to the same image, so an edge (i, j) has a length in both
clouds, whatever their widths. Critical edges are found on detached points, and their lengths are
recomputed in both clouds, so the autograd graph stores these edges only.

Lengths are divided by a scale of each cloud, see :mod:`topkd.topology.scaling`. Gradients reach the
teacher if it requires them; pass it detached otherwise.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.library import custom_op

from topkd.topology import _ultrametric
from topkd.topology.correspondence import match_clouds
from topkd.topology.lengths import edge_lengths, pairwise_distances
from topkd.topology.rips import rips
from topkd.topology.scaling import DistanceScale

Edges = Literal["tree", "random"]


def edge_matching(
    student: Tensor,
    teacher: Tensor,
    *,
    scale: DistanceScale = "mean",
    teacher_scale: DistanceScale | None = None,
    detach_scale: bool = False,
    symmetric: bool = True,
    edges: Edges | Tensor = "tree",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Compares the lengths of the edges of both minimum spanning trees, edge by edge.

    .. math:: \frac{1}{2n} \sum_{e \in E_T} (D_S[e] - D_T[e])^2
        + \frac{1}{2n} \sum_{e \in E_S} (D_S[e] - D_T[e])^2

    with the edges :math:`E` of the minimum spanning trees and scaled lengths :math:`D`. The cost is
    O(n² d) time per cloud, and memory for 4 n lengths.

    The authors' code divides the lengths of the input by their maximum and those of the latent
    space by a learned scalar, and omits the factor ½. This is twice
    ``edge_matching(latent / scalar, input, scale="none", teacher_scale="max")``.

    Args:
        student: Points :math:`S`, (n, d) or (clouds, n, d).
        teacher: Points :math:`T`, the same number; the width may differ.
        scale: Scale of lengths, see :mod:`topkd.topology.scaling`.
        teacher_scale: Scale of the teacher's lengths. Defaults to ``scale``.
        detach_scale: Whether scales are constants for the gradient.
        symmetric: Whether to include the second sum, over the edges of the student's tree.
        edges: ``random`` is an ablation control: each sum runs over n - 1 pairs of different
            points, drawn uniformly with replacement, instead of a tree. A tensor of edges, (k, 2)
            or (clouds, k, 2), replaces both trees.
        generator: Random generator for ``random``. Defaults to PyTorch's global generator.

    Returns:
        Losses, (clouds); a scalar for a single cloud.

    Raises:
        ValueError: If the clouds are not floats of these shapes, differ in their number of points,
            or have a coordinate that is NaN or infinite; if an option is invalid.

    References:
        Topological Autoencoders (Moor et al., ICML 2020)
        https://arxiv.org/abs/1906.00722

    Examples:
        >>> points = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> edge_matching(3 * points, points).item() < 1e-9  # invariant to scale
        True
        >>> edge_matching(points.flip(0), points).item() > 0.1  # but not to permutations
        True
    """
    if not isinstance(edges, Tensor) and edges not in get_args(Edges):
        raise ValueError(f"edges must be one of {', '.join(get_args(Edges))}, got {edges!r}")
    clouds = match_clouds(student, teacher, scale, teacher_scale or scale, detach_scale)
    batch, n, _ = clouds.student.shape
    total = clouds.student.new_zeros(batch)
    for source in (clouds.teacher, clouds.student) if symmetric else (clouds.teacher,):
        if isinstance(edges, Tensor):
            selected = edges.expand(batch, -1, -1)
        elif edges == "tree":
            selected = rips(source.detach()).death_edges
        else:
            selected = _random_edges(batch, n, source.device, generator)
        total = total + clouds.length_difference(selected).square().sum(1)
    return clouds.unbatched(total / (2 * n))


def rtd_lite(
    student: Tensor,
    teacher: Tensor,
    *,
    scale: DistanceScale = "quantile",
    detach_scale: bool = False,
    edges: Tensor | None = None,
) -> Tensor:
    r"""Compares the lengths at which the same clusters form, by weights of three spanning trees.

    .. math:: \tfrac{1}{2} \big(M(A) + M(B)\big) - M\big(\min(A, B)\big)

    with the scaled distance matrices :math:`A` of the teacher and :math:`B` of the student, and the
    weight :math:`M` of the minimum spanning tree. The loss is never negative; it is 0 if both
    clouds merge the same clusters at the same lengths. It is a sum of about n lengths and grows
    with n. The cost is O(n² d) time and O(n²) temporary memory per cloud.

    The paper divides by the 0.9-quantile of distances; the authors' code uses the quantile of the
    full matrix, with gradient: ``scale="matrix_quantile"``.

    Args:
        student: Points, (n, d) or (clouds, n, d).
        teacher: The same number of points; the width may differ.
        scale: Scale of lengths, see :mod:`topkd.topology.scaling`.
        detach_scale: Whether scales are constants for the gradient.
        edges: Edges of a tree that replaces all three, as an ablation control, (n - 1, 2) or
            (clouds, n - 1, 2). The loss is then half the sum of absolute length differences.

    Returns:
        Losses, (clouds); a scalar for a single cloud.

    Raises:
        ValueError: If the clouds are not floats of these shapes, differ in their number of points,
            or have a coordinate that is NaN or infinite; if the scale is invalid.

    References:
        RTD-Lite: Scalable Topological Analysis for Comparing Weighted Graphs in Learning Tasks
        (Tulchinskii et al., AISTATS 2025)
        https://arxiv.org/abs/2503.11910

    Examples:
        >>> segment = torch.tensor([[0.0], [1.0], [3.0]])
        >>> rtd_lite(segment, segment[[1, 0, 2]], scale="none")  # weights 3 and 3, minimum 3
        tensor(0.)
        >>> rtd_lite(segment, segment[[0, 2, 1]], scale="none")  # weights 3 and 3, minimum 2
        tensor(1.)
    """
    clouds = match_clouds(student, teacher, scale, scale, detach_scale)
    if edges is not None:
        student_lengths, teacher_lengths = clouds.edge_lengths(
            edges.expand(len(clouds.student), -1, -1)
        )
        return clouds.unbatched((student_lengths - teacher_lengths).abs().sum(1) / 2)
    least = torch.minimum(
        pairwise_distances(clouds.student) / clouds.student_scale.detach()[..., None],
        pairwise_distances(clouds.teacher) / clouds.teacher_scale.detach()[..., None],
    )
    shared = rips(distances=least).death_edges
    student_lengths, teacher_lengths = clouds.edge_lengths(shared)
    student_tree, teacher_tree = clouds.scaled(
        rips(clouds.student).deaths, rips(clouds.teacher).deaths
    )
    excess = (student_tree + teacher_tree) / 2 - torch.minimum(student_lengths, teacher_lengths)
    return clouds.unbatched(excess.sum(1).clamp(min=0))  # only rounding makes it negative


def single_linkage(points: Tensor, *, edges: Tensor | None = None) -> Tensor:
    r"""Computes the length at which single linkage merges each pair of points into one cluster.

    .. math:: U_{uv} = \min_{\text{paths from } u \text{ to } v} \; \max_{\text{edges } e} D[e]

    This is the longest edge between them in the minimum spanning tree: the subdominant ultrametric,
    the greatest that does not exceed the distances. Gradients pass through the n - 1 edges of the
    tree. Finding the longest edges takes O(n²) time on the CPU, in addition to the tree.

    Args:
        points: (n, d) or (clouds, n, d).
        edges: Edges of a tree that replaces the minimum spanning tree, as an ablation control,
            (n - 1, 2) or (clouds, n - 1, 2).

    Returns:
        Heights of pairs u < v in the order of SciPy's ``pdist``, (n (n - 1) / 2) or
        (clouds, n (n - 1) / 2).

    Raises:
        ValueError: If the points are not floats of that shape, or not finite.

    References:
        Characterization, Stability and Convergence of Hierarchical Clustering Methods
        (Carlsson & Mémoli, JMLR 2010) https://jmlr.org/papers/v11/carlsson10a.html

    Examples:
        >>> single_linkage(torch.tensor([[0.0], [1.0], [3.0]]))  # pairs 01, 02, 12
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
    scale: DistanceScale = "mean",
    detach_scale: bool = False,
    edges: Tensor | None = None,
) -> Tensor:
    r"""Compares the lengths at which single linkage merges each pair of points.

    .. math:: \frac{2}{n (n - 1)} \sum_{u < v} \lvert U^S_{uv} - U^T_{uv} \rvert^p

    with the scaled ultrametrics :math:`U` of :func:`single_linkage`. All pairs contribute, but
    gradients pass only through the n - 1 edges of the student's tree; each edge is weighted by the
    number of pairs that it merges. For scale "none" and order 1, the loss is at most the greatest
    change of a distance. The cost is O(n² d) time and O(n²) memory per cloud.

    Args:
        student: Points, (n, d) or (clouds, n, d).
        teacher: The same number of points; the width may differ.
        order: The exponent p, at least 1.
        scale: Scale of lengths, see :mod:`topkd.topology.scaling`.
        detach_scale: Whether scales are constants for the gradient.
        edges: Edges of a tree that replaces both, see :func:`single_linkage`.

    Returns:
        Losses, (clouds); a scalar for a single cloud.

    Raises:
        ValueError: If the clouds are not floats of these shapes, differ in their number of points,
            or have a coordinate that is NaN or infinite; if the order is below 1 or the scale is
            invalid.

    References:
        Characterization, Stability and Convergence of Hierarchical Clustering Methods
        (Carlsson & Mémoli, JMLR 2010), for the ultrametric and its stability
        https://jmlr.org/papers/v11/carlsson10a.html

    Examples:
        >>> segment = torch.tensor([[0.0], [1.0], [3.0]])  # heights 1, 2, 2
        >>> ultrametric(segment[[0, 2, 1]], segment, scale="none")  # heights 2, 1, 2
        tensor(0.6667)
    """
    if not 1 <= order < math.inf:
        raise ValueError(f"order must be finite and at least 1, got {order}")
    clouds = match_clouds(student, teacher, scale, scale, detach_scale)
    student_lengths, teacher_lengths = clouds.scaled(
        single_linkage(clouds.student, edges=edges), single_linkage(clouds.teacher, edges=edges)
    )
    difference = (student_lengths - teacher_lengths).abs().pow(order)
    return clouds.unbatched(difference.sum(1) / max(difference.shape[1], 1))


def persistence_weighted(
    student: Tensor,
    teacher: Tensor,
    *,
    power: float = 1.0,
    max_dim: int = 0,
    symmetric: bool = False,
    scale: DistanceScale = "mean",
    detach_scale: bool = False,
) -> Tensor:
    r"""Compares the lengths of the teacher's critical edges, weighted by persistence.

    .. math:: \sum_{(e, \pi)} \pi^q (D_S[e] - D_T[e])^2 \Big/ \sum_{(e, \pi)} \pi^q

    over the birth and death edges :math:`e` of the teacher's diagram, with the detached persistence
    :math:`\pi` of their bars and scaled lengths :math:`D`. The critical edges of H0 are those of
    the minimum spanning tree; each bar of H1 has a birth edge and a death edge. A power of 0
    weights all edges equally. If all bars have length zero, the loss is 0.

    Args:
        student: Points, (n, d) or (clouds, n, d).
        teacher: The same number of points; the width may differ.
        power: The exponent q, not negative.
        max_dim: Maximum dimension of the diagrams, see :func:`~topkd.topology.rips`.
        symmetric: Whether to add the same sum over the student's critical edges, weighted by the
            detached persistence of the student's bars.
        scale: Scale of lengths, see :mod:`topkd.topology.scaling`.
        detach_scale: Whether scales are constants for the gradient.

    Returns:
        Losses, (clouds); a scalar for a single cloud.

    Raises:
        ValueError: If the clouds are not floats of these shapes, differ in their number of points,
            or have a coordinate that is NaN or infinite; if the power is negative or an option is
            invalid.
        ImportError: If :func:`~topkd.topology.rips` needs redzed-tda for that dimension.

    References:
        Defined in topkd. With power 0, it is one of the two sums of
        Topological Autoencoders (Moor et al., ICML 2020) https://arxiv.org/abs/1906.00722

    Examples:
        >>> segment = torch.tensor([[0.0], [1.0], [4.0]])  # bars of length 1 and 3
        >>> student = torch.tensor([[0.0], [1.0], [5.0]])  # the second is longer by 1
        >>> persistence_weighted(student, segment, scale="none")
        tensor(0.7500)
    """
    if not 0 <= power < math.inf:
        raise ValueError(f"power must be finite and at least 0, got {power}")
    clouds = match_clouds(student, teacher, scale, scale, detach_scale)
    total = clouds.student.new_zeros(len(clouds.student))
    for source in (clouds.teacher, clouds.student) if symmetric else (clouds.teacher,):
        selected, weights = _weighted_edges(source.detach(), power, max_dim)
        sums = weights.sum(1)
        squares = (weights * clouds.length_difference(selected).square()).sum(1)
        total = total + squares / torch.where(sums > 0, sums, 1.0)
    return clouds.unbatched(total)


def _random_edges(
    clouds: int, n: int, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Draws n - 1 pairs of different points with replacement, (clouds, n - 1, 2), i < j."""
    shape = clouds, n - 1
    place = device if generator is None else generator.device
    start = torch.randint(n, shape, generator=generator, device=place)
    step = torch.randint(1, max(n, 2), shape, generator=generator, device=place)
    return torch.stack([start, (start + step) % n], dim=-1).sort(-1).values.to(device)


def _weighted_edges(points: Tensor, power: float, max_dim: int) -> tuple[Tensor, Tensor]:
    """Critical edges (clouds, k, 2) and powers of the persistence of their bars (clouds, k)."""
    diagrams = rips(points, max_dim=max_dim)
    weights = diagrams.persistence.pow(power) * diagrams.mask
    higher = slice(diagrams.sizes[0], None)  # bars of H0 have no birth edge
    edges = torch.cat([diagrams.death_edges, diagrams.birth_edges[:, higher]], dim=1)
    return edges, torch.cat([weights, weights[:, higher]], dim=1)


@custom_op("topkd::attaining_edges", mutates_args=())
def attaining_edges(edges: Tensor) -> Tensor:
    """Finds the longest edge on the path between each pair of points of spanning trees.

    Args:
        edges: Edges of the trees, sorted by length, (clouds, n - 1, 2).

    Returns:
        Row of that edge for pairs in the order of SciPy's ``pdist``, (clouds, n (n - 1) / 2).
    """
    clouds, merges, _ = edges.shape
    index = torch.empty((clouds, merges * (merges + 1) // 2), dtype=torch.int64)
    _ultrametric.attaining_edges(edges.cpu().contiguous().numpy(), index.numpy())
    return index.to(edges.device)


@attaining_edges.register_fake
def _(edges: Tensor) -> Tensor:
    clouds, merges, _ = edges.shape
    return edges.new_empty((clouds, merges * (merges + 1) // 2))
