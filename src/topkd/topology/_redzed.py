"""Critical edges of H2, and of H1 of large clouds, by redzed-tda if it is installed.

References:
    RedZeD (Kershaw, 2026) https://arxiv.org/abs/2606.06310
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_TETRAHEDRA = 200_000_000  # per cloud: a few gigabytes

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def is_installed() -> bool:
    """Returns whether redzed-tda is installed."""
    return find_spec("redzed_tda") is not None


def critical_edges(
    distances: Floats, merging: Integers, higher: Sequence[tuple[Integers, Integers]]
) -> list[int]:
    """Finds the critical edges of one cloud.

    redzed-tda compares lengths in float32. Only its edges are used, not its lengths.

    Args:
        distances: (n, n).
        merging: Output, (n - 1, 2): death edges of H0, sorted by length.
        higher: Outputs for H1, or for H1 and H2: birth edges and death edges, both (rows, 2), in
            order of decreasing persistence.

    Returns:
        Number of bars in each dimension from 1, including those beyond the rows.

    Raises:
        ImportError: If redzed-tda is not installed.
        ValueError: If H2 of so many points exceeds the limit on tetrahedra.
    """
    try:
        from redzed_tda import rips
    except ImportError as error:
        raise ImportError("H2 needs redzed-tda: pip install 'topkd[topology]'") from error
    n, max_dim = len(distances), len(higher)
    tetrahedra = n * (n - 1) * (n - 2) * (n - 3) // 24
    if max_dim == 2 and tetrahedra > MAX_TETRAHEDRA:
        raise ValueError(
            f"H2 of {n} points has {tetrahedra / 1e6:.0f} million tetrahedra, more than the limit "
            f"of {MAX_TETRAHEDRA / 1e6:.0f} million: use fewer points"
        )
    _, pairs = rips(distances, max_dim, simplex_pairs=True)
    merged = _longest_edges(distances, [death for _, death in pairs[0] if death])
    merging[: len(merged.length)] = merged.ends[np.lexsort([*merged.ends.T[::-1], merged.length])]
    counts = []
    for (born, dead), bars in zip(higher, pairs[1:], strict=True):
        births = _longest_edges(distances, [birth for birth, _ in bars])
        deaths = _longest_edges(distances, [death for _, death in bars])
        persistence = deaths.length - births.length
        order = np.lexsort([*deaths.ends.T[::-1], deaths.length, -persistence])
        order = order[persistence[order] > 0]
        counts.append(len(order))
        order = order[: len(born)]
        born[: len(order)], dead[: len(order)] = births.ends[order], deaths.ends[order]
    return counts


class _Edges(NamedTuple):
    length: Floats  # (simplices)
    ends: Integers  # (simplices, 2), i < j


def _longest_edges(distances: Floats, simplices: Sequence[Sequence[int]]) -> _Edges:
    """Last edge of each simplex in the order (length, i, j); all have the same dimension."""
    if not simplices:
        return _Edges(np.empty(0), np.empty((0, 2), np.int64))
    vertices = np.sort(np.array(simplices), axis=1)
    sides = list(combinations(range(vertices.shape[1]), 2))[
        ::-1
    ]  # reversed, so that argmax selects the last of equal edges
    i, j = (vertices[:, list(column)] for column in zip(*sides, strict=True))
    lengths, each = distances[i, j], np.arange(len(vertices))
    longest = lengths.argmax(1)
    ends = np.stack([i[each, longest], j[each, longest]], axis=1)
    return _Edges(lengths[each, longest], ends)
