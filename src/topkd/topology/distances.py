"""Distances between persistence diagrams: exact, batched over clouds and differentiable.

The optimal matching is found on detached bars in float64. Its cost is then recomputed from the
bars, so gradients reach births and deaths, including those of bars matched to the diagonal. If
several matchings are optimal, one of them determines the gradient; for equal diagrams it is 0.
"""

import math
from bisect import bisect_left

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor
from torch.library import custom_op

from topkd.topology.rips import Diagrams

Array = NDArray[np.float64]


def wasserstein(
    first: Diagrams,
    second: Diagrams,
    *,
    order: float = 1.0,
    ground_norm: float = math.inf,
    diagonal: bool = False,
) -> Tensor:
    r"""Computes Wasserstein distances: the cost of the optimal matching of two diagrams.

    A bar is matched to a bar of the other diagram, or to the nearest point
    :math:`\pi(x) = \big(\tfrac{b+d}{2}, \tfrac{b+d}{2}\big)` of the diagonal:

    .. math::
        \min_M \Big(\sum_{(x, y) \in M} \lVert x - y \rVert^p
        + \sum_{x \notin M} \lVert x - \pi(x) \rVert^p
        + \sum_{y \notin M} \lVert y - \pi(y) \rVert^p\Big)^{1/p}

    For H0 of two clouds of the same size, the diagonal is not used by default: each bar is
    one merge of components, and is matched to a bar. All births are 0, so the optimal matching
    compares sorted deaths. Its cost is at least the one above, which GUDHI computes;
    ``diagonal=True`` selects the latter, for example for comparability with clouds of other sizes.

    .. math:: \Big(\sum_k |d_{(k)} - d'_{(k)}|^p\Big)^{1/p}

    Sorting takes O(n log n) time per cloud; matching takes O(n³), on the CPU.

    Args:
        first: Diagrams of one or several clouds, of one dimension; see ``Diagrams.of``.
        second: The same number of diagrams, of the same dimension; the number of bars may differ.
        order: The exponent p, at least 1; infinity gives the bottleneck distance.
        ground_norm: Norm of the difference of two bars as points of the plane: infinity for the
            maximum norm, as in GUDHI and Hera; 2 for the Euclidean norm, as in persim. The distance
            of a bar to the diagonal is its persistence times 1/2 or :math:`1/\sqrt 2`.
        diagonal: Whether bars may be matched to the diagonal also for H0 with the same number
            of bars born at 0. All other diagrams always allow it.

    Returns:
        Distances, (clouds), in the unit of the points; a scalar for a single cloud.

    Raises:
        ValueError: If the numbers of clouds differ, there are bars of several dimensions or bars
            that are not finite, or the order or ground norm is invalid.

    References:
        Geometry Helps to Compare Persistence Diagrams (Kerber, Morozov & Nigmetov, 2017)
        https://arxiv.org/abs/1606.03357
        Computational Optimal Transport (Peyré & Cuturi, 2019), remark 2.28, for sorted deaths
        https://arxiv.org/abs/1803.00567

    Examples:
        >>> from topkd.topology import rips
        >>> segment = torch.tensor([[0.0], [1.0], [3.0]])
        >>> wasserstein(rips(segment), rips(2 * segment))
        tensor(3.)
        >>> loops = Diagrams.from_bars(torch.tensor([[1.0, 5.0], [2.0, 2.5]]))
        >>> wasserstein(loops, Diagrams.from_bars(torch.tensor([[1.0, 4.0]])))  # 1 + 0.5 / 2
        tensor(1.2500)
    """
    if not order >= 1:
        raise ValueError(f"order must be at least 1, got {order}")
    if ground_norm not in (2, math.inf):
        raise ValueError(f"ground_norm must be 2 or infinity, got {ground_norm}")
    x, y = _checked(first, second)
    if diagonal or any(first.sizes[1:]) or any(second.sizes[1:]):
        found = _norm(_costs(x, y, order, ground_norm), order)
    else:
        alike = first.mask.sum(-1) == second.mask.sum(-1)
        alike = alike.view(-1, 1) & (x[..., 0] == 0).all(1, True) & (y[..., 0] == 0).all(1, True)
        sorted_apart = _norm(
            torch.where(alike, _sorted_differences(x[..., 1], y[..., 1]), 0.0), order
        )
        x, y = (torch.where(alike[..., None], 0.0, bars) for bars in (x, y))
        found = torch.where(
            alike[:, 0], sorted_apart, _norm(_costs(x, y, order, ground_norm), order)
        )
    return found if first.mask.ndim == 2 else found[0]


