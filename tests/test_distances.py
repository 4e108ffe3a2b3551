"""Distances between diagrams: against the assignment problem, scipy, and the laws of a distance."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.optimize import linear_sum_assignment

from topkd.topology import rips, wasserstein


def diagrams(clouds, n=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return rips(torch.randn(clouds, n, 3, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("order", [1.0, 1.5, 2.0, 7.0])
def test_is_the_cheapest_matching(order):
    first, second = diagrams(5), diagrams(5, seed=1)
    expected = []
    for a, b in zip(first.deaths.numpy(), second.deaths.numpy(), strict=True):
        cost = np.abs(a[:, None] - b[None]) ** order
        expected.append(cost[linear_sum_assignment(cost)].sum() ** (1 / order))
    assert wasserstein(first, second, order=order).tolist() == pytest.approx(expected)


def test_infinite_order_is_the_bottleneck_distance():
    first, second = diagrams(5), diagrams(5, seed=1)
    for a, b, found in zip(
        first.deaths, second.deaths, wasserstein(first, second, order=math.inf), strict=True
    ):
        gaps = np.abs(a.numpy()[:, None] - b.numpy()[None])
        # The least bound under which everyone still finds a partner.
        for bound in np.sort(gaps.flatten()):
            forbidden = (gaps > bound).astype(float)
            if forbidden[linear_sum_assignment(forbidden)].sum() == 0:
                break
        assert found.item() == pytest.approx(bound)


def test_first_order_is_that_of_scipy():
    first, second = diagrams(4, n=30), diagrams(4, n=30, seed=1)
    expected = [
        29 * stats.wasserstein_distance(a, b)  # scipy gives every bar the mass 1/29
        for a, b in zip(first.deaths, second.deaths, strict=True)
    ]
    assert wasserstein(first, second).tolist() == pytest.approx(expected)


def test_of_a_segment_and_its_double():
    segment = torch.tensor([[0.0], [1.0], [3.0]])  # deaths 1 and 2, then 2 and 4
    assert wasserstein(rips(segment), rips(2 * segment)).item() == pytest.approx(1 + 2)
    assert wasserstein(rips(segment), rips(2 * segment), order=2).item() == pytest.approx(5**0.5)


def test_one_cloud_has_no_batch_axis():
    one = rips(torch.randn(6, 2))
    assert wasserstein(one, one).shape == ()
    assert wasserstein(diagrams(3), diagrams(3)).shape == (3,)


def test_dimensions_of_the_clouds_may_differ():
    assert wasserstein(rips(torch.zeros(5, 2)), rips(torch.zeros(5, 7))).item() == 0


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_clouds_of_one_point_are_alike(order):
    one = rips(torch.zeros(2, 1, 3))
    assert wasserstein(one, one, order=order).tolist() == [0, 0]


lengths = arrays(np.float64, (3, 2, 5), elements=st.floats(0, 10))
orders = st.floats(1, 8)


def on_a_line(lengths):
    """Clouds whose deaths are these lengths."""
    start = np.zeros((*lengths.shape[:-1], 1))
    points = np.concatenate([start, lengths.cumsum(-1)], axis=-1)
    return rips(torch.from_numpy(points)[..., None])


@given(lengths, orders)
def test_is_a_distance(lengths, order):
    a, b, c = (on_a_line(part) for part in lengths)

    def apart(x, y):
        return wasserstein(x, y, order=order)

    assert (apart(a, a) == 0).all()
    torch.testing.assert_close(apart(a, b), apart(b, a))
    assert (apart(a, c) <= apart(a, b) + apart(b, c) + 1e-9).all()


@given(lengths, orders, orders)
def test_falls_as_the_order_grows(lengths, p, q):
    assume(p <= q)
    a, b, _ = (on_a_line(part) for part in lengths)
    assert (wasserstein(a, b, order=q) <= wasserstein(a, b, order=p) * (1 + 1e-9) + 1e-9).all()


@pytest.mark.parametrize("order", [1.0, 2.0, 3.5])
def test_gradient_matches_finite_differences(order):
    x, y = torch.randn(2, 2, 6, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y: wasserstein(rips(x), rips(y), order=order),
        (x.detach().requires_grad_(), y.detach().requires_grad_()),
    )


@pytest.mark.parametrize("order", [1.0, 1.5, 2.0])
def test_equal_diagrams_have_a_finite_gradient(order):
    points = torch.randn(6, 3).requires_grad_()
    wasserstein(rips(points), rips(points.detach()), order=order).backward()
    assert (points.grad == 0).all()


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"differ in shape: \(3, 8\) and \(3, 7\)"):
        wasserstein(diagrams(3), diagrams(3, n=8))
    with pytest.raises(ValueError, match=r"differ in shape: \(3, 8\) and \(2, 8\)"):
        wasserstein(diagrams(3), diagrams(2))


@pytest.mark.parametrize("order", [0.5, 0.0, -1.0, math.nan])
def test_refuses_orders_below_one(order):
    with pytest.raises(ValueError, match=f"at least 1, got {order}"):
        wasserstein(diagrams(1), diagrams(1), order=order)
