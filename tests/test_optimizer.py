"""Optimizers by their formulas, and rates as torch's schedules have them."""

import math

import pytest
import torch

from topkd.config.recipe import RecipeError, load
from topkd.config.sections import Optimizer
from topkd.training.optim import build, learning_rate


def test_adamw_is_its_formula():
    settings = Optimizer(name="adamw", lr=0.1, momentum=0.8, weight_decay=0.02)
    weight = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    optimizer = build(settings, [weight])
    expected, first, second = 2.0, 0.0, 0.0
    for step in range(1, 6):
        optimizer.zero_grad()
        weight.pow(3).sum().backward()
        optimizer.step()
        gradient = 3 * expected**2
        expected -= 0.1 * 0.02 * expected
        first = 0.8 * first + 0.2 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        root = math.sqrt(second / (1 - 0.999**step))
        expected -= 0.1 * first / (1 - 0.8**step) / (root + 1e-8)
        assert weight.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_its_formula(nesterov):
    settings = Optimizer(lr=0.1, momentum=0.8, weight_decay=0.02, nesterov=nesterov)
    weight = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    optimizer = build(settings, [weight])
    expected, velocity = 2.0, 0.0
    for _ in range(5):
        optimizer.zero_grad()
        weight.pow(2).sum().backward()
        optimizer.step()
        gradient = 2 * expected + 0.02 * expected
        velocity = 0.8 * velocity + gradient
        expected -= 0.1 * (gradient + 0.8 * velocity if nesterov else velocity)
        assert weight.item() == pytest.approx(expected, rel=1e-12)


def test_nesterov_is_refused_where_it_would_do_nothing():
    with pytest.raises(RecipeError, match="optimizer.*nesterov is an option of sgd"):
        load("digits", ["optimizer.name=adamw", "optimizer.nesterov=true"])


@pytest.mark.parametrize(
    ("settings", "scheduler"),
    [
        (
            Optimizer(lr=0.5, milestones=(2, 3)),
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones=[2, 3]),
        ),
        (
            Optimizer(lr=0.5, schedule="cosine"),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=4),
        ),
    ],
)
def test_rates_are_those_of_torch(settings, scheduler):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = scheduler(optimizer)
    for epoch in range(4):
        rate = optimizer.param_groups[0]["lr"]
        assert learning_rate(settings, epoch, epochs=4) == pytest.approx(rate)
        optimizer.step()
        theirs.step()


def test_one_cycle_rises_to_its_peak_and_falls_to_zero():
    settings = Optimizer(lr=0.3, schedule="one-cycle", rise=0.25)
    assert learning_rate(settings, 0, epochs=8) == 0
    assert learning_rate(settings, 2, epochs=8) == pytest.approx(0.3)
    assert learning_rate(settings, 5, epochs=8) == pytest.approx(0.15)
    assert learning_rate(settings, 8, epochs=8) == pytest.approx(0)
