"""The compiled kernel behind :func:`topkd.topology.matched.single_linkage`."""

import numpy as np

from topkd.topology.compiled import compiled


@compiled()
def attaining_edges(edges, result):
    """Finds the longest edge on the path between each pair of points of a spanning tree.

    Edges are sorted by length, so the edge that merges two clusters is the longest on every path
    between them. Each pair is written once, when its clusters merge: O(n²) per cloud.

    Args:
        edges: Edges of spanning trees, sorted by length, (clouds, n - 1, 2).
        result: Output, (clouds, n (n - 1) / 2): the row of ``edges`` for each pair, in row-major
            order of the upper triangle.
    """
    clouds, merges, _ = edges.shape
    n = merges + 1
    root, following, last = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    for cloud in range(clouds):
        for v in range(n):  # each point is a cluster; clusters are linked lists of points
            root[v], following[v], last[v] = v, -1, v
        for e in range(merges):
            a, b = root[edges[cloud, e, 0]], root[edges[cloud, e, 1]]
            u = a
            while u >= 0:
                v = b
                while v >= 0:
                    i, j = min(u, v), max(u, v)
                    result[cloud, i * n - i * (i + 1) // 2 + j - i - 1] = e
                    v = following[v]
                u = following[u]
            v = b
            while v >= 0:
                root[v] = a
                v = following[v]
            following[last[a]] = b
            last[a] = last[b]
