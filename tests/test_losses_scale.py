"""The scale of a cloud: the formula in plain loops, and what it does not depend on."""

import math
from itertools import combinations

import pytest
import torch
from reference.features import batch, features

from topkd.losses import CloudScale
from topkd.losses.functional import cloud_scale


def mean_distance(rows):
    pairs = list(combinations(rows, 2))
    return sum(math.dist(a, b) for a, b in pairs) / len(pairs)


def test_it_is_the_formula_in_plain_loops():
    student, teacher = features(3, seed=1), features(5, seed=2)
    ours, theirs = (mean_distance(f.embedding.tolist()) for f in (student, teacher))
    expected = (ours / theirs - 1) ** 2
    assert CloudScale()(student, teacher, batch()).item() == pytest.approx(expected, rel=1e-12)


def test_shape_does_not_matter():
    line = torch.arange(4.0, dtype=torch.float64)[:, None]
    other = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other *= mean_distance(line.tolist()) / mean_distance(other.tolist())
    assert cloud_scale(other, line).item() == pytest.approx(0, abs=1e-20)


def test_a_teacher_whose_points_coincide_gives_a_finite_loss():
    student = torch.randn(4, 2, requires_grad=True)
    value = cloud_scale(student, torch.zeros(4, 2))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