def bottleneck(first: Diagrams, second: Diagrams) -> Tensor:
    r"""Computes bottleneck distances: the largest displacement of a bar in an optimal matching.

    .. math::
        \min_M \max\Big(\max_{(x, y) \in M} \lVert x - y \rVert_\infty,\
        \max_{x \notin M} \tfrac{d_x - b_x}{2},\ \max_{y \notin M} \tfrac{d_y - b_y}{2}\Big)

    Bars may be matched to the diagonal, including those of H0. This is the distance of the
    stability theorem, which GUDHI also computes. It equals the Wasserstein distance of infinite
    order with ``diagonal=True``. The gradient is that of the pair that attains the maximum, shared
    between ties.

    Bisection over the costs takes O(n^2.5 log n) time per cloud, on the CPU.

    Args:
        first: Diagrams of one or several clouds, of one dimension; see ``Diagrams.of``.
        second: The same number of diagrams, of the same dimension; the number of bars may differ.

    Returns:
        Distances, (clouds), in the unit of the points; a scalar for a single cloud.

    Raises:
        ValueError: If the numbers of clouds differ, or there are bars of several dimensions or bars
            that are not finite.

    References:
        Stability of Persistence Diagrams (Cohen-Steiner, Edelsbrunner & Harer, 2007)
        https://doi.org/10.1007/s00454-006-1276-5
        Geometry Helps to Compare Persistence Diagrams (Kerber, Morozov & Nigmetov, 2017)
        https://arxiv.org/abs/1606.03357

    Examples:
        >>> loops = Diagrams.from_bars(torch.tensor([[1.0, 5.0], [2.0, 2.5]]))
        >>> bottleneck(loops, Diagrams.from_bars(torch.tensor([[1.0, 4.0]])))
        tensor(1.)
    """
    return wasserstein(first, second, order=math.inf, diagonal=True)


def sliced_wasserstein(first: Diagrams, second: Diagrams, *, directions: int = 50) -> Tensor:
    r"""Computes sliced Wasserstein distances: the mean distance of projections to lines.

    Bars are points :math:`(b, d)` of the plane. Each diagram is extended by the projections
    :math:`\pi` of the other's bars onto the diagonal, so both have the same size. For each of
    m directions, the points are projected onto a line and compared in sorted order:

    .. math::
        \frac{1}{m} \sum_{k=0}^{m-1} \Big\lVert
        \mathrm{sort}\big(\langle X \cup \pi(Y), e_k \rangle\big)
        - \mathrm{sort}\big(\langle Y \cup \pi(X), e_k \rangle\big) \Big\rVert_1,
        \quad e_k = \begin{pmatrix} \cos \theta_k \\ \sin \theta_k \end{pmatrix},
        \ \theta_k = \frac{k \pi}{m} - \frac{\pi}{2}

    It is at most :math:`2 \sqrt 2` times the 1-Wasserstein distance with ``diagonal=True``. It
    needs no matching: O(m n log n) time and O(m n) memory per cloud, on the device of the diagrams.

    Args:
        first: Diagrams of one or several clouds, of one dimension; see ``Diagrams.of``.
        second: The same number of diagrams, of the same dimension; the number of bars may differ.
        directions: Number of directions, m, equally spaced over 180 degrees.

    Returns:
        Distances, (clouds), in the unit of the points; a scalar for a single cloud.

    Raises:
        ValueError: If the numbers of clouds differ, there are bars of several dimensions or bars
            that are not finite, or there is no direction.

    References:
        Sliced Wasserstein Kernel for Persistence Diagrams (Carrière, Cuturi & Oudot, ICML 2017)
        https://arxiv.org/abs/1706.03358

    Examples:
        >>> loop = Diagrams.from_bars(torch.tensor([[1.0, 5.0]]))
        >>> nothing = Diagrams.from_bars(torch.zeros(0, 2))
        >>> sliced_wasserstein(loop, nothing, directions=500)  # persistence times sqrt(2) / pi
        tensor(1.8006)
    """
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    x, y = _checked(first, second)
    angle = torch.arange(directions, dtype=torch.float64) * (math.pi / directions) - math.pi / 2
    cos, sin = (part.to(x)[:, None] for part in (angle.cos(), angle.sin()))

    def projected(bars: Tensor, others: Tensor) -> Tensor:
        """Sorted projections of bars and of the others' diagonal points, (clouds, m, bars)."""
        middle = others.mean(-1, keepdim=True).expand_as(others)
        # Padding is (0, 0), on the diagonal: it is in both unions and cancels.
        union = torch.cat([bars, middle], dim=1)[:, None]
        return (cos * union[..., 0] + sin * union[..., 1]).sort(-1).values

    found = (projected(x, y) - projected(y, x)).abs().sum(-1).mean(-1)
    return found if first.mask.ndim == 2 else found[0]


