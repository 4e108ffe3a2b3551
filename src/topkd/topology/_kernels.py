"""The compiled kernels behind :mod:`topkd.topology.rips`: distances, spanning trees, lengths.

They read points or distance matrices of any float type, compute in float64, release the GIL and do
not allocate per cloud. Edges are totally ordered by (length, i, j) with i < j, so the minimum
spanning tree is unique and results do not depend on the order of traversal. For points, squared
lengths are compared.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from topkd.topology.compiled import compiled

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Re-association lets sums vectorize. Do not use fastmath=True: it assumes that there are no NaN and
# no infinities, which these kernels have to detect.
SUMS = {"reassoc", "contract"}
FINITE = SUMS | {"nnan", "nsz"}  # for validated input; lets minima vectorize too
TILE = 4  # distances that are summed in parallel


MATRIX = 256  # maximum points for a full distance matrix, which fits into a core's cache


class Work(NamedTuple):
    """Workspace of a thread for clouds of up to n points."""

    label: Integers  # (n), indices of the points in the padded cloud
    points: Floats  # (n + TILE, d)
    distances: Floats  # (n + TILE, n + TILE); squared where points are given
    outside: Integers  # (n), points outside the tree
    gap: Floats  # (n), distances of these to the tree
    near: Integers  # (n), nearest points of the tree
    joined: Floats  # (d), point that was added last
    row: Floats  # (n + TILE), its distances to the points outside
    edges: Integers  # (n, 2), edges of the tree in order of insertion
    length: Floats  # (n)


def work(n: int, width: int, *, matrix: bool) -> Work:
    """Allocates a workspace for n points in ``width`` dimensions, optionally with a matrix."""
    side = n + TILE if matrix else 0
    return Work(
        label=np.empty(n, np.int64),
        points=np.zeros((n + TILE, width)),
        distances=np.zeros((side, side)),
        outside=np.empty(n, np.int64),
        gap=np.empty(n),
        near=np.empty(n, np.int64),
        joined=np.empty(width),
        row=np.empty(n + TILE),
        edges=np.empty((n, 2), np.int64),
        length=np.empty(n),
    )


@compiled(inline="always")
def rank(u, v, n):
    """Sort key of edge uv among edges of equal length."""
    return u * n + v if u < v else v * n + u


@compiled(fastmath=SUMS)
def _load_points(source, inside, work):
    m, check = 0, 0.0
    for i in range(source.shape[0]):
        if inside[i]:
            for k in range(source.shape[1]):
                value = np.float64(source[i, k])
                work.points[m, k] = value
                check += value - value  # NaN for NaN and infinity
            work.label[m] = i
            m += 1
    return m if check == 0.0 else 0


@compiled()
def _load_distances(source, inside, work):
    m = 0
    for i in range(source.shape[0]):
        if inside[i]:
            work.label[m] = i
            m += 1
    for a in range(m):
        for b in range(a + 1):
            value = source[work.label[a], work.label[b]]
            if not (0.0 <= value < np.inf) or value != source[work.label[b], work.label[a]]:
                return 0
            work.distances[a, b] = work.distances[b, a] = value
        if work.distances[a, a] != 0.0:
            return 0
    return m


@compiled()
def load(source, inside, given, matrix, work):
    """Copies unmasked points (n, d), or distances (n, n) if ``given``, to the workspace.

    Returns:
        Number of points; 0 if there are none or a value is invalid.
    """
    if given:
        return _load_distances(source, inside, work)
    n = _load_points(source, inside, work)
    if matrix:
        _squares(n, work)
    return n


@compiled(fastmath=FINITE, inline="always")
def _squares_from(joined, x, m, row):
    """Squared distances from a point to the first m rows of x, rounded up to a full tile."""
    for t in range(0, m, TILE):
        a = b = c = d = 0.0
        for k in range(x.shape[1]):
            value = joined[k]
            difference = value - x[t, k]
            a += difference * difference
            difference = value - x[t + 1, k]
            b += difference * difference
            difference = value - x[t + 2, k]
            c += difference * difference
            difference = value - x[t + 3, k]
            d += difference * difference
        row[t], row[t + 1], row[t + 2], row[t + 3] = a, b, c, d


@compiled(fastmath=SUMS)
def _squares_from_two(i, x, n, distances):
    """Squared distances from rows i and i + 1 of x to later rows, rounded up to a full tile."""
    for j in range(i + 1, n, TILE):
        a = b = c = d = e = f = g = h = 0.0
        for k in range(x.shape[1]):
            one, two = x[i, k], x[i + 1, k]
            value = x[j, k]
            a += (one - value) * (one - value)
            e += (two - value) * (two - value)
            value = x[j + 1, k]
            b += (one - value) * (one - value)
            f += (two - value) * (two - value)
            value = x[j + 2, k]
            c += (one - value) * (one - value)
            g += (two - value) * (two - value)
            value = x[j + 3, k]
            d += (one - value) * (one - value)
            h += (two - value) * (two - value)
        row = distances[i]
        row[j], row[j + 1], row[j + 2], row[j + 3] = a, b, c, d
        row = distances[i + 1]
        row[j], row[j + 1], row[j + 2], row[j + 3] = e, f, g, h


@compiled()
def _squares(n, work):
    """Squared distances of n points, both triangles, with a diagonal of exact zeros."""
    distances = work.distances
    for i in range(0, n - 1, 2):
        _squares_from_two(i, work.points, n, distances)
    for i in range(n):
        distances[i, i] = 0.0
        for j in range(i + 1, n):
            distances[j, i] = distances[i, j]


@compiled(fastmath=FINITE, inline="always")
def _approach(row, v, n, m, gap, near, outside):
    """Updates distances to the tree after adding point v; returns the least of them."""
    least, ties = np.inf, 0
    for t in range(m):
        closer = row[t] < gap[t]
        ties += row[t] == gap[t]
        near[t] = v if closer else near[t]
        gap[t] = row[t] if closer else gap[t]
        least = gap[t] if gap[t] < least else least
    if ties > 0:
        for t in range(m):
            w = outside[t]
            if row[t] == gap[t] and rank(v, w, n) < rank(near[t], w, n):
                near[t] = v
    return least


@compiled(fastmath=FINITE, inline="always")
def _first_at(least, n, m, gap, near, outside):
    """Position of the least distance to the tree; ties follow the order of edges."""
    best = 0
    while gap[best] != least:
        best += 1
    for t in range(best + 1, m):
        if gap[t] == least and rank(near[t], outside[t], n) < rank(near[best], outside[best], n):
            best = t
    return best


@compiled(fastmath=FINITE, inline="always")
def _copy(x, t, row):
    for k in range(x.shape[1]):
        row[k] = x[t, k]


@compiled(fastmath=FINITE)
def _prim(n, matrix, work):
    """Minimum spanning tree of n points by Prim's algorithm, starting at point 0.

    Without a matrix, distances from a point are computed when it is added, each pair once. Points
    outside the tree are kept contiguous, which overwrites ``work.points``.
    """
    x, row, outside, gap, near = work.points, work.row, work.outside, work.gap, work.near
    v, m = 0, n - 1
    for t in range(m):
        outside[t], gap[t], near[t] = t + 1, np.inf, 0
    if not matrix:
        _copy(x, 0, work.joined)
        for t in range(m):
            _copy(x, t + 1, x[t])
    for s in range(n - 1):
        if matrix:
            for t in range(m):
                row[t] = work.distances[v, outside[t]]
        else:
            _squares_from(work.joined, x, m, row)
        least = _approach(row, v, n, m, gap, near, outside)
        best = _first_at(least, n, m, gap, near, outside)
        v, u = outside[best], near[best]
        work.edges[s, 0], work.edges[s, 1] = min(u, v), max(u, v)
        work.length[s] = least
        m -= 1
        outside[best], gap[best], near[best] = outside[m], gap[m], near[m]
        if not matrix:
            _copy(x, best, work.joined)
            _copy(x, m, x[best])


@compiled()
def _write_sorted(count, n, work, result):
    """Writes the edges of the tree sorted by (length, i, j), by counting ranks."""
    edges, length, index = work.edges, work.length, work.label
    for s in range(count):
        place, equal, size = 0, 0, length[s]
        for t in range(count):
            place += length[t] < size
        for t in range(count):
            equal += length[t] == size
        if equal > 1:
            code = edges[s, 0] * n + edges[s, 1]
            for t in range(count):
                place += length[t] == size and edges[t, 0] * n + edges[t, 1] < code
        result[place, 0], result[place, 1] = index[edges[s, 0]], index[edges[s, 1]]


@compiled()
def merging_edges(source, inside, given, matrix, start, stop, work, edges):
    """Finds the death edges of H0, sorted by length, for clouds start to stop.

    Args:
        source: Points (clouds, n, d), or distances (clouds, n, n) if ``given``.
        inside: False for padding, (clouds, n).
        matrix: Whether ``work`` has a distance matrix, which is faster for small clouds.
        edges: Output, (clouds, n - 1, 2).

    Returns:
        The first cloud that :func:`load` rejects, or -1.
    """
    for cloud in range(start, stop):
        n = load(source[cloud], inside[cloud], given, matrix, work)
        if n == 0:
            return cloud
        _prim(n, matrix, work)
        _write_sorted(n - 1, n, work, edges[cloud])
    return -1


@compiled(fastmath=SUMS)
def lengths(points, edges, result):
    """Lengths (clouds, k) of edges (clouds, k, 2) between points (clouds, n, d)."""
    for cloud in range(edges.shape[0]):
        for k in range(edges.shape[1]):
            i, j = edges[cloud, k, 0], edges[cloud, k, 1]
            total = 0.0
            if i != j:  # padding may be NaN
                for c in range(points.shape[2]):
                    difference = np.float64(points[cloud, i, c]) - np.float64(points[cloud, j, c])
                    total += difference * difference
            result[cloud, k] = np.sqrt(total)


@compiled()
def pull_lengths(points, edges, length, grad, result):
    """Accumulates gradients with respect to points from gradients of lengths."""
    for cloud in range(edges.shape[0]):
        for k in range(edges.shape[1]):
            if length[cloud, k] > 0:  # the square root has no derivative at 0; 0 is a subgradient
                i, j = edges[cloud, k, 0], edges[cloud, k, 1]
                factor = grad[cloud, k] / length[cloud, k]
                for c in range(points.shape[2]):
                    step = factor * (points[cloud, i, c] - points[cloud, j, c])
                    result[cloud, i, c] += step
                    result[cloud, j, c] -= step
