"""Distances between persistence diagrams: exact, batched over clouds and differentiable.

Which bars belong together is found on detached bars and in float64; what they cost is then read off
the bars again, so that gradients reach births and deaths, also of bars that meet the diagonal. At
ties one of the cheapest matchings gives the gradient; where nothing is to be moved, it is 0.
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
    r"""Computes Wasserstein distances: what the cheapest matching of two diagrams costs.

    A bar is matched with a bar of the other diagram, or with the nearest point
    :math:`\pi(x) = \big(\tfrac{b+d}{2}, \tfrac{b+d}{2}\big)` of the diagonal:

    .. math::
        \min_M \Big(\sum_{(x, y) \in M} \lVert x - y \rVert^p
        + \sum_{x \notin M} \lVert x - \pi(x) \rVert^p
        + \sum_{y \notin M} \lVert y - \pi(y) \rVert^p\Big)^{1/p}

    H0 of two clouds with equally many points is another matter: every bar is one merger in either
    cloud, and is matched with a bar, none with the diagonal. All births are 0, so that the cheapest
    such matching compares the sorted deaths one by one. It costs no less than the one above; give
    ``diagonal=True`` for that one, as GUDHI has it, for instance to compare clouds that differ in
    size with clouds that do not.

    .. math:: \Big(\sum_k |d_{(k)} - d'_{(k)}|^p\Big)^{1/p}

    Sorting costs O(n log n) time a cloud, the matching O(n³), on the CPU.

    Args:
        first: Diagrams of one or several clouds, of one dimension; ``.of(d)`` selects it.
        second: As many, of the same dimension; the number of bars may differ.
        order: The exponent p, at least 1; infinity gives the bottleneck distance.
        ground_norm: How far two bars, as points of the plane, are apart: infinity for the greater
            of the two coordinates, as in GUDHI and Hera; 2 for Euclid, as in persim. A bar is half
            its persistence from the diagonal, or :math:`1/\sqrt 2` of it.
        diagonal: Whether bars may meet the diagonal also in H0 of equally many bars born at 0. They
            may in all other diagrams.

    Returns:
        One distance for each pair of clouds, in the unit of the points.

    Raises:
        ValueError: If there are not as many clouds in both, bars of several dimensions or bars that
            are not finite, or if there is no such order or ground norm.

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
        raise ValueError(f"the order of a Wasserstein distance is at least 1, got {order}")
    if ground_norm not in (2, math.inf):
        raise ValueError(f"the ground norm is 2 or infinity, got {ground_norm}")
    x, y = _paired(first, second)
    if diagonal or any(first.sizes[1:]) or any(second.sizes[1:]):
        found = _norm(_costs(x, y, order, ground_norm), order)
    else:
        alike = first.mask.sum(-1) == second.mask.sum(-1)
        alike = alike.view(-1, 1) & (x[..., 0] == 0).all(1, True) & (y[..., 0] == 0).all(1, True)
        sorted_apart = _norm(torch.where(alike, _sorted_gaps(x[..., 1], y[..., 1]), 0.0), order)
        x, y = (torch.where(alike[..., None], 0.0, bars) for bars in (x, y))
        found = torch.where(
            alike[:, 0], sorted_apart, _norm(_costs(x, y, order, ground_norm), order)
        )
    return found if first.mask.ndim == 2 else found[0]


def bottleneck(first: Diagrams, second: Diagrams) -> Tensor:
    r"""Computes bottleneck distances: how far a bar must move if all move as little as they can.

    .. math::
        \min_M \max\Big(\max_{(x, y) \in M} \lVert x - y \rVert_\infty,\
        \max_{x \notin M} \tfrac{d_x - b_x}{2},\ \max_{y \notin M} \tfrac{d_y - b_y}{2}\Big)

    The matching may leave bars of either diagram to the diagonal, those of H0 included: this is the
    distance for which diagrams are stable, and that of GUDHI. It is the Wasserstein distance of
    infinite order with ``diagonal=True``. The gradient is that of the pair which attains it, and is
    shared where several do.

    The least cost at which a matching exists is found by bisection, in O(n^2.5 log n) time a cloud,
    on the CPU.

    Args:
        first: Diagrams of one or several clouds, of one dimension; ``.of(d)`` selects it.
        second: As many, of the same dimension; the number of bars may differ.

    Returns:
        One distance for each pair of clouds, in the unit of the points.

    Raises:
        ValueError: If there are not as many clouds in both, or bars of several dimensions or bars
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
    r"""Computes sliced Wasserstein distances: the mean over directions of those on a line.

    Bars are points :math:`(b, d)` of the plane. Each diagram is joined by the projections
    :math:`\pi` of the other's bars onto the diagonal, so that there are equally many of both. For
    each of m directions, all are projected onto its line and compared in order:

    .. math::
        \frac{1}{m} \sum_{k=0}^{m-1} \Big\lVert
        \mathrm{sort}\big(\langle X \cup \pi(Y), e_k \rangle\big)
        - \mathrm{sort}\big(\langle Y \cup \pi(X), e_k \rangle\big) \Big\rVert_1,
        \quad e_k = \begin{pmatrix} \cos \theta_k \\ \sin \theta_k \end{pmatrix},
        \ \theta_k = \frac{k \pi}{m} - \frac{\pi}{2}

    It is at most :math:`2 \sqrt 2` times the 1-Wasserstein distance with ``diagonal=True``, and has
    no matching to search for: O(m n log n) time and O(m n) memory a cloud, where the diagrams are.

    Args:
        first: Diagrams of one or several clouds, of one dimension; ``.of(d)`` selects it.
        second: As many, of the same dimension; the number of bars may differ.
        directions: How many, m, equally spaced over half a turn.

    Returns:
        One distance for each pair of clouds, in the unit of the points.

    Raises:
        ValueError: If there are not as many clouds in both, bars of several dimensions or bars that
            are not finite, or if there is no direction.

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
        raise ValueError(f"a sliced distance needs at least one direction, got {directions}")
    x, y = _paired(first, second)
    angle = torch.arange(directions, dtype=torch.float64) * (math.pi / directions) - math.pi / 2
    cos, sin = (part.to(x)[:, None] for part in (angle.cos(), angle.sin()))

    def along(bars: Tensor, others: Tensor) -> Tensor:
        """(clouds, directions, n + m), both in order, the others from the diagonal."""
        middle = others.mean(-1, keepdim=True).expand_as(others)
        # Padding is 0 and 0, on the diagonal: it is in both unions, where it cancels.
        union = torch.cat([bars, middle], dim=1)[:, None]
        return (cos * union[..., 0] + sin * union[..., 1]).sort(-1).values

    found = (along(x, y) - along(y, x)).abs().sum(-1).mean(-1)
    return found if first.mask.ndim == 2 else found[0]


def _paired(first: Diagrams, second: Diagrams) -> tuple[Tensor, Tensor]:
    """Checks both; their bars, (clouds, n, 2) and (clouds, m, 2), padding 0."""
    if first.mask.shape[:-1] != second.mask.shape[:-1]:
        shapes = tuple(first.mask.shape), tuple(second.mask.shape)
        raise ValueError(
            f"diagrams of as many clouds can be compared, got {shapes[0]}, {shapes[1]}"
        )
    # What has no bar of any dimension goes with all: a batch may hold no loop by chance.
    dimensions = [
        [d for d, size in enumerate(diagrams.sizes) if size] for diagrams in (first, second)
    ]
    if len({d for each in dimensions for d in each}) > 1:
        raise ValueError(
            "diagrams of one dimension can be compared, as .of(1) selects it, "
            f"got those of {dimensions[0]} and {dimensions[1]}"
        )
    return _bars(first), _bars(second)


def _bars(diagrams: Diagrams) -> Tensor:
    """(clouds, bars, 2), padding 0."""
    bars = torch.where(diagrams.mask[..., None], diagrams.bars, 0.0)
    if not torch.compiler.is_compiling() and not bars.isfinite().all():
        *cloud, bar = (~bars.isfinite()).any(-1).nonzero()[0].tolist()
        where = f"cloud {cloud[0]}, bar {bar}" if cloud else f"bar {bar}"
        raise ValueError(f"{where}: births and deaths must be finite, leave out what never dies")
    return bars if bars.ndim == 3 else bars[None]


def _sorted_gaps(first: Tensor, second: Tensor) -> Tensor:
    """Compares deaths (clouds, n) and (clouds, m) one by one, the shorter padded by 0."""
    width = max(first.shape[1], second.shape[1])
    # Deaths are sorted already, but re-read lengths may cross by one unit in the last place.
    first, second = (
        F.pad(deaths, (0, width - deaths.shape[1])).sort(-1).values for deaths in (first, second)
    )
    return first - second


def _costs(first: Tensor, second: Tensor, order: float, ground_norm: float) -> Tensor:
    """(clouds, n + m), what each bar costs; a pair is paid for by that of the first diagram."""
    partners = cheapest_matching(first.detach(), second.detach(), order, ground_norm)
    clouds, m, _ = second.shape
    ends = torch.cat([second, second.new_zeros(clouds, 1, 2)], dim=1)
    gaps = first - ends.gather(1, partners[..., None].expand(-1, -1, 2))
    apart = torch.linalg.vector_norm(gaps, ord=ground_norm, dim=-1)
    alone = torch.ones_like(ends[..., 0], dtype=torch.bool).scatter(1, partners, False)[:, :m]
    to_diagonal = [
        (bars[..., 1] - bars[..., 0]).clamp(min=0) * 2 ** (1 / ground_norm - 1)
        for bars in (first, second)
    ]
    return torch.cat(
        [
            torch.where(partners < m, apart, to_diagonal[0]),
            torch.where(alone, to_diagonal[1], 0.0),
        ],
        dim=1,
    )


def _norm(costs: Tensor, order: float) -> Tensor:
    if costs.shape[-1] == 0:  # no bars at all
        return costs.sum(-1)
    if order <= 2 or order == math.inf:
        return torch.linalg.vector_norm(costs, ord=order, dim=-1)
    greatest = costs.detach().abs().amax(-1, keepdim=True)  # high powers leave the range of floats
    greatest = torch.where(greatest > 0, greatest, 1.0)
    return greatest[..., 0] * torch.linalg.vector_norm(costs / greatest, ord=order, dim=-1)


@custom_op("topkd::cheapest_matching", mutates_args=())
def cheapest_matching(first: Tensor, second: Tensor, order: float, ground_norm: float) -> Tensor:
    """Finds which bars belong together.

    Args:
        first: Detached bars, (clouds, n, 2); those of length 0 are no bars.
        second: The same of the other diagrams, (clouds, m, 2).
        order: Of the distance; infinity for a matching whose greatest cost is least.
        ground_norm: 2 or infinity.

    Returns:
        For each bar of the first its partner in the second, or m for the diagonal, (clouds, n).
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
    """Gives each bar a place on the diagonal, (n + m, m + n); between these, moving is free."""
    n, m = costs.shape
    return np.block(
        [
            [costs, np.broadcast_to(first[:, None], (n, n))],
            [np.broadcast_to(second, (m, m)), np.zeros((m, n))],
        ]
    )


def _least_sum(costs: Array, first: Array, second: Array, order: float) -> NDArray[np.int64]:
    """The column of each row, of what :func:`_with_diagonal` gives."""
    whole = _with_diagonal(costs, first, second)
    if order != 1 and whole.any():
        whole = (whole / whole.max()) ** order
    return np.asarray(linear_sum_assignment(whole)[1])


def _least_greatest(costs: Array, first: Array, second: Array) -> NDArray[np.int64]:
    """The column of each row, of what :func:`_with_diagonal` gives."""

    def suffices(bound: float) -> bool:
        # Where one matching covers all of the first that must be met, and another all of the
        # second, there is one that covers both (Mendelsohn & Dulmage 1958).
        near = costs <= bound
        return all(
            (_most_pairs(allowed[far > bound]) >= 0).all()
            for allowed, far in ((near, first), (near.T, second))
        )

    candidates = np.unique(np.concatenate([[0.0], costs.ravel(), first, second]))
    bound = candidates[bisect_left(candidates, True, key=suffices)]
    return _most_pairs(_with_diagonal(costs, first, second) <= bound)


def _most_pairs(allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The column of each row, -1 for none."""
    return np.asarray(maximum_bipartite_matching(csr_matrix(allowed), perm_type="column"))
