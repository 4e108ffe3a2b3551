"""Distances between diagrams: against all matchings, scipy, Hera and persim, and their laws."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch.library import opcheck

from topkd.topology import Diagrams, rips
from topkd.topology.distances import (
    bottleneck,
    cheapest_matching,
    sliced_wasserstein,
    wasserstein,
)

# --- H0 of clouds with equally many points ------------------------------------------------------


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


@pytest.mark.parametrize("order", [0.5, 0.0, -1.0, math.nan])
def test_refuses_orders_below_one(order):
    with pytest.raises(ValueError, match=f"at least 1, got {order}"):
        wasserstein(diagrams(1), diagrams(1), order=order)


# --- Matchings that may use the diagonal ---------------------------------------------------------


def on_diagonal(bar):
    return ((bar[0] + bar[1]) / 2,) * 2


def apart(x, y, ground_norm):
    gaps = abs(x[0] - y[0]), abs(x[1] - y[1])
    return max(gaps) if ground_norm == math.inf else math.hypot(*gaps)


def all_matchings(first, second, ground_norm):
    """What is paid for in each of them, as lists of costs."""
    ends = [*second, *[None] * len(first)]
    for chosen in itertools.permutations(range(len(ends))):
        costs = []
        for row, column in enumerate(chosen):
            x, y = first[row] if row < len(first) else None, ends[column]
            if x is not None or y is not None:
                x, y = x or on_diagonal(y), y or on_diagonal(x)
                costs.append(apart(x, y, ground_norm))
        yield costs


def random_bars(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, 2, dtype=torch.float64, generator=generator).cumsum(-1)


def loops(clouds, n=25, seed=0):
    """H1 diagrams; how many bars there are differs from cloud to cloud."""
    generator = torch.Generator().manual_seed(seed)
    return rips(torch.randn(clouds, n, 2, dtype=torch.float64, generator=generator), max_dim=1).of(
        1
    )


def ragged(sizes, seed=0):
    """H0 diagrams of clouds with so many points."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(len(sizes), max(sizes), 3, dtype=torch.float64, generator=generator)
    return rips(points, mask=torch.arange(max(sizes)) < torch.tensor(sizes)[:, None])


def each(diagrams):
    """The bars of each cloud, without padding."""
    return [bars[mask].numpy() for bars, mask in zip(diagrams.bars, diagrams.mask, strict=True)]


PAIRS = {
    "H1": lambda: (loops(4), loops(4, seed=1)),
    "H1, sizes differ": lambda: (loops(3), loops(3, n=12, seed=1)),
    "H0": lambda: (diagrams(3), diagrams(3, seed=1)),
    "H0, sizes differ": lambda: (ragged([3, 9, 1, 5]), ragged([8, 2, 4, 5], seed=1)),
    "many bars": lambda: tuple(Diagrams.from_bars(random_bars(2, 40, seed=s)) for s in range(2)),
}
DISTANCES = {
    "order 1": lambda x, y: wasserstein(x, y, diagonal=True),
    "order 2": lambda x, y: wasserstein(x, y, order=2, diagonal=True),
    "order 1.5, Euclid": lambda x, y: wasserstein(x, y, order=1.5, ground_norm=2, diagonal=True),
    "bottleneck": bottleneck,
    "sliced": sliced_wasserstein,
}


@pytest.fixture(params=DISTANCES)
def distance(request):
    return DISTANCES[request.param]


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]()


few_bars = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 4)).map(lambda bar: (bar[0], bar[0] + bar[1])),
    max_size=3,
)  # small integers: full of ties


def of_bars(bars):
    return Diagrams.from_bars(torch.tensor(bars, dtype=torch.float64).view(-1, 2))


@given(few_bars, few_bars, st.sampled_from([1.0, 1.5, 3.0]), st.sampled_from([2.0, math.inf]))
def test_no_matching_is_cheaper(first, second, order, ground_norm):
    expected = min(
        sum(cost**order for cost in costs) for costs in all_matchings(first, second, ground_norm)
    ) ** (1 / order)
    found = wasserstein(of_bars(first), of_bars(second), order=order, ground_norm=ground_norm)
    assert found.item() == pytest.approx(expected)


