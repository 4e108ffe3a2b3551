"""H2, and H1 of large clouds, by redzed-tda where it is installed: which edges are critical.

References:
    RedZeD (Kershaw, 2026) https://arxiv.org/abs/2606.06310
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_SIMPLICES = 200_000_000  # tetrahedra of a cloud: some gigabytes

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def is_installed() -> bool:
    """Tells whether :func:`critical_edges` can be called."""
    return find_spec("redzed_tda") is not None


def critical_edges(
    distances: Floats, max_dim: int, merging: Integers, higher: Integers
) -> Sequence[int]:
    """Finds the critical edges of one cloud.

    It compares lengths in float32; the edges are what is taken from it, no length.

    Args:
        distances: (n, n).
        max_dim: 1 or 2.
        merging: (n - 1, 2), written: the edges at which H0 classes die, by length.
        higher: (max_dim, rows, 2, 2), written: those at which classes of H1, H2 are born and die,
            by decreasing persistence.

    Returns:
        How many bars there are in each dimension from 1, also those for which there is no row.

    Raises:
        ImportError: If redzed-tda is not installed.
        ValueError: If H2 of so many points would not fit into memory.
    """
    try:
        from redzed_tda import rips
    except ImportError as error:
        raise ImportError("H2 needs redzed-tda: pip install 'topkd[topology]'") from error
    n = len(distances)
    tetrahedra = n * (n - 1) * (n - 2) * (n - 3) // 24
    if max_dim == 2 and tetrahedra > MOST_SIMPLICES:
        raise ValueError(
            f"H2 of {n} points has {tetrahedra / 1e6:.0f} million tetrahedra to look at, more than "
            f"{MOST_SIMPLICES / 1e6:.0f}: take fewer points"
        )
    _, pairs = rips(distances, max_dim, simplex_pairs=True)
    deaths = sorted(_longest_edge(distances, death) for _, death in pairs[0] if death)
    merging[: len(deaths)] = np.array([edge for _, *edge in deaths]).reshape(-1, 2)
    counts = []
    for dimension in range(1, max_dim + 1):
        bars = [
            (_longest_edge(distances, birth), _longest_edge(distances, death))
            for birth, death in pairs[dimension]
        ]
        bars = [(birth, death) for birth, death in bars if birth[0] < death[0]]
        bars.sort(key=lambda bar: (bar[0][0] - bar[1][0], bar[1]))
        for row, bar in zip(higher[dimension - 1], bars, strict=False):
            row[:] = [edge[1:] for edge in bar]
        counts.append(len(bars))
    return counts


def _longest_edge(distances: Floats, simplex: Sequence[Any]) -> tuple[float, int, int]:
    """The last of its edges in the order of (length, i, j)."""
    return max((distances[i, j], i, j) for i, j in combinations(sorted(simplex), 2))
