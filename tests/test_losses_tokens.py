"""Distillation into a head of its own."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference import logits as written_out
from reference.features import CLASSES, CLOUD, batch, bound, features, source_in
from torch.autograd import gradcheck

from topkd.losses import DeiT
from topkd.losses.functional import distillation, hard_distillation


def with_token(width=3, seed=1):
    made = features(width, seed)
    return replace(made, distilled=features(width, seed + 10).logits)


ORACLES = {
    "hard": ({}, written_out.hard),
    "soft": ({"kind": "soft"}, lambda s, t: written_out.distillation(s, t, 1.0)),
    "soft, hot": (
        {"kind": "soft", "temperature": 3.0},
        lambda s, t: written_out.distillation(s, t, 3.0),
    ),
    "soft, legacy": (
        {"kind": "soft", "temperature": 3.0, "legacy": True},
        lambda s, t: written_out.distillation(s, t, 3.0) / CLASSES,
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_value_and_gradient_are_the_paper_in_plain_loops(name):
    options, oracle = ORACLES[name]
    student, teacher = with_token(), features(5, seed=2)
    student.distilled.requires_grad_()
    value = DeiT(**options)(student, teacher, batch())
    value.backward()
    rows, answers = student.distilled.tolist(), teacher.logits.tolist()
    assert value.item() == pytest.approx(oracle(rows, answers), rel=1e-12)
    expected = written_out.slopes(lambda s: oracle(s, answers), rows)
    torch.testing.assert_close(
        student.distilled.grad, torch.tensor(expected).double(), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", ORACLES)
def test_gradient_matches_finite_differences(name):
    loss, teacher, student = DeiT(**ORACLES[name][0]), features(5, 2), with_token()
    inputs = [t.requires_grad_() for t in student.tensors()]

    def value(*tensors):
        given = iter(tensors)
        return loss(student.apply(lambda _: next(given)), teacher, batch())

    assert gradcheck(value, inputs, fast_mode=True)


def test_it_teaches_the_token_and_no_other_head():
    for options, _ in ORACLES.values():
        student = with_token()
        inputs = [student.logits.requires_grad_(), student.distilled.requires_grad_()]
        value = DeiT(**options)(student, features(5, seed=2), batch())
        at_logits, at_token = torch.autograd.grad(value, inputs, allow_unused=True)
        assert at_logits is None
        assert at_token.norm() > 0


def test_a_teacher_speaks_by_its_logits():
    student, teacher = with_token(), with_token(5, seed=2)
    plain = replace(teacher, distilled=None)
    for options, _ in ORACLES.values():
        loss = DeiT(**options)
        assert loss(student, teacher, batch()) == loss(student, plain, batch())


def test_soft_is_distillation_and_legacy_is_the_mean_of_torch():
    student, teacher = with_token(), features(5, seed=2)
    options = {"kind": "soft", "temperature": 2.0}
    torch.testing.assert_close(
        DeiT(**options)(student, teacher, batch()),
        distillation(student.distilled, teacher.logits, temperature=2.0),
    )
    log_s, log_t = ((z / 2).log_softmax(1) for z in (student.distilled, teacher.logits))
    expected = 4 * F.kl_div(log_s, log_t, reduction="sum", log_target=True) / log_s.numel()
    torch.testing.assert_close(DeiT(**options, legacy=True)(student, teacher, batch()), expected)


@pytest.mark.parametrize("name", ORACLES)
def test_extreme_logits_are_finite_in_single_precision(name):
    student, teacher = with_token(), features(5, seed=2)
    extreme = torch.full((CLOUD, CLASSES), -1e4)
    extreme[:, 0] = 1e4
    teacher = replace(teacher, logits=extreme.flip(1))
    extreme.requires_grad_()
    value = DeiT(**ORACLES[name][0])(replace(student, distilled=extreme), teacher, batch())
    value.backward()
    assert value.isfinite()
    assert extreme.grad.isfinite().all()


def test_refuses_a_student_without_the_token(tmp_path):
    student, teacher = replace(features(3, seed=1), distilled=None), features(5, seed=2)
    message = "needs a student with a distillation token, this one has none"
    with pytest.raises(ValueError, match=message):
        bound(DeiT, student, teacher, source_in(tmp_path))
    with pytest.raises(ValueError, match=message):
        DeiT()(student, teacher, batch())


def test_is_built_with_its_options(tmp_path):
    loss = bound(
        DeiT,
        with_token(),
        features(5, 2),
        source_in(tmp_path),
        kind="soft",
        temperature=2.0,
        legacy=True,
    )
    assert (loss.kind, loss.temperature, loss.legacy) == ("soft", 2, True)
    assert bound(DeiT, with_token(), features(5, 2), source_in(tmp_path)).kind == "hard"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "firm"}, "kind must be hard or soft, got firm"),
        ({"temperature": 2.0}, "has no effect with kind: hard; leave it out"),
        ({"legacy": True}, "has no effect with kind: hard; leave it out"),
        ({"kind": "soft", "temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        DeiT(**options)


def test_refuses_logits_of_other_classes():
    with pytest.raises(ValueError, match=r"logits differ: student \(6, 4\), teacher \(6, 5\)"):
        hard_distillation(torch.zeros(6, 4), torch.zeros(6, 5))
