"""Losses on the logits: the papers in plain loops, laws and known cases."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from reference import logits as written_out
from reference import losses as reference
from reference.features import CLASSES, CLOUD, batch, features
from torch.autograd import gradcheck

from topkd.features import Features
from topkd.losses import CE, CTKD, DIST, DKD, KD, MLKD, NKD, TTM, WTTM
from topkd.losses.functional import (
    correlation_distillation,
    decoupled_distillation,
    distillation,
    normalized_distillation,
    standardized,
    transformed_teacher_matching,
)

TARGET = batch().target.tolist()


def of_standardized(oracle, *options):
    def standardize_first(s, t):
        return oracle(written_out.standardized(s), written_out.standardized(t), *options)

    return standardize_first


# What is tested -> the loss, and the same of the rows of two networks in plain loops.
ORACLES = {
    "kd": (KD(), lambda s, t: written_out.distillation(s, t, 4.0)),
    "kd, standardized": (
        KD(temperature=2.0, standardize=True),
        of_standardized(written_out.distillation, 2.0),
    ),
    "dkd": (
        DKD(),
        lambda s, t: written_out.decoupled(s, t, TARGET, 1.0, 8.0, 4.0),
    ),
    "dkd, cold": (
        DKD(alpha=0.3, beta=0.7, temperature=0.5),
        lambda s, t: written_out.decoupled(s, t, TARGET, 0.3, 0.7, 0.5),
    ),
    "dkd, standardized": (
        DKD(beta=2.0, temperature=2.0, standardize=True),
        of_standardized(written_out.decoupled, TARGET, 1.0, 2.0, 2.0),
    ),
    "nkd": (NKD(), lambda s, t: written_out.normalized(s, t, TARGET, 1.5, 1.0)),
    "nkd, hot": (
        NKD(gamma=3.5, temperature=3.0),
        lambda s, t: written_out.normalized(s, t, TARGET, 3.5, 3.0),
    ),
    "dist": (
        DIST(),
        lambda s, t: written_out.dist(s, t, 1.0, 1.0, 1.0, 1e-8),
    ),
    "dist, hot": (
        DIST(beta=2.0, gamma=0.5, temperature=4.0, damping=0.0),
        lambda s, t: written_out.dist(s, t, 2.0, 0.5, 4.0, 0.0),
    ),
    "dist, damped": (
        DIST(damping=0.1),
        lambda s, t: written_out.dist(s, t, 1.0, 1.0, 1.0, 0.1),
    ),
    "ttm": (
        TTM(),
        lambda s, t: written_out.transformed(s, t, 0.1, weighted=False),
    ),
    "wttm": (
        WTTM(),
        lambda s, t: written_out.transformed(s, t, 0.2, weighted=True),
    ),
}
EVERY = {name: loss for name, (loss, _) in ORACLES.items()} | {
    "ce": CE(),
    "ctkd": CTKD(),
    "ctkd of dkd": CTKD(of="dkd"),
    "mlkd": MLKD(),
    "mlkd as meant": MLKD(faithful=False, standardize=True),
}


@pytest.mark.parametrize("name", ORACLES)
def test_value_and_gradient_are_the_paper_in_plain_loops(name):
    loss, oracle = ORACLES[name]
    student, teacher = features(3, seed=1), features(5, seed=2)
    student = replace(student, logits=3 * student.logits)  # so that predictions differ enough
    rows = teacher.logits.tolist()
    value = loss(replace(student, logits=student.logits.requires_grad_()), teacher, batch())
    value.backward()
    assert value.item() == pytest.approx(oracle(student.logits.tolist(), rows), rel=1e-11)
    expected = written_out.slopes(lambda s: oracle(s, rows), student.logits.tolist())
    torch.testing.assert_close(
        student.logits.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", ORACLES)
def test_gradient_matches_finite_differences(name):
    loss, teacher = ORACLES[name][0], features(5, seed=2)
    logits = features(3, seed=1).logits.requires_grad_()
    assert gradcheck(lambda z: loss(Features(z, z), teacher, batch()), logits)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("far", ["apart", "together", "one of them", "both flat"])
def test_extreme_logits_are_finite_in_single_precision(name, far):
    student, teacher = (torch.full((CLOUD, CLASSES), -1e4) for _ in range(2))
    student[:, 0], teacher[:, 1] = 1e4, 1e4
    if far == "together":
        teacher = student.clone()
    elif far == "one of them":
        student = torch.zeros(CLOUD, CLASSES)
    elif far == "both flat":
        student, teacher = torch.zeros(CLOUD, CLASSES), torch.zeros(CLOUD, CLASSES)
    student.requires_grad_()
    value = EVERY[name](Features(student, student), Features(teacher, teacher), batch())
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"ce"}))
def test_refuses_logits_of_other_classes(name):
    student, teacher = torch.zeros(CLOUD, CLASSES), torch.zeros(CLOUD, CLASSES + 1)
    message = r"logits differ: student \(6, 4\), teacher \(6, 5\)"
    with pytest.raises(ValueError, match=message):
        EVERY[name](Features(student, student), Features(teacher, teacher), batch())


@pytest.mark.parametrize(
    ("loss", "option", "value"),
    [
        (KD, "temperature", math.inf),
        (DKD, "temperature", 0.0),
        (NKD, "temperature", -1.0),
        (DIST, "temperature", math.nan),
        (TTM, "exponent", 0.0),
        (WTTM, "exponent", -0.2),
    ],
)
def test_refuses_an_option_that_is_not_positive(loss, option, value):
    with pytest.raises(ValueError, match=f"{option} must be positive, got {value}"):
        loss(**{option: value})


@pytest.mark.parametrize(
    ("loss", "option"),
    [
        (DKD, "alpha"),
        (DKD, "beta"),
        (NKD, "gamma"),
        (DIST, "beta"),
        (DIST, "gamma"),
        (DIST, "damping"),
    ],
)
def test_refuses_a_negative_weight(loss, option):
    with pytest.raises(ValueError, match=f"{option} must not be negative, got -0.5"):
        loss(**{option: -0.5})


# --- Cross-entropy -------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_is_the_paper_in_plain_loops(smoothing):
    student, shown = features(3, seed=1), batch()
    found = CE(label_smoothing=smoothing)(student, student, shown)
    expected = reference.cross_entropy(student.logits.tolist(), shown.target.tolist(), smoothing)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_of_a_guess_is_the_logarithm_of_the_classes():
    nothing = Features(torch.zeros(CLOUD, CLASSES), torch.zeros(CLOUD, 1))
    for smoothing in (0.0, 0.5):
        value = CE(label_smoothing=smoothing)(nothing, nothing, batch())
        assert value.item() == pytest.approx(math.log(CLASSES))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_takes_the_labels_of_mixed_images(smoothing):
    student, shown = features(3, seed=1), batch()
    shares = torch.full((CLOUD, 1), 0.7), torch.full((CLOUD, 1), 0.3)
    one, other = shown.target[:, None], (shown.target[:, None] + 1) % CLASSES
    soft = torch.zeros(CLOUD, CLASSES).scatter(1, one, shares[0]).scatter(1, other, shares[1])
    found = CE(label_smoothing=smoothing)(student, student, replace(shown, soft=soft))
    assert found.dtype == torch.float64
    expected = written_out.soft_cross_entropy(student.logits.tolist(), soft.tolist(), smoothing)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_labels_that_are_not_mixed_are_labels(smoothing):
    student, shown = features(3, seed=1), batch()
    whole = replace(shown, soft=torch.eye(CLASSES)[shown.target])
    loss = CE(label_smoothing=smoothing)
    torch.testing.assert_close(loss(student, student, whole), loss(student, student, shown))


@pytest.mark.parametrize("value", [-0.1, 1.0, 2.0, math.nan])
def test_refuses_a_smoothing_that_is_no_share(value):
    with pytest.raises(ValueError, match=rf"label_smoothing must be in \[0, 1\), got {value}"):
        CE(label_smoothing=value)


# --- Distillation --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_the_paper_in_plain_loops(temperature):
    student, teacher = features(3, seed=1), features(5, seed=2)
    found = KD(temperature=temperature)(student, teacher, batch())
    expected = reference.distillation(student.logits.tolist(), teacher.logits.tolist(), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_distillation_of_two_classes_is_known():
    # p = (3/4, 1/4) against (1/2, 1/2): ln 2 minus the entropy of p.
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation(student, teacher, temperature=1.0).item() == pytest.approx(expected)


def test_hot_distillation_compares_centered_logits():
    # Hinton et al., section 2.1: for great T the gradient is that of the squared difference.
    student, teacher = features(3, seed=1).logits, features(5, seed=2).logits
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    expected = gap.square().sum() / (2 * CLASSES * CLOUD)
    errors = [
        (distillation(student, teacher, temperature=t) - expected).abs()
        for t in (25.0, 50.0, 100.0)
    ]
    assert errors[2] < 0.03 * expected
    assert errors[0] > 1.9 * errors[1] > 1.9**2 * errors[2]  # the next term is of order 1 / T


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_distillation_sees_only_differences_of_logits(a, b):
    student, teacher = features(3, seed=1).logits, features(5, seed=2).logits
    torch.testing.assert_close(
        distillation(student + a, teacher + b), distillation(student, teacher)
    )


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_refuses_a_temperature_that_is_not_positive(value):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {value}"):
        KD(temperature=value)


def test_refuses_logits_of_other_shapes():
    with pytest.raises(ValueError, match=r"logits differ: student \(6, 4\), teacher \(6, 5\)"):
        distillation(torch.zeros(6, 4), torch.zeros(6, 5))


@given(st.floats(0.5, 10), st.floats(-50, 50))
def test_standardized_distillation_sees_neither_shift_nor_scale(scale, shift):
    student, teacher = features(3, seed=1), features(5, seed=2)
    moved = replace(student, logits=scale * student.logits + shift)
    for loss in (KD(standardize=True), DKD(standardize=True)):
        torch.testing.assert_close(
            loss(moved, teacher, batch()), loss(student, teacher, batch()), rtol=1e-5, atol=0
        )


def test_standardized_logits_have_mean_0_and_deviation_1():
    logits = standardized(7 * features(3, seed=1).logits + 3)
    torch.testing.assert_close(logits.mean(1), torch.zeros(CLOUD).double())
    torch.testing.assert_close(logits.var(1), torch.ones(CLOUD).double())


# --- Decoupled and normalized distillation -------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_two_decoupled_parts(temperature):
    # Zhao et al., equation 5: KL(p) = KL(b) + (1 - p_y) KL(q), image by image.
    student, teacher, target = (
        features(3, seed=1).logits,
        features(5, seed=2).logits,
        batch().target,
    )
    for s, t, y in zip(student.split(1), teacher.split(1), target.split(1), strict=True):
        sure = (t / temperature).softmax(1)[0, y.item()].item()
        parts = decoupled_distillation(s, t, y, alpha=1, beta=1 - sure, temperature=temperature)
        torch.testing.assert_close(parts, distillation(s, t, temperature=temperature))


def test_decoupled_distillation_of_three_classes_is_known():
    # b is (1/2, 1/2) against (1/3, 2/3), q is (3/4, 1/4) against (1/2, 1/2).
    teacher = torch.tensor([[math.log(4), math.log(3), 0.0]])
    student, label = torch.zeros(1, 3), torch.tensor([0])
    binary = 0.5 * math.log(3 / 2) + 0.5 * math.log(3 / 4)
    rest = 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)
    for alpha, beta in ((1, 0), (0, 1), (2, 5)):
        value = decoupled_distillation(
            student, teacher, label, alpha=alpha, beta=beta, temperature=1.0
        )
        assert value.item() == pytest.approx(alpha * binary + beta * rest, rel=1e-5)


def test_normalized_distillation_is_least_for_the_same_view_of_the_rest():
    teacher, target = features(5, seed=2).logits, batch().target
    options = {"gamma": 1e6, "temperature": 2.0}  # so great that the label does not count
    least = normalized_distillation(teacher, teacher, target, **options)
    for seed in range(5):
        other = teacher + 0.1 * features(3, seed=seed).logits
        assert normalized_distillation(other, teacher, target, **options) > least


def test_normalized_distillation_of_three_classes_is_known():
    teacher = torch.tensor([[math.log(4), math.log(3), 0.0]])
    student, label = torch.zeros(1, 3), torch.tensor([0])
    value = normalized_distillation(student, teacher, label, gamma=2.0, temperature=1.0)
    assert value.item() == pytest.approx(0.5 * math.log(3) + 2 * math.log(2), rel=1e-5)


# --- DIST ----------------------------------------------------------------------------------------


@given(st.floats(0.1, 1))
def test_dist_does_not_see_how_much_of_a_prediction_is_a_guess(share):
    teacher = features(5, seed=2).logits
    student = (share * teacher.softmax(1) + (1 - share) / CLASSES).log()
    value = correlation_distillation(student, teacher, damping=0.0)
    assert abs(value.item()) < 1e-12


def test_dist_of_opposite_predictions_is_known():
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    value = correlation_distillation(teacher.flip(1), teacher, beta=1.0, gamma=10.0)
    assert value.item() == pytest.approx(22, rel=1e-5)  # both correlations are -1


def test_dist_of_equal_logits_of_great_range_differs_from_torchdistills():
    ours, theirs = [], []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        logits = 30 * torch.randn(64, 100, dtype=torch.float64, generator=generator)
        ours.append(correlation_distillation(logits, logits).item())
        p = logits.softmax(1)
        value = 0.0
        for lists in (p.tolist(), p.T.tolist()):
            found = [written_out.bounded_correlation(row, row, 1e-8) for row in lists]
            value += 1 - sum(found) / len(found)
        theirs.append(value)
        centered = [each - each.mean(1, keepdim=True) for each in (p, p.T)]
        same = sum(1 - F.cosine_similarity(c, c, dim=1, eps=1e-8).mean() for c in centered)
        assert same.item() == pytest.approx(value)  # what torchdistill calls
        damped = written_out.dist(logits.tolist(), logits.tolist(), 1.0, 1.0, 1.0, 1e-8)
        assert ours[-1] == pytest.approx(damped)
    assert sum(ours) / 5 == pytest.approx(0.25, abs=0.02)
    assert sum(theirs) / 5 == pytest.approx(0.08, abs=0.02)


# --- Transformed teacher matching ----------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_with_exponent_1_it_is_distillation_at_temperature_1(weighted):
    student, teacher = features(3, seed=1).logits, features(5, seed=2).logits
    torch.testing.assert_close(
        transformed_teacher_matching(student, teacher, exponent=1.0, weighted=weighted),
        distillation(student, teacher, temperature=1.0),
    )


def test_a_sure_teacher_weighs_less_than_a_doubtful_one():
    # A certain prediction has one power that is 1; a blind guess has c powers of 1 / c.
    student = torch.tensor([[2.0, 0.0, 0.0, 1.0]])
    sure, guess = torch.tensor([[1e4, 0.0, 0.0, 0.0]]), torch.zeros(1, 4)
    for teacher, weight in ((sure, 1.0), (guess, 4 * 0.25**0.5)):
        plain, weighted = (
            transformed_teacher_matching(student, teacher, exponent=0.5, weighted=w)
            for w in (False, True)
        )
        torch.testing.assert_close(weighted, weight * plain)
