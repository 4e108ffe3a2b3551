"""Losses on the logits: the papers in plain loops, laws and known cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import losses as reference
from reference.features import CLASSES, CLOUD, batch, features

from topkd.features import Features
from topkd.losses import CrossEntropy, Distillation, distillation


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_is_the_paper_in_plain_loops(smoothing):
    student, shown = features(3, seed=1), batch()
    found = CrossEntropy(label_smoothing=smoothing)(student, student, shown)
    expected = reference.cross_entropy(student.logits.tolist(), shown.target.tolist(), smoothing)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_of_a_guess_is_the_logarithm_of_the_classes():
    nothing = Features(torch.zeros(CLOUD, CLASSES), torch.zeros(CLOUD, 1))
    for smoothing in (0.0, 0.5):
        value = CrossEntropy(label_smoothing=smoothing)(nothing, nothing, batch())
        assert value.item() == pytest.approx(math.log(CLASSES))


@pytest.mark.parametrize("value", [-0.1, 1.0, 2.0, math.nan])
def test_refuses_a_smoothing_that_is_no_share(value):
    with pytest.raises(ValueError, match=rf"label_smoothing must be in \[0, 1\), got {value}"):
        CrossEntropy(label_smoothing=value)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_the_paper_in_plain_loops(temperature):
    student, teacher = features(3, seed=1), features(5, seed=2)
    found = Distillation(temperature=temperature)(student, teacher, batch())
    expected = reference.distillation(student.logits.tolist(), teacher.logits.tolist(), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_distillation_of_two_classes_is_known():
    # p = (3/4, 1/4) against (1/2, 1/2): ln 2 minus the entropy of p.
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation(student, teacher, temperature=1.0).item() == pytest.approx(expected)


def test_hot_distillation_compares_centred_logits():
    # Hinton et al., section 2.1: for great T the gradient is that of the squared difference.
    student, teacher = features(3, seed=1).logits, features(5, seed=2).logits
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    expected = gap.square().sum() / (2 * CLASSES * CLOUD)
    torch.testing.assert_close(
        distillation(student, teacher, temperature=1e4), expected, rtol=1e-3, atol=0
    )


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_distillation_sees_only_differences_of_logits(a, b):
    student, teacher = features(3, seed=1).logits, features(5, seed=2).logits
    torch.testing.assert_close(
        distillation(student + a, teacher + b), distillation(student, teacher)
    )


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_refuses_a_temperature_that_is_not_positive(value):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {value}"):
        Distillation(temperature=value)


def test_refuses_logits_of_other_shapes():
    with pytest.raises(ValueError, match=r"logits differ: student \(6, 4\), teacher \(6, 5\)"):
        distillation(torch.zeros(6, 4), torch.zeros(6, 5))
