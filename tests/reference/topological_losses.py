"""The losses on shape, written out, by their own trees or by others."""

import math
from statistics import median

from reference.topology import kruskal, quantile

Points = list[list[float]]
Edges = list[tuple[int, int]]


def pruefer(edges: Edges, n: int) -> tuple[int, ...]:
    """The sequence that a tree on n labeled vertices is told by: each of n^(n-2) is one tree."""
    neighbors = {v: set() for v in range(n)}
    for i, j in edges:
        neighbors[i].add(j)
        neighbors[j].add(i)
    sequence = []
    for _ in range(n - 2):
        leaf = min(v for v, near in neighbors.items() if len(near) == 1)
        (joined,) = neighbors.pop(leaf)
        neighbors[joined].remove(leaf)
        sequence.append(joined)
    return tuple(sequence)


def tree_of(sequence: tuple[int, ...], n: int) -> set[tuple[int, int]]:
    """The tree that a sequence tells."""
    degree = [1 + sequence.count(v) for v in range(n)]
    edges = set()
    for joined in sequence:
        leaf = degree.index(1)
        edges.add((min(leaf, joined), max(leaf, joined)))
        degree[leaf], degree[joined] = 0, degree[joined] - 1
    edges.add(tuple(v for v in range(n) if degree[v] == 1))
    return edges


def spanning_tree(points: Points) -> Edges:
    return [(i, j) for _, i, j in kruskal(points)]


def lengths(points: Points, edges: Edges) -> list[float]:
    return [math.dist(points[i], points[j]) for i, j in edges]


def scale_of(name: str, points: Points) -> float:
    """What the distances between points are divided by."""
    n = len(points)
    pairs = [math.dist(points[i], points[j]) for i in range(n) for j in range(i)]
    mean = sum(pairs) / len(pairs)
    return {"none": 1.0, "mean": mean, "max": max(pairs), "quantile": quantile(pairs, 0.9)}[name]


def edge_matching(student: Points, teacher: Points, trees: list[Edges], scales) -> float:
    total = 0.0
    for edges in trees:
        for s, t in zip(lengths(student, edges), lengths(teacher, edges), strict=True):
            total += (s / scales[0] - t / scales[1]) ** 2
    return total / (2 * len(student))


def rtd_lite(student: Points, teacher: Points, scales, tree: Edges | None = None) -> float:
    n = len(student)
    s = [[math.dist(a, b) / scales[0] for b in student] for a in student]
    t = [[math.dist(a, b) / scales[1] for b in teacher] for a in teacher]
    least = [[min(s[i][j], t[i][j]) for j in range(n)] for i in range(n)]

    def weight(matrix):
        if tree is not None:
            return sum(matrix[i][j] for i, j in tree)
        return prim(matrix)

    return (weight(s) + weight(t)) / 2 - weight(least)


def prim(matrix: Points) -> float:
    """The weight of the minimum spanning tree."""
    inside, total = {0}, 0.0
    while len(inside) < len(matrix):
        nearest = min(
            (matrix[i][j], j) for i in inside for j in range(len(matrix)) if j not in inside
        )
        total += nearest[0]
        inside.add(nearest[1])
    return total


def heights(points: Points, edges: Edges) -> dict[tuple[int, int], float]:
    """For each two points the longest edge on the path between them in a tree."""
    found = {}

    def walk(start, here, came_from, longest):
        for i, j in edges:
            if here in (i, j) and (there := i + j - here) != came_from:
                greatest = max(longest, math.dist(points[i], points[j]))
                found[start, there] = greatest
                walk(start, there, here, greatest)

    for start in range(len(points)):
        walk(start, start, -1, 0.0)
    return found


def ultrametric(student: Points, teacher: Points, trees: list[Edges], scales, order) -> float:
    ours, theirs = heights(student, trees[0]), heights(teacher, trees[1])
    gaps = [abs(ours[pair] / scales[0] - theirs[pair] / scales[1]) ** order for pair in ours]
    return sum(gaps) / len(gaps)


def lifetimes(points: Points, tree: Edges | None = None) -> list[float]:
    """Of the directions of points."""
    directions = []
    for point in points:
        length = math.hypot(*point)
        directions.append([x / length for x in point] if length > 0 else point)
    return sorted(lengths(directions, spanning_tree(directions) if tree is None else tree))


def density(u: float, diagram: list[float], bandwidth: float) -> float:
    total = 0.0
    for v in diagram:
        total += math.exp(-((u - v) ** 2) / (2 * bandwidth**2)) * v / (1 + v)
    return total


def persistent_cross_entropy(student, teacher, bandwidth, tolerance, form) -> float:
    plain, mass = 0.0, 0.0
    for u in teacher:
        gap = density(u, student, bandwidth) - density(u, teacher, bandwidth)
        share = u / sum(teacher)
        plain += share * gap**2 / (2 * tolerance**2)
        mass += share * math.exp(-(gap**2) / (2 * tolerance**2))
    return plain if form == "pce" else plain + math.log(mass)


def calibrated(pairs) -> tuple[float, float]:
    """Bandwidth and tolerance from lifetimes of students and teachers."""
    medians, differences = [], []
    for _, teacher in pairs:
        gaps = [abs(a - b) for i, a in enumerate(teacher) for b in teacher[:i] if a != b]
        if gaps:
            medians.append(median(gaps))
    bandwidth = median(medians)
    for student, teacher in pairs:
        for u in teacher:
            gap = density(u, student, bandwidth) - density(u, teacher, bandwidth)
            if gap != 0:
                differences.append(abs(gap))
    return bandwidth, median(differences)
