"""Slopes of every loss where the student's features do not vary, are 0, or nearly so.

Losses that do not see scale have slopes of one over the spread of what they see. They are bounded
at a spread of a thousandth of what networks have. Features of spread 1 here give slopes of up to
10, so that none may be above ten thousand, be the student's features what they may. Normalizations
are in eval mode: in training, theirs at constant maps is 316, one over the root of their epsilon.
"""

import pytest
import torch
from reference.features import WIDTH, agreeing_networks, batch, bound, source_in

from topkd.losses import LOSSES
from topkd.losses.functional import correlation_distillation, distillation, standardized
from topkd.topology.approximation import Training
from topkd.topology.gradient import SMALL, bounded_divide

BOUND = 1e4
CASES = {name: (name, {}) for name in LOSSES} | {
    "kd, standardized": ("kd", {"standardize": True}),
    "dkd, standardized": ("dkd", {"standardize": True}),
    "mlkd, standardized": ("mlkd", {"standardize": True}),
    "dist, not damped": ("dist", {"damping": 0.0}),
    "cc, kernel": ("cc", {"form": "kernel"}),
    "cat, normalized": ("cat", {"normalize": True}),
    "at, paper": ("at", {"form": "paper"}),
    "ft, whole": ("ft", {"form": "whole"}),
    "ultrametric, squared": ("ultrametric", {"order": 2.0}),
    "pce, em": ("pce", {"form": "em-pce"}),
    "wasserstein of loops": ("wasserstein", {"dimension": 1}),
    "topkd, loops": ("topkd", {"dimension": 1}),
    "topkd, median": ("topkd", {"scale": "tree_median"}),
    "topkd, max": ("topkd", {"scale": "tree_max"}),
    "topkd, DistanceNet": ("topkd", {"via": "distancenet", "training": Training(2, 2)}),
}
STUDENTS = {
    "as usual": lambda t: t,
    "zero": torch.zeros_like,
    "constant": torch.ones_like,
    "the same for all images": lambda t: t[:1].expand_as(t).clone(),
    "nearly constant": lambda t: 1 + 1e-6 * t,
    "nearly zero": lambda t: 1e-6 * t,
    "constant up to rounding": lambda t: 0.1 + 1e-8 * t,
}


@pytest.fixture(scope="module")
def shared_source(tmp_path_factory):
    return source_in(tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_slopes_are_bounded_whatever_the_student_makes(name, half, shared_source):
    loss, options = CASES[name]
    width = 3 if LOSSES[loss].info.any_width else WIDTH
    source, *networks = agreeing_networks(LOSSES[loss], shared_source, width)
    built = bound(LOSSES[loss], *networks, source, **options).float().eval()
    usual, teacher = (made.apply(lambda t: t.float()) for made in networks)
    for made, change in STUDENTS.items():
        student = usual.apply(lambda t, change=change: change(t).requires_grad_())
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = built(student, teacher, batch())
        found = torch.autograd.grad(value, student.tensors(), allow_unused=True)
        assert value.isfinite(), made
        assert value.abs() < BOUND, made
        assert max(g.abs().max().item() for g in found if g is not None) < BOUND, made


def test_a_head_of_zeros_learns_standardized_logits():
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(256, 32, generator=generator)
    teacher = embedding @ torch.randn(32, 10, generator=generator)
    head = torch.zeros(10, 32, requires_grad=True)
    optimizer = torch.optim.SGD([head], lr=0.05, momentum=0.9)
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        student = standardized(embedding @ head.T)
        value = 9 * distillation(student, standardized(teacher), temperature=2.0)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.1 * values[0]


def test_spread_logits_are_standardized_as_published():
    logits = 0.2 * torch.randn(64, 10, dtype=torch.float64)
    assert logits.std(1).min() > 0.1
    expected = [(row - row.mean()) / (row.std() + 1e-7) for row in logits]
    torch.testing.assert_close(standardized(logits), torch.stack(expected))


def test_the_order_of_faint_logits_is_still_learned():
    teacher = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 2.0, -1.0, 1.0]])
    for loss in (
        lambda z: distillation(standardized(z), standardized(teacher)),
        lambda z: correlation_distillation(z, teacher),
    ):
        logits = torch.zeros(2, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(logits), logits)
        assert (-gradient * (teacher - teacher.mean(1, keepdim=True))).sum() > 0


@pytest.mark.parametrize("size", [1.0, 2 * SMALL, SMALL / 2, 1e-9])
def test_a_size_divides_with_a_bounded_slope(size):
    values = torch.tensor([size, 3 * size], dtype=torch.float64, requires_grad=True)
    told = bounded_divide(values, torch.tensor(size, dtype=torch.float64))
    torch.testing.assert_close(told.detach(), torch.tensor([1.0, 3.0], dtype=torch.float64))
    (slope,) = torch.autograd.grad(told.sum(), values)
    torch.testing.assert_close(slope, torch.full_like(slope, 1 / max(size, SMALL)))
