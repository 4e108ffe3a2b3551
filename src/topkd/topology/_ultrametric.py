"""The compiled kernel behind :func:`topkd.topology.matched.single_linkage`."""

import numpy as np

from topkd.topology.compiled import compiled


@compiled()
def attaining_edges(edges, result):
    """Finds the greatest edge on the path between any two points of a spanning tree.

    Edges come by length, so that the one which joins two clusters is the greatest on every path
    from one to the other: each pair is written once, when its clusters merge, in O(n²) for all.

    Args:
        edges: Spanning trees by length, (clouds, n - 1, 2).
        result: (clouds, n (n - 1) / 2), for pairs in the order of the upper triangle, row by row,
            the row of ``edges`` that holds their edge.
    """
    clouds, merges, _ = edges.shape
    n = merges + 1
    root, following, last = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    for cloud in range(clouds):
        for v in range(n):  # every point is a cluster, and clusters are chains of points
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
