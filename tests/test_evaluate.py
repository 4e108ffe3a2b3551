"""Metrics against plain loops and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import pdist, squareform
from scipy.stats import entropy, wasserstein_distance

from topkd.evaluation.metrics import Predictions, prediction_metrics, teacher_similarity


def predictions(width: int) -> Predictions:
    logits = 2 * torch.randn(96, 7, dtype=torch.float64)
    return Predictions(logits, torch.randn(96, width, dtype=torch.float64), torch.arange(96) % 7)


def test_prediction_metrics_agree_with_plain_loops():
    made = predictions(4)
    right = first_five = 0
    loss, bins = 0.0, [[0, 0.0] for _ in range(15)]
    for logits, label in zip(made.logits.tolist(), made.target.tolist(), strict=True):
        whole = sum(math.exp(z) for z in logits)
        order = sorted(range(7), key=lambda c: -logits[c])
        right += order[0] == label
        first_five += label in order[:5]
        loss -= math.log(math.exp(logits[label]) / whole)
        confidence = math.exp(logits[order[0]]) / whole
        number = min(14, math.ceil(confidence * 15) - 1)
        bins[number][0] += order[0] == label
        bins[number][1] += confidence
    found = prediction_metrics(made)
    assert found["top1"] == pytest.approx(100 * right / 96)
    assert found["top5"] == pytest.approx(100 * first_five / 96)
    assert found["nll"] == pytest.approx(loss / 96)
    assert found["ece"] == pytest.approx(100 * sum(abs(r - c) for r, c in bins) / 96)


def relative_deaths(points: np.ndarray) -> np.ndarray:
    deaths = minimum_spanning_tree(squareform(pdist(points))).data
    return deaths / deaths.mean()


def test_teacher_similarity_agrees_with_scipy():
    student, teacher = predictions(4), predictions(6)
    found = teacher_similarity(student, teacher, cloud_size=32)
    p, q = (made.logits.softmax(1).numpy() for made in (teacher, student))
    assert found["kl"] == pytest.approx(entropy(p, q, axis=1).mean())
    same = [a.argmax() == b.argmax() for a, b in zip(p, q, strict=True)]
    assert found["agreement"] == pytest.approx(100 * np.mean(same))
    distances = [
        wasserstein_distance(relative_deaths(a), relative_deaths(b))
        for a, b in zip(
            student.embedding.view(3, 32, 4).numpy(),
            teacher.embedding.view(3, 32, 6).numpy(),
            strict=True,
        )
    ]
    assert found["topological_distance"] == pytest.approx(np.mean(distances))