def _checked(first: Diagrams, second: Diagrams) -> tuple[Tensor, Tensor]:
    """Validates diagrams; returns bars (clouds, n, 2) and (clouds, m, 2), padding 0."""
    if first.mask.shape[:-1] != second.mask.shape[:-1]:
        shapes = tuple(first.mask.shape), tuple(second.mask.shape)
        raise ValueError(
            f"diagrams must have the same number of clouds, got {shapes[0]} and {shapes[1]}"
        )
    # Empty diagrams are compatible with every dimension: a batch may have no loops.
    dimensions = [
        [d for d, size in enumerate(diagrams.sizes) if size] for diagrams in (first, second)
    ]
    if len({d for each in dimensions for d in each}) > 1:
        raise ValueError(
            "diagrams must have bars of one dimension, select it with .of(dimension); "
            f"got dimensions {dimensions[0]} and {dimensions[1]}"
        )
    return _bars(first), _bars(second)


def _bars(diagrams: Diagrams) -> Tensor:
    """(clouds, bars, 2), padding 0."""
    bars = torch.where(diagrams.mask[..., None], diagrams.bars, 0.0)
    if not torch.compiler.is_compiling() and not bars.isfinite().all():
        *cloud, bar = (~bars.isfinite()).any(-1).nonzero()[0].tolist()
        where = f"cloud {cloud[0]}, bar {bar}" if cloud else f"bar {bar}"
        raise ValueError(f"{where}: births and deaths must be finite; omit classes that never die")
    return bars if bars.ndim == 3 else bars[None]


def _sorted_differences(first: Tensor, second: Tensor) -> Tensor:
    """Differences of sorted deaths (clouds, n) and (clouds, m), the shorter padded by 0."""
    width = max(first.shape[1], second.shape[1])
    # Deaths are almost sorted: recomputed lengths may differ in the last bit.
    first, second = (
        F.pad(deaths, (0, width - deaths.shape[1])).sort(-1).values for deaths in (first, second)
    )
    return first - second


def _costs(first: Tensor, second: Tensor, order: float, ground_norm: float) -> Tensor:
    """Cost of each bar, (clouds, n + m); that of a pair is assigned to the first diagram."""
    partners = cheapest_matching(first.detach(), second.detach(), order, ground_norm)
    clouds, m, _ = second.shape
    ends = torch.cat([second, second.new_zeros(clouds, 1, 2)], dim=1)
    differences = first - ends.gather(1, partners[..., None].expand(-1, -1, 2))
    apart = torch.linalg.vector_norm(differences, ord=ground_norm, dim=-1)
    unmatched = torch.ones_like(ends[..., 0], dtype=torch.bool).scatter(1, partners, False)[:, :m]
    to_diagonal = [
        (bars[..., 1] - bars[..., 0]).clamp(min=0) * 2 ** (1 / ground_norm - 1)
        for bars in (first, second)
    ]
    return torch.cat(
        [
            torch.where(partners < m, apart, to_diagonal[0]),
            torch.where(unmatched, to_diagonal[1], 0.0),
        ],
        dim=1,
    )


