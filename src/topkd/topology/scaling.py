"""Length scales: the statistic of a cloud by which its lengths are divided.

Features of two networks differ in width and norm, and so do their distances. Dividing the lengths
of each cloud by a statistic of that cloud makes clouds comparable. Each name stands for one
statistic, in functions, losses and recipes:

===================  ===============================================  ==========  =============
scale                statistic                                        diagrams    point clouds
===================  ===============================================  ==========  =============
``none``             1: lengths are unchanged                         yes         yes
``tree_mean``        mean edge of the minimum spanning tree           H0          no
``tree_median``      median edge of the minimum spanning tree         H0          no
``tree_max``         longest edge of the minimum spanning tree        H0          no
``death_mean``       mean death of the diagram                        yes         no
``death_median``     median death of the diagram                      yes         no
``death_max``        greatest death of the diagram                    yes         no
``mean``             mean of all pairwise distances                   no          yes
``median``           median of all pairwise distances                 no          yes
``quantile``         0.9-quantile of all pairwise distances           no          yes
``matrix_quantile``  0.9-quantile of the full distance matrix,        no          yes
..                   including its diagonal and both triangles
``max``              greatest pairwise distance                       no          yes
===================  ===============================================  ==========  =============

Edges of the minimum spanning tree are the deaths in H0, including those of length zero. For H0,
``tree_mean`` and ``death_mean`` are therefore equal; in higher dimensions only ``death_*`` is
defined by the diagram itself. Loops are few and their deaths vary, so losses scale H1 by the tree.
Tree edges are the shortest distances of a cloud and shrink with the number of points: for 64
Gaussian points in 32 dimensions, ``tree_mean`` is about 6 and ``mean`` about 8.

Functions of diagrams accept :data:`DiagramScale`, comparisons of point clouds accept
:data:`DistanceScale`, and losses on diagrams accept :data:`TreeScale`. Other values raise a
``ValueError``.

A statistic of 0, for coincident points or an empty diagram, is replaced by 1. Below 0.001, the
gradient is bounded; see :func:`~topkd.topology.gradient.bounded_divide`.

Gradients pass through the scale by default, so the size of a cloud has neither an effect nor a
gradient. The gradient of a mean reaches all points; that of a median, quantile or maximum reaches
only the one or two pairs that attain it, which then move much further than all others. With
``detach_scale=True``, the scale is a constant. The gradient then also changes the size of the
features, mostly towards 0, and does so indefinitely, because the loss does not depend on the size.

Scales of pairwise distances take O(n² d) time and O(n²) temporary memory per cloud; the autograd
graph stores only the points.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from topkd.topology._validation import check_choice
from topkd.topology.gradient import bounded_divide
from topkd.topology.lengths import difference_form, edge_lengths, pairwise_distances, widened
from topkd.topology.rips import Diagrams

TreeScale = Literal["none", "tree_mean", "tree_median", "tree_max"]
DiagramScale = Literal[TreeScale, "death_mean", "death_median", "death_max"]
DistanceScale = Literal["none", "mean", "median", "quantile", "matrix_quantile", "max"]
Scale = Literal[DiagramScale, DistanceScale]
"""All scales."""

LEVELS: dict[DistanceScale, float] = {
    "median": 0.5,
    "quantile": 0.9,
    "matrix_quantile": 0.9,
    "max": 1.0,
}


def length_scale(diagrams: Diagrams, scale: DiagramScale = "death_mean") -> Tensor:
    """Computes the length scale of each cloud from the deaths of its diagram.

    Args:
        diagrams: Diagrams of one dimension; of H0 for ``tree_*``.
        scale: The statistic, see :mod:`topkd.topology.scaling`.

    Returns:
        Scales, (clouds), with gradient; 1 where the statistic is 0.

    Raises:
        ValueError: If the scale is not a statistic of such diagrams.

    Examples:
        >>> from topkd.topology import rips
        >>> points = torch.randn(5, 30, 2, generator=torch.Generator().manual_seed(0))
        >>> both = rips(points, max_dim=1)
        >>> loops = both.scaled(1 / length_scale(both.of(0), "tree_median")).of(1)
    """
    check_choice("scale", scale, get_args(DiagramScale))
    if scale.startswith("tree_") and any(diagrams.sizes[1:]):
        raise ValueError(
            f"scale {scale!r} is a statistic of H0, but these diagrams have bars of dimension "
            f"{next(d for d, size in enumerate(diagrams.sizes) if d and size)}; scale by .of(0)"
        )
    mask, deaths = diagrams.mask, diagrams.deaths
    deaths, count = deaths.where(mask, 0), mask.sum(-1)
    if scale == "none":
        return torch.ones_like(count, dtype=deaths.dtype)
    if scale.endswith("_mean"):
        statistic = deaths.sum(-1) / count.clamp(min=1)
    elif scale.endswith("_max"):
        statistic = F.pad(deaths, (0, 1)).amax(-1)  # padded, as a diagram may have no bars
    else:
        ordered = F.pad(deaths.masked_fill(~mask, math.inf).sort(-1).values, (0, 1))
        middle = torch.stack([(count - 1).clamp(min=0) // 2, count // 2], dim=-1)
        statistic = ordered.gather(-1, middle).mean(-1).where(count > 0, 0)
    return statistic.where(statistic > 0, 1)


def distance_scale(points: Tensor, scale: DistanceScale, *, detach: bool = False) -> Tensor:
    """Computes the length scale of each cloud from all its pairwise distances.

    Args:
        points: (clouds, n, d).
        scale: The statistic, see :mod:`topkd.topology.scaling`.
        detach: Whether the scale is a constant for the gradient.

    Returns:
        Scales, (clouds, 1); 1 where the statistic is 0.

    Raises:
        ValueError: If the scale is not a statistic of distances.
    """
    check_choice("scale", scale, get_args(DistanceScale))
    clouds, n, _ = points.shape
    if scale == "none" or n == 1:
        return points.new_ones(clouds, 1)
    points = points.detach() if detach else points
    statistic = _mean(points) if scale == "mean" else _quantile(points, scale)
    return torch.where(statistic > 0, statistic, 1.0)[:, None]


def _mean(points: Tensor) -> Tensor:
    n = points.shape[1]
    # Only the points are saved for backward; the distance matrix is recomputed.
    total = checkpoint(
        _total_distance, widened(points), use_reentrant=False, preserve_rng_state=False
    )
    return (total / (n * (n - 1))).to(points.dtype)


def _total_distance(points: Tensor) -> Tensor:
    return difference_form(points).sum((1, 2))


def _quantile(points: Tensor, scale: DistanceScale) -> Tensor:
    """Interpolates between two order statistics, recomputed from the points with gradient."""
    n = points.shape[1]
    pairs = n * (n - 1) // 2
    full_matrix = scale == "matrix_quantile"
    last = n * n - 1 if full_matrix else pairs - 1
    position = LEVELS[scale] * last
    low = math.floor(position)
    ranks = [low, min(low + 1, last)]
    if full_matrix:  # the n zeros of the diagonal come first, then each pair twice
        ranks = [(rank - n) // 2 for rank in ranks]
    i, j = torch.triu_indices(n, n, 1, device=points.device)
    distances = pairwise_distances(points)[:, i, j]
    values = [distances.kthvalue(rank + 1, dim=1, keepdim=True).values for rank in ranks]
    first = torch.stack([(distances == value).byte().argmax(1) for value in values], dim=1)
    lengths = edge_lengths(points, torch.stack([i[first], j[first]], dim=-1))
    return torch.lerp(lengths[:, 0], lengths[:, 1], position - low)


def normalized(diagrams: Diagrams, scale: Tensor) -> Diagrams:
    """Divides births and deaths by the scale of each cloud, with bounded gradients.

    Args:
        diagrams: Of any dimensions.
        scale: (clouds), or a scalar for a single cloud.
    """
    scale = scale[..., None]
    births, deaths = bounded_divide(diagrams.births, scale), bounded_divide(diagrams.deaths, scale)
    return replace(diagrams, births=births, deaths=deaths)


def normalized_bars(
    diagrams: Diagrams, scale: DiagramScale, *, detach_scale: bool
) -> tuple[Tensor, Tensor]:
    """Births and deaths divided by the scale; both are 0 for padding and bars of length zero.

    Raises:
        ValueError: If the diagrams have bars of several dimensions, or the scale is not a
            statistic of theirs.
    """
    dimensions = [d for d, size in enumerate(diagrams.sizes) if size > 0]
    if len(dimensions) > 1:
        raise ValueError(
            f"these diagrams have bars of dimensions {dimensions}; select one with .of(dimension)"
        )
    bars = diagrams.mask & (diagrams.deaths > diagrams.births)
    births, deaths = diagrams.births.where(bars, 0), diagrams.deaths.where(bars, 0)
    if scale == "none":
        return births, deaths
    length = length_scale(diagrams, scale)[..., None]
    if detach_scale:
        length = length.detach()
    return bounded_divide(births, length), bounded_divide(deaths, length)