@given(few_bars, few_bars)
def test_bottleneck_is_the_least_greatest_cost_of_all_matchings(first, second):
    expected = min(max(costs, default=0) for costs in all_matchings(first, second, math.inf))
    assert bottleneck(of_bars(first), of_bars(second)).item() == expected


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("ground_norm", [2.0, math.inf])
def test_agrees_with_hera(pair, order, ground_norm):
    hera = pytest.importorskip("gudhi.hera")
    found = wasserstein(*pair, order=order, ground_norm=ground_norm, diagonal=True)
    expected = [
        hera.wasserstein_distance(x, y, order=order, internal_p=ground_norm, delta=1e-8)
        for x, y in zip(*map(each, pair), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-7)


def test_bottleneck_agrees_with_hera(pair):
    hera = pytest.importorskip("gudhi.hera")
    expected = [
        hera.bottleneck_distance(x, y, delta=0) for x, y in zip(*map(each, pair), strict=True)
    ]
    assert bottleneck(*pair).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("directions", [1, 7, 50])
def test_sliced_agrees_with_persim(pair, directions):
    persim = pytest.importorskip("persim")
    expected = [
        persim.sliced_wasserstein(x, y, M=directions) for x, y in zip(*map(each, pair), strict=True)
    ]
    found = sliced_wasserstein(*pair, directions=directions)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)  # its directions are float32


def test_sliced_distance_from_nothing_tends_to_the_mean_cosine():
    # A bar is persistence / sqrt(2) from the diagonal; the mean of |cos| is 2 / pi.
    found = sliced_wasserstein(of_bars([(1, 5)]), of_bars([]), directions=2000)
    assert found.item() == pytest.approx(4 / math.sqrt(2) * 2 / math.pi, rel=1e-5)


def test_long_bars_of_h0_meet_only_if_there_is_no_diagonal():
    near, far = rips(torch.tensor([[0.0], [1.0]])), rips(torch.tensor([[0.0], [8.0]]))
    assert wasserstein(near, far).item() == 7
    assert wasserstein(near, far, diagonal=True).item() == 1 / 2 + 8 / 2
    assert wasserstein(near, far, order=math.inf).item() == 7
    assert bottleneck(near, far).item() == 8 / 2


def test_ragged_h0_is_sorted_where_counts_agree_and_matched_elsewhere():
    first, second = ragged([6, 4, 6]), ragged([6, 6, 5], seed=1)
    found = wasserstein(first, second)
    deaths = first.deaths[0].sort().values - second.deaths[0].sort().values
    assert found[0].item() == pytest.approx(deaths.abs().sum().item())
    torch.testing.assert_close(found[1:], wasserstein(first, second, diagonal=True)[1:])
    assert found[0] > wasserstein(first, second, diagonal=True)[0]


def test_h0_that_is_not_born_at_zero_is_matched():
    first = Diagrams.from_bars(torch.tensor([[0.0, 2.0], [3.0, 4.0]]), dimension=0)
    second = Diagrams.from_bars(torch.tensor([[0.0, 2.0], [0.0, 4.0]]), dimension=0)
    for pair in ((first, second), (second, first)):  # (3, 4) and (0, 4) meet the diagonal
        assert wasserstein(*pair).item() == 1 / 2 + 4 / 2


def test_h2_has_distances(distance):
    pytest.importorskip("redzed_tda")
    hollow = torch.cat([torch.eye(3), -torch.eye(3)])
    with pytest.warns(UserWarning, match="redzed"):
        first, second = (rips(s * hollow, max_dim=2).of(2) for s in (1.0, 1.5))
    assert distance(first, first).item() == 0
    assert bottleneck(first, second).item() == pytest.approx((2 - math.sqrt(2)) * 1.5 / 2)


# --- Laws ----------------------------------------------------------------------------------------

coordinates = st.one_of(st.integers(0, 4).map(float), st.floats(0, 10))
three = st.tuples(*[arrays(np.float64, (4, 2), elements=coordinates)] * 3)


@given(three)
@pytest.mark.parametrize("name", DISTANCES)
def test_all_are_distances(name, three):
    # The length may be 0, so that there are diagrams of 0 to 4 bars, and padding anywhere.
    a, b, c = (of_bars(part.cumsum(-1)) for part in three)
    distance = DISTANCES[name]
    assert distance(a, a) == 0
    torch.testing.assert_close(distance(a, b), distance(b, a))
    assert distance(a, c) <= distance(a, b) + distance(b, c) + 1e-9


@given(three)
def test_sliced_is_bounded_by_the_wasserstein_distance(three):
    a, b, _ = (of_bars(part.cumsum(-1)) for part in three)
    assert sliced_wasserstein(a, b) <= 2 * math.sqrt(2) * wasserstein(a, b) + 1e-9


@given(three, st.integers(0, 23))
def test_order_of_the_bars_and_padding_do_not_matter(three, which):
    a, b, _ = (torch.from_numpy(part.cumsum(-1)) for part in three)
    order = list(itertools.permutations(range(4)))[which]
    shuffled = torch.cat([torch.full((2, 2), 7.0), a[list(order)], torch.zeros(1, 2)])
    for distance in DISTANCES.values():
        expected = distance(of_bars(a.tolist()), of_bars(b.tolist()))
        found = distance(Diagrams.from_bars(shuffled), Diagrams.from_bars(b))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0])
