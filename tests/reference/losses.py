"""The losses, written out."""

import math

Rows = list[list[float]]


def log_softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    scaled = [z / temperature for z in logits]
    whole = math.log(sum(math.exp(z) for z in scaled))
    return [z - whole for z in scaled]


def cross_entropy(logits: Rows, target: list[int], smoothing: float = 0.0) -> float:
    """With label smoothing: the target is 1 - s on the label plus s / classes on every class."""
    total = 0.0
    for row, label in zip(logits, target, strict=True):
        for c, log_p in enumerate(log_softmax(row)):
            share = smoothing / len(row) + (1 - smoothing) * (c == label)
            total -= share * log_p
    return total / len(logits)


def distillation(student: Rows, teacher: Rows, temperature: float) -> float:
    """T² times the mean divergence of the student's softened prediction from the teacher's."""
    total = 0.0
    for s_row, t_row in zip(student, teacher, strict=True):
        log_s, log_t = log_softmax(s_row, temperature), log_softmax(t_row, temperature)
        total += sum(math.exp(t) * (t - s) for s, t in zip(log_s, log_t, strict=True))
    return temperature**2 * total / len(student)


def mean_square(first: list[float], second: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) / len(first)
