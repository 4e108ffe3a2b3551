"""The compiled kernels behind :mod:`topkd.topology.rips`: which edges are critical.

They work on detached float64 points, release the GIL and allocate nothing inside a cloud. Edges are
totally ordered by (length, i, j) with i < j, so that the spanning tree is unique and results do not
depend on the order in which anything is visited.
"""

import numpy as np
from numba import njit

# Sums may be re-associated, so that they vectorise. Never fastmath=True: it also assumes that there
# is neither NaN nor infinity.
SUMS = {"reassoc", "contract"}


@njit(nogil=True, cache=True, inline="always")
def _rank(u, v, n):
    """Position of edge uv among edges of equal length."""
    return u * n + v if u < v else v * n + u


@njit(nogil=True, cache=True, fastmath=SUMS)
def _square_distances(points, v, outside, m, row):
    """Squared distances from point v to the first m points outside the tree, in difference form."""
    width = points.shape[1]
    for t in range(m):
        w = outside[t]
        total = 0.0
        for k in range(width):
            difference = points[v, k] - points[w, k]
            total += difference * difference
        row[t] = total


@njit(nogil=True, cache=True)
def _prim(points, edges, length, gap, near, outside, row):
    """Minimum spanning tree of one cloud (n, d) into ``edges`` (n - 1, 2), i < j, as it grows.

    Matrix-free: the distances from a point are computed when it joins the tree, each pair once.
    """
    n = len(points)
    for v in range(n):
        gap[v], near[v] = np.inf, 0
    for t in range(n - 1):
        outside[t] = t + 1
    v, m = 0, n - 1
    for s in range(n - 1):
        _square_distances(points, v, outside, m, row)
        best = 0
        for t in range(m):
            w = outside[t]
            if row[t] < gap[w] or (row[t] == gap[w] and _rank(v, w, n) < _rank(near[w], w, n)):
                gap[w], near[w] = row[t], v
            b = outside[best]
            if gap[w] < gap[b] or (
                gap[w] == gap[b] and _rank(near[w], w, n) < _rank(near[b], b, n)
            ):
                best = t
        v = outside[best]
        edges[s, 0], edges[s, 1] = min(near[v], v), max(near[v], v)
        length[s] = gap[v]
        m -= 1
        outside[best] = outside[m]


@njit(nogil=True, cache=True)
def _sort_edges(edges, length):
    """Sorts edges by (length, i, j), in place: insertion, for the rows of a tree."""
    for s in range(1, len(edges)):
        size, i, j = length[s], edges[s, 0], edges[s, 1]
        t = s - 1
        while t >= 0 and (
            length[t] > size
            or (length[t] == size and (edges[t, 0] > i or (edges[t, 0] == i and edges[t, 1] > j)))
        ):
            length[t + 1], edges[t + 1, 0], edges[t + 1, 1] = length[t], edges[t, 0], edges[t, 1]
            t -= 1
        length[t + 1], edges[t + 1, 0], edges[t + 1, 1] = size, i, j


@njit(nogil=True, cache=True)
def merging_edges(points, edges):
    """Edges (clouds, n - 1, 2) at which components of points (clouds, n, d) merge, by length."""
    clouds, n, _ = points.shape
    length, gap, row = np.empty(max(n - 1, 0)), np.empty(n), np.empty(n)
    near, outside = np.empty(n, np.int64), np.empty(n, np.int64)
    for cloud in range(clouds):
        _prim(points[cloud], edges[cloud], length, gap, near, outside, row)
        _sort_edges(edges[cloud], length)