def test_diagrams_move_at_most_twice_as_far_as_points(dimension, size):
    points, steps = torch.randn(2, 8, 20, 2, dtype=torch.float64)
    steps *= size
    before, after = (rips(x, max_dim=1).of(dimension) for x in (points, points + steps))
    farthest = steps.norm(dim=-1).amax(-1)
    found = bottleneck(before, after)
    assert (found > 0).all()
    assert (found <= 2 * farthest).all()


def test_a_batch_is_its_clouds_one_by_one(pair, distance):
    first, second = pair
    alone = [
        distance(of_bars(x.tolist()), of_bars(y.tolist()))
        for x, y in zip(each(first), each(second), strict=True)
    ]
    torch.testing.assert_close(distance(first, second), torch.stack(alone))


def test_masked_bars_are_no_bars(distance):
    first, second = random_bars(4), random_bars(3, seed=1)
    whole = Diagrams.from_bars(first)
    mask = torch.tensor([True, False, True, False])
    torch.testing.assert_close(
        distance(replace(whole, mask=mask), Diagrams.from_bars(second)),
        distance(Diagrams.from_bars(first[mask]), Diagrams.from_bars(second)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_type_and_shape_are_those_of_the_bars(distance, dtype):
    many = [Diagrams.from_bars(random_bars(3, 4, seed=seed).to(dtype)) for seed in range(2)]
    assert distance(*many).dtype == dtype
    assert distance(*many).shape == (3,)
    one = Diagrams.from_bars(random_bars(4).to(dtype))
    assert distance(one, one).shape == ()


def test_high_orders_stay_in_range():
    big = Diagrams.from_bars(torch.tensor([[0.0, 1e4]]).requires_grad_())
    nothing = Diagrams.from_bars(torch.zeros(0, 2))
    found = wasserstein(big, nothing, order=40.0)
    assert found.item() == pytest.approx(5e3)
    assert torch.autograd.grad(found, big.deaths)[0].item() == pytest.approx(1 / 2)


# --- Nothing to match ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 2), (3, 0, 2), (3, 2, 2), (0, 2, 2)])
def test_without_bars_all_is_zero(distance, shape):
    nothing = Diagrams.from_bars(torch.zeros(shape))
    assert distance(nothing, nothing).tolist() == torch.zeros(shape[:-2]).tolist()


def test_from_nothing_all_bars_are_half_their_persistence_away():
    bars, nothing = of_bars([(1, 5), (2, 3)]), of_bars([])
    for pair in ((bars, nothing), (nothing, bars)):
        assert wasserstein(*pair).item() == 2 + 0.5
        assert wasserstein(*pair, order=2).item() == pytest.approx(math.hypot(2, 0.5))
        assert wasserstein(*pair, ground_norm=2).item() == pytest.approx(5 / math.sqrt(2))
        assert bottleneck(*pair).item() == 2


# --- Gradients -----------------------------------------------------------------------------------


def test_gradient_reaches_births_and_deaths_also_from_the_diagonal():
    first = torch.tensor([[1.0, 5.0], [2.0, 2.5]], requires_grad=True)
    second = torch.tensor([[1.0, 4.0], [7.0, 7.5]], requires_grad=True)
    wasserstein(Diagrams.from_bars(first), Diagrams.from_bars(second)).backward()
    assert first.grad.tolist() == [[0, 1], [-0.5, 0.5]]
    assert second.grad.tolist() == [[0, -1], [-0.5, 0.5]]


def test_gradient_of_the_bottleneck_is_that_of_one_pair():
    first = torch.tensor([[1.0, 5.0], [2.0, 2.5]], requires_grad=True)
    second = torch.tensor([[1.0, 4.0], [7.0, 7.5]], requires_grad=True)
    bottleneck(Diagrams.from_bars(first), Diagrams.from_bars(second)).backward()
    assert first.grad.tolist() == [[0, 1], [0, 0]]
    assert second.grad.tolist() == [[0, -1], [0, 0]]


def test_gradient_of_bars_matches_finite_differences(distance):
    first, second = random_bars(3, 5), random_bars(3, 3, seed=1)
    assert torch.autograd.gradcheck(
        lambda x, y: distance(Diagrams.from_bars(x), Diagrams.from_bars(y)),
        (first.requires_grad_(), second.requires_grad_()),
    )


def test_gradient_of_points_matches_finite_differences(distance):
    x, y = torch.randn(2, 1, 9, 2, dtype=torch.float64)
    first, second = (rips(points, max_dim=1).of(1) for points in (x, y))
    assert (first.mask.sum() > 0) & (second.mask.sum() > 0) & (distance(first, second) > 0).any()
    assert torch.autograd.gradcheck(
        lambda x, y: distance(rips(x, max_dim=1).of(1), rips(y, max_dim=1).of(1)),
        (x.requires_grad_(), y.requires_grad_()),
    )


def test_gradient_of_ragged_points_matches_finite_differences():
    x, y = torch.randn(2, 3, 5, 2, dtype=torch.float64)
    masks = [torch.arange(5) < torch.tensor(sizes)[:, None] for sizes in ([5, 4, 1], [3, 4, 5])]
    assert torch.autograd.gradcheck(
        lambda x, y: wasserstein(rips(x, mask=masks[0]), rips(y, mask=masks[1])),
        (x.requires_grad_(), y.requires_grad_()),
    )


@pytest.mark.parametrize("dimension", [0, 1])
def test_distance_of_equal_diagrams_has_gradient_zero(distance, dimension):
    points = torch.randn(2, 15, 2)
    points[:, 3] = points[:, 2]  # a bar of length 0
    points.requires_grad_()
    moving, fixed = (rips(x, max_dim=1).of(dimension) for x in (points, points.detach()))
    distance(moving, fixed).sum().backward()
    assert (points.grad == 0).all()


@given(three)
@pytest.mark.parametrize("name", DISTANCES)
def test_gradient_is_finite_everywhere(name, three):
    first, second, _ = (torch.from_numpy(part.cumsum(-1)).requires_grad_() for part in three)
    found = DISTANCES[name](Diagrams.from_bars(first), Diagrams.from_bars(second))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found, (first, second)))


