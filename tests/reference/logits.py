"""The losses on logits, written out on plain numbers, row by row."""

import math
import statistics

from reference.losses import Rows, log_softmax


def softmax(logits, temperature=1.0):
    return [math.exp(p) for p in log_softmax(logits, temperature)]


def divergence(first, second):
    return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))


def slopes(function, rows: Rows, step: float = 1e-5) -> Rows:
    """Central differences of a function of rows of numbers."""

    def at(i, j, move):
        moved = [list(row) for row in rows]
        moved[i][j] += move
        return function(moved)

    return [
        [(at(i, j, step) - at(i, j, -step)) / (2 * step) for j in range(len(row))]
        for i, row in enumerate(rows)
    ]


def soft_cross_entropy(logits: Rows, soft: Rows, smoothing: float) -> float:
    total = 0.0
    for row, shares in zip(logits, soft, strict=True):
        for log_p, share in zip(log_softmax(row), shares, strict=True):
            total -= (smoothing / len(row) + (1 - smoothing) * share) * log_p
    return total / len(logits)


def standardized(rows: Rows) -> Rows:
    scaled = []
    for row in rows:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((z - mean) ** 2 for z in row) / (len(row) - 1))
        scaled.append([(z - mean) / (deviation + 1e-7) for z in row])
    return scaled


def distillation(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += divergence(softmax(t, temperature), softmax(s, temperature))
    return temperature**2 * total / len(student)


def without(row, label):
    kept = [p for c, p in enumerate(row) if c != label]
    return [p / sum(kept) for p in kept]


def decoupled(student, teacher, target, alpha, beta, temperature):
    total = 0.0
    for s_row, t_row, label in zip(student, teacher, target, strict=True):
        s, t = softmax(s_row, temperature), softmax(t_row, temperature)
        total += alpha * divergence([t[label], 1 - t[label]], [s[label], 1 - s[label]])
        total += beta * divergence(without(t, label), without(s, label))
    return temperature**2 * total / len(student)


def normalized(student, teacher, target, gamma, temperature):
    total = 0.0
    for s_row, t_row, label in zip(student, teacher, target, strict=True):
        total -= softmax(t_row)[label] * math.log(softmax(s_row)[label])
        s = without(softmax(s_row, temperature), label)
        t = without(softmax(t_row, temperature), label)
        for p, q in zip(s, t, strict=True):
            total -= gamma * temperature**2 * q * math.log(p)
    return total / len(student)


def correlation(first, second, damping):
    a, b = ([v - statistics.fmean(x) for v in x] for x in (first, second))
    lengths = math.hypot(*a) * math.hypot(*b)
    return sum(p * q for p, q in zip(a, b, strict=True)) / (lengths + damping)


def bounded_correlation(first, second, least):
    """As in torchdistill: each norm is at least so large, and nothing is added."""
    a, b = ([v - statistics.fmean(x) for v in x] for x in (first, second))
    lengths = max(math.hypot(*a), least) * max(math.hypot(*b), least)
    return sum(p * q for p, q in zip(a, b, strict=True)) / lengths


def dist(student, teacher, beta, gamma, temperature, damping):
    s, t = ([softmax(row, temperature) for row in rows] for rows in (student, teacher))
    rows = [correlation(a, b, damping) for a, b in zip(s, t, strict=True)]
    columns = [
        correlation([row[c] for row in s], [row[c] for row in t], damping) for c in range(len(s[0]))
    ]
    return temperature**2 * (
        beta * (1 - statistics.fmean(rows)) + gamma * (1 - statistics.fmean(columns))
    )


def transformed(student, teacher, exponent, weighted):
    total = 0.0
    for s_row, t_row in zip(student, teacher, strict=True):
        powers = [p**exponent for p in softmax(t_row)]
        value = divergence([p / sum(powers) for p in powers], softmax(s_row))
        total += sum(powers) * value if weighted else value
    return total / len(student)


def products(rows):
    return [[sum(p * q for p, q in zip(a, b, strict=True)) for b in rows] for a in rows]


def square_gaps(first, second):
    """The squared distance of every two rows."""
    return [
        sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        for a, b in zip(first, second, strict=True)
    ]


def transposed(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def multi_level(student, teacher, views, faithful, standardize, base=4):
    """As in the authors' code: a base temperature, and 2, 3, 5 and 6."""
    n = len(student) // views

    def instances(view, temperature):
        s, t = student[view * n : view * n + n], teacher[view * n : view * n + n]
        if standardize:
            s, t = standardized(s), standardized(t)
        return [
            temperature**2 * divergence(softmax(b, temperature), softmax(a, temperature))
            for a, b in zip(s, t, strict=True)
        ]

    def whole(view):
        s_rows, t_rows = student[view * n : view * n + n], teacher[view * n : view * n + n]
        confidence = [max(softmax(row)) for row in t_rows]
        mass = [sum(column) for column in transposed([softmax(row) for row in t_rows])]
        rows = [v <= statistics.median(confidence) for v in confidence]
        columns = [v <= statistics.median(mass) for v in mass]
        total = 0.0
        for temperature in (base, 3, 5, 2, 6):
            s = [softmax(row, temperature) for row in s_rows]
            t = [softmax(row, temperature) for row in t_rows]
            for values, chosen in (
                (instances(view, temperature), rows),
                (square_gaps(products(s), products(t)), rows),
                (square_gaps(products(transposed(s)), products(transposed(t))), columns),
            ):
                if faithful:
                    total += statistics.fmean(values) * sum(chosen) / len(chosen)
                else:
                    kept = [v for v, is_chosen in zip(values, chosen, strict=True) if is_chosen]
                    total += sum(kept) / len(values)
        return total

    if views == 1:
        return whole(0)
    if not faithful:
        return whole(0) + whole(1)
    strong = [(base, 1), (3, 1), (5, 1), (2, 0), (6, 0)]  # and the view that is really taken
    return whole(0) + sum(statistics.fmean(instances(view, t)) for t, view in strong)


def hard(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total -= math.log(softmax(s)[t.index(max(t))])
    return total / len(student)