def _norm(costs: Tensor, order: float) -> Tensor:
    if costs.shape[-1] == 0:  # no bars at all
        return costs.sum(-1)
    if order <= 2 or order == math.inf:
        return torch.linalg.vector_norm(costs, ord=order, dim=-1)
    greatest = costs.detach().abs().amax(-1, keepdim=True)  # high powers overflow
    greatest = torch.where(greatest > 0, greatest, 1.0)
    return greatest[..., 0] * torch.linalg.vector_norm(costs / greatest, ord=order, dim=-1)


@custom_op("topkd::cheapest_matching", mutates_args=())
def cheapest_matching(first: Tensor, second: Tensor, order: float, ground_norm: float) -> Tensor:
    """Finds the optimal matching of bars.

    Args:
        first: Detached bars, (clouds, n, 2); bars of length 0 are ignored.
        second: Detached bars of the other diagrams, (clouds, m, 2).
        order: Order of the distance; infinity minimizes the greatest cost.
        ground_norm: 2 or infinity.

    Returns:
        Index of the partner in the second diagram, or m for the diagonal, (clouds, n).
    """
    m, half = second.shape[1], 2 ** (1 / ground_norm - 1)
    partners = torch.full(first.shape[:2], m)
    sides = (bars.cpu().double().numpy() for bars in (first, second))
    for found, x, y in zip(partners.numpy(), *sides, strict=True):
        there, others = ((bars[:, 1] > bars[:, 0]).nonzero()[0] for bars in (x, y))
        if len(there) == 0 or len(others) == 0:
            continue
        x, y = x[there], y[others]
        costs = np.linalg.norm(x[:, None] - y, ord=ground_norm, axis=-1)
        first_far, second_far = (np.ptp(bars, axis=1) * half for bars in (x, y))
        if order == math.inf:
            columns = _least_greatest(costs, first_far, second_far)
        else:
            columns = _least_sum(costs, first_far, second_far, order)
        columns = columns[: len(x)]
        met = columns < len(y)
        found[there[met]] = others[columns[met]]
    return partners.to(first.device)


@cheapest_matching.register_fake
def _(first: Tensor, second: Tensor, order: float, ground_norm: float) -> Tensor:
    return first.new_empty(first.shape[:2], dtype=torch.int64)


def _with_diagonal(costs: Array, first: Array, second: Array) -> Array:
    """Cost matrix with diagonal points, (n + m, m + n); matching these to each other is free."""
    n, m = costs.shape
    return np.block(
        [
            [costs, np.broadcast_to(first[:, None], (n, n))],
            [np.broadcast_to(second, (m, m)), np.zeros((m, n))],
        ]
    )


def _least_sum(costs: Array, first: Array, second: Array, order: float) -> NDArray[np.int64]:
    """Assigned column of each row of the matrix of :func:`_with_diagonal`."""
    costs = _with_diagonal(costs, first, second)
    if order != 1 and costs.any():
        costs = (costs / costs.max()) ** order
    return np.asarray(linear_sum_assignment(costs)[1])


def _least_greatest(costs: Array, first: Array, second: Array) -> NDArray[np.int64]:
    """Assigned column of each row of the matrix of :func:`_with_diagonal`."""

    def suffices(bound: float) -> bool:
        # If one matching covers all bars of the first diagram that need a partner, and another
        # those of the second, some matching covers both (Mendelsohn & Dulmage 1958).
        near = costs <= bound
        return all(
            (_most_pairs(allowed[far > bound]) >= 0).all()
            for allowed, far in ((near, first), (near.T, second))
        )

    candidates = np.unique(np.concatenate([[0.0], costs.ravel(), first, second]))
    bound = candidates[bisect_left(candidates, True, key=suffices)]
    return _most_pairs(_with_diagonal(costs, first, second) <= bound)


def _most_pairs(allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Column of each row in a maximum matching, -1 for none."""
    return np.asarray(maximum_bipartite_matching(csr_matrix(allowed), perm_type="column"))
