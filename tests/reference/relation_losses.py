"""Losses on relations within a batch, written out; and slopes by finite differences."""

import math
from collections.abc import Callable
from itertools import permutations

Rows = list[list[float]]


def slopes(function: Callable[[Rows], float], rows: Rows, step: float = 1e-6) -> Rows:
    """Central differences of a function of rows, at every number."""
    found = []
    for i, row in enumerate(rows):
        found.append([])
        for k in range(len(row)):
            ends = []
            for sign in (1, -1):
                moved = [list(r) for r in rows]
                moved[i][k] += sign * step
                ends.append(function(moved))
            found[-1].append((ends[0] - ends[1]) / (2 * step))
    return found


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def unit(a: list[float]) -> list[float]:
    length = math.sqrt(dot(a, a))
    return [x / length if length else 0.0 for x in a]


def mean_square_of(first: Rows, second: Rows) -> float:
    gaps = [
        (a - b) ** 2
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return sum(gaps) / len(gaps)


def similarity_preserving(student: Rows, teacher: Rows) -> float:
    grams = [[unit([dot(a, b) for b in rows]) for a in rows] for rows in (student, teacher)]
    return mean_square_of(*grams)


def neighbor_products(student: Rows, teacher: Rows) -> float:
    """As in the authors' code: of each sample and the next of the batch."""
    gaps = [[abs(x) for x in minus(s, t)] for s, t in zip(student, teacher, strict=True)]
    return sum(dot(a, b) for a, b in zip(gaps, gaps[1:], strict=False)) / (len(gaps) - 1)


def products_over_all_orders(student: Rows, teacher: Rows) -> float:
    values = [
        neighbor_products([student[i] for i in order], [teacher[i] for i in order])
        for order in permutations(range(len(student)))
    ]
    return sum(values) / len(values)


def correlation_kernel(student: Rows, teacher: Rows, gamma: float, order: int) -> float:
    def kernel(a: list[float], b: list[float]) -> float:
        cosine = dot(unit(a), unit(b))
        terms = ((2 * gamma * cosine) ** p / math.factorial(p) for p in range(order + 1))
        return math.exp(-2 * gamma) * sum(terms)

    return mean_square_of(
        *([[kernel(a, b) for b in rows] for a in rows] for rows in (student, teacher))
    )


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def relational_distances(student: Rows, teacher: Rows) -> float:
    scaled = []
    for rows in (student, teacher):
        lengths = [math.dist(a, b) for a in rows for b in rows]
        above = [length for length in lengths if length > 0]
        mean = sum(above) / len(above)
        scaled.append([length / mean for length in lengths])
    return sum(huber(x) for x in minus(*scaled)) / len(scaled[0])


def relational_angles(student: Rows, teacher: Rows) -> float:
    cosines = []
    for rows in (student, teacher):
        cosines.append(
            [
                dot(unit(minus(a, corner)), unit(minus(b, corner)))
                for corner in rows
                for a in rows
                for b in rows
            ]
        )
    return sum(huber(x) for x in minus(*cosines)) / len(cosines[0])


def probabilistic_transfer(student: Rows, teacher: Rows, epsilon: float = 1e-7) -> float:
    likely = []
    for rows in (student, teacher):
        likely.append([])
        for a in rows:
            similar = [(1 + dot(unit(a), unit(b))) / 2 for b in rows]
            likely[-1] += [s / sum(similar) for s in similar]
    terms = [t * math.log((t + epsilon) / (s + epsilon)) for s, t in zip(*likely, strict=True)]
    return sum(terms) / len(terms)


def contrast(
    similarity: Rows, z: float, images: int, temperature: float, epsilon: float = 1e-7
) -> float:
    """As in the authors' code, with the small number that they add to the denominators."""
    total = 0.0
    for first, *others in similarity:
        odds = len(others) / images
        p = math.exp(first / temperature) / z
        total += math.log(p / (p + odds + epsilon))
        for other in others:
            p = math.exp(other / temperature) / z
            total += math.log(odds / (p + odds + epsilon))
    return -total / len(similarity)
