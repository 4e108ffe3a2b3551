"""Persistent homology over Z/2 by the textbook: every simplex, one boundary matrix, reduced."""

from itertools import combinations


def diagrams(distances: list[list[float]], max_dim: int) -> list[list[tuple[float, float]]]:
    """The bars of every dimension, sorted; none of length zero, none that never dies."""
    n = len(distances)
    simplices = [
        (max((distances[i][j] for i, j in combinations(simplex, 2)), default=0.0), size, simplex)
        for size in range(1, max_dim + 3)
        for simplex in combinations(range(n), size)
    ]
    simplices.sort()
    place = {simplex: row for row, (_, _, simplex) in enumerate(simplices)}
    lowest: dict[int, set[int]] = {}  # lowest row of a reduced column -> that column
    bars: list[list[tuple[float, float]]] = [[] for _ in range(max_dim + 1)]
    for death, size, simplex in simplices:
        column = {place[face] for face in combinations(simplex, size - 1)} if size > 1 else set()
        while column and max(column) in lowest:
            column ^= lowest[max(column)]
        if column:
            lowest[max(column)] = column
            birth = simplices[max(column)][0]
            if birth < death and size - 2 <= max_dim:
                bars[size - 2].append((birth, death))
    return [sorted(of_dimension) for of_dimension in bars]