# --- The operator and errors ---------------------------------------------------------------------


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("shape", [(2, 4), (2, 0), (0, 3)])
def test_cheapest_matching_is_a_sound_operator(shape, order):
    arguments = random_bars(*shape), random_bars(shape[0], 3, seed=1), order, math.inf
    opcheck(torch.ops.topkd.cheapest_matching.default, arguments)
    assert cheapest_matching(*arguments).shape == shape


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the compiler itself
def test_compiled_in_one_piece_equals_eager(distance):
    points = torch.randn(2, 3, 12, 2, dtype=torch.float64).requires_grad_()

    def apart(points):
        return distance(*(rips(x, max_dim=1).of(1) for x in points)) + wasserstein(
            *map(rips, points)
        )

    found = torch.compile(apart, fullgraph=True, backend="aot_eager")(points)
    torch.testing.assert_close(found, apart(points))
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), points), torch.autograd.grad(apart(points).sum(), points)
    )


def test_says_what_is_wrong_with_the_diagrams(distance):
    with pytest.raises(ValueError, match=r"the same number of clouds, got \(3, 8\) and \(2, 8\)"):
        distance(diagrams(3), diagrams(2))
    with pytest.raises(ValueError, match=r"the same number of clouds, got \(1, 8\) and \(8,\)"):
        distance(diagrams(1), rips(torch.zeros(9, 2)))
    both = rips(torch.randn(20, 2), max_dim=1)
    with pytest.raises(ValueError, match=r"one dimension.* got dimensions \[0, 1\] and \[0\]"):
        distance(both, both.of(0))
    with pytest.raises(ValueError, match=r"one dimension.* got dimensions \[0\] and \[1\]"):
        distance(both.of(0), both.of(1))


def test_names_the_bar_that_is_not_finite(distance):
    bars = random_bars(3, 4)
    whole = Diagrams.from_bars(bars.clone())
    bars[2, 1, 1] = math.inf
    with pytest.raises(ValueError, match="cloud 2, bar 1: births and deaths must be finite"):
        distance(whole, replace(whole, deaths=bars[..., 1]))
    alone = replace(Diagrams.from_bars(random_bars(4)), deaths=bars[2, :, 1])
    with pytest.raises(ValueError, match="^bar 1: births and deaths must be finite"):
        distance(alone, alone)


@pytest.mark.parametrize("ground_norm", [0.0, 1.0, 3.0, math.nan])
def test_refuses_other_ground_norms(ground_norm):
    with pytest.raises(ValueError, match=f"must be 2 or infinity, got {ground_norm}"):
        wasserstein(diagrams(1), diagrams(1), ground_norm=ground_norm)


@pytest.mark.parametrize("directions", [0, -1])
def test_refuses_no_directions(directions):
    with pytest.raises(ValueError, match=f"directions must be at least 1, got {directions}"):
        sliced_wasserstein(diagrams(1), diagrams(1), directions=directions)
