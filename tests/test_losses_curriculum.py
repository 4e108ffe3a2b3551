"""A temperature that works against the student: its course, its gradient, its resumption."""

import math

import pytest
import torch
from reference import logits as written_out
from reference.features import batch, features

from topkd.losses import CTKD
from topkd.losses.ctkd import reversal_factor, scaled_gradient
from topkd.losses.functional import decoupled_distillation, distillation


def slope(loss):
    """The gradient that the optimizer is given for the temperature."""
    loss.theta.grad = None
    loss(features(3, seed=1), features(5, seed=2), batch()).backward()
    return loss.theta.grad.item()


def by_differences(loss, step=1e-5):
    """The slope of the value itself."""
    values = []
    with torch.no_grad():
        for move in (step, -2 * step):
            loss.theta += move
            values.append(loss(features(3, seed=1), features(5, seed=2), batch()).item())
        loss.theta += step
    return (values[0] - values[1]) / (2 * step)


def test_the_temperature_starts_high():
    expected = 1 + 20 / (1 + math.exp(-1))
    assert CTKD().temperature.item() == pytest.approx(expected)
    other = CTKD(lowest=2.0, spread=6.0)
    assert other.temperature.item() == pytest.approx(2 + 6 / (1 + math.exp(-1)))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("epoch", [0, 1, 30])
def test_its_value_is_that_of_the_loss_at_this_temperature(mode, epoch):
    student, teacher, shown = features(3, seed=1), features(5, seed=2), batch()
    hot = 1 + 20 / (1 + math.exp(-1))
    kd = CTKD().double().train(mode)
    dkd = CTKD(of="dkd", alpha=0.5, beta=3.0).double().train(mode)
    kd.on_epoch_start(epoch)
    dkd.on_epoch_start(epoch)
    torch.testing.assert_close(
        kd(student, teacher, shown),
        distillation(student.logits, teacher.logits, temperature=hot),
    )
    torch.testing.assert_close(
        dkd(student, teacher, shown),
        decoupled_distillation(
            student.logits, teacher.logits, shown.target, alpha=0.5, beta=3.0, temperature=hot
        ),
    )


@pytest.mark.parametrize("of", ["kd", "dkd"])
def test_standardized_logits_are_compared(of):
    student, teacher, shown = features(3, seed=1), features(5, seed=2), batch()
    rows = [written_out.standardized(made.logits.tolist()) for made in (student, teacher)]
    hot = 1 + 20 / (1 + math.exp(-1))
    if of == "kd":
        expected = written_out.distillation(*rows, hot)
    else:
        expected = written_out.decoupled(*rows, shown.target.tolist(), 1.0, 2.0, hot)
    loss = CTKD(of=of, standardize=True).double()
    assert loss(student, teacher, shown).item() == pytest.approx(expected, rel=1e-11)


def test_weights_of_the_decoupled_parts_are_those_of_the_authors():
    loss = CTKD(of="dkd")
    assert (loss.alpha, loss.beta) == (1, 2)


@pytest.mark.parametrize(("epoch", "factor"), [(0, 0), (5, -0.5), (10, -1), (11, -1), (240, -1)])
def test_adversity_rises_over_ten_epochs(epoch, factor):
    assert reversal_factor(epoch) == pytest.approx(factor)


def test_adversity_rises_slowly_then_fast_then_slowly():
    gaps = [reversal_factor(e) - reversal_factor(e + 1) for e in range(10)]
    assert gaps == pytest.approx(gaps[::-1])
    assert gaps == sorted(gaps[:5]) + sorted(gaps[5:], reverse=True)


@pytest.mark.parametrize("of", ["kd", "dkd"])
@pytest.mark.parametrize(("epoch", "factor"), [(0, 0), (5, -0.5), (10, -1), (100, -1)])
def test_the_temperature_climbs_what_the_student_descends(of, epoch, factor):
    loss = CTKD(of=of).double()
    loss.on_epoch_start(epoch)
    true = by_differences(loss)
    assert abs(true) > 1e-6
    assert slope(loss) == pytest.approx(factor * true, rel=1e-6, abs=1e-15)


def test_in_eval_mode_the_gradient_is_the_slope():
    loss = CTKD().double().eval()
    loss.on_epoch_start(10)
    assert slope(loss) == pytest.approx(by_differences(loss), rel=1e-6)


def test_the_gradient_of_the_student_is_not_reversed():
    teacher, loss = features(5, seed=2), CTKD().double()
    gradients = []
    for epoch in (0, 5, 10):
        student = features(3, seed=1)
        student.logits.requires_grad_()
        loss.on_epoch_start(epoch)
        loss(student, teacher, batch()).backward()
        gradients.append(student.logits.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_stopped():
    def run(loss, epochs):
        optimizer = torch.optim.SGD(loss.parameters(), lr=10.0)
        for epoch in epochs:
            loss.on_epoch_start(epoch)
            slope(loss)
            optimizer.step()
        return loss

    whole = run(CTKD().double(), range(1, 9))
    first = run(CTKD().double(), range(1, 5))
    second = CTKD().double()
    second.load_state_dict(first.state_dict())
    assert second.temperature == first.temperature
    run(second, range(5, 9))
    assert second.theta == whole.theta != CTKD().theta


def test_a_scaled_gradient_leaves_the_value():
    x = torch.tensor([0.1, 1e8], requires_grad=True)
    assert torch.equal(scaled_gradient(x, -0.3), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "topkd"}, "of must be kd or dkd, got topkd"),
        ({"lowest": 0.0}, "lowest must be positive, got 0.0"),
        ({"spread": -1.0}, "spread must be positive, got -1.0"),
        ({"rise": 0}, "rise must be positive, got 0"),
        ({"beta": 2.0}, "beta has no effect with of: kd; leave it out"),
        ({"alpha": 1.0}, "alpha has no effect with of: kd; leave it out"),
        ({"of": "dkd", "beta": -2.0}, "beta must not be negative, got -2.0"),
    ],
)
def test_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        CTKD(**options)
