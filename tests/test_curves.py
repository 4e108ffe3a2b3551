"""Curves of diagrams: against GUDHI, numpy, the definitions in plain loops, and laws."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import topology as reference

from topkd.topology import Diagrams, rips
from topkd.topology.curves import BettiCurve, EntropyCurve, Landscape, Silhouette, entropy
from topkd.topology.scaling import length_scale


def with_births(clouds=3, bars=25, seed=0):
    """Diagrams that are born at other times than 0, as those of higher dimensions."""
    generator = torch.Generator().manual_seed(seed)
    birth, length = torch.rand(2, clouds, bars, dtype=torch.float64, generator=generator)
    return Diagrams.from_bars(torch.stack([birth, birth + length], dim=-1))


def in_lists(diagrams):
    """The bars of each cloud as pairs, without padding."""
    for bars, there in zip(diagrams.bars, diagrams.mask, strict=True):
        yield [tuple(bar) for bar in bars[there].tolist()]


def cloud_batch(clouds=4, n=20, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clouds, n, d, dtype=torch.float64, generator=generator)


ENDS, NODES = (0.1, 1.7), 15
DIAGRAMS = {"any": with_births(), "H0": rips(cloud_batch()), "H1": rips(cloud_batch(), max_dim=1)}


@pytest.fixture(params=DIAGRAMS)
def diagrams(request):
    found = DIAGRAMS[request.param]
    return found.of(1) if request.param == "H1" else found


# --- The definitions -----------------------------------------------------------------------------


def assert_is(curve, diagrams, value):
    """Compares with a function of the bars of a cloud and a length, at every node."""
    nodes = reference.nodes(*curve.lengths, curve.resolution)
    for bars, found in zip(in_lists(diagrams), curve(diagrams).tolist(), strict=True):
        expected = [value(bars, t) / curve.normalizer for t in nodes]
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("sigma", [0.0, 0.05, 0.7])
def test_betti_curve_is_the_definition(diagrams, sigma):
    curve = BettiCurve(ENDS, NODES, normalizer=2.5, sigma=sigma)
    assert_is(curve, diagrams, lambda bars, t: reference.betti(bars, t, sigma))


def test_silhouette_is_the_definition(diagrams):
    for power in (0.5, 1.0, 3.0):
        curve = Silhouette(ENDS, NODES, normalizer=2.5, power=power)
        assert_is(curve, diagrams, lambda bars, t, q=power: reference.silhouette(bars, t, q))


def test_entropy_curve_is_the_definition(diagrams):
    assert_is(EntropyCurve(ENDS, NODES, normalizer=2.5), diagrams, reference.entropy_curve)


def test_landscape_is_the_definition(diagrams):
    landscape = Landscape(ENDS, NODES, normalizer=2.5, layers=4)
    nodes = reference.nodes(*ENDS, NODES)
    for bars, found in zip(in_lists(diagrams), landscape(diagrams), strict=True):
        expected = [reference.landscape(bars, t, k) / 2.5 for k in range(4) for t in nodes]
        assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_entropy_is_the_definition(diagrams):
    expected = [sum(reference.entropy_terms(bars)) for bars in in_lists(diagrams)]
    assert entropy(diagrams).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_bar_is_open_from_its_birth_on_and_not_at_its_death():
    diagrams = Diagrams.from_bars(torch.tensor([[0.0, 1.0], [1.0, 2.0]]))
    assert BettiCurve((0.0, 2.0), 3)(diagrams).tolist() == [1, 1, 0]


# --- GUDHI ---------------------------------------------------------------------------------------


def of_gudhi(name, diagrams, **options):
    representations = pytest.importorskip("gudhi.representations")
    bars = [np.array(bars) for bars in in_lists(diagrams)]
    transform = getattr(representations, name)(
        resolution=NODES, sample_range=list(ENDS), keep_endpoints=True, **options
    )
    return transform.fit_transform(bars)


def test_betti_curve_agrees_with_gudhi(diagrams):
    expected = of_gudhi("BettiCurve", diagrams)
    np.testing.assert_array_equal(BettiCurve(ENDS, NODES)(diagrams), expected)


def test_landscape_agrees_with_gudhi(diagrams):
    expected = of_gudhi("Landscape", diagrams, num_landscapes=3) / math.sqrt(2)
    found = Landscape(ENDS, NODES, layers=3)(diagrams)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_silhouette_agrees_with_gudhi(diagrams, power):
    expected = of_gudhi("Silhouette", diagrams, weight=lambda bar: (bar[1] - bar[0]) ** power)
    found = Silhouette(ENDS, NODES, power=power)(diagrams)
    np.testing.assert_allclose(found, expected / math.sqrt(2), rtol=1e-6, atol=1e-9)


def test_entropy_curve_agrees_with_gudhi(diagrams):
    expected = of_gudhi("Entropy", diagrams, mode="vector", normalized=False)
    found = EntropyCurve(ENDS, NODES)(diagrams)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_entropy_agrees_with_gudhi(diagrams):
    expected = of_gudhi("Entropy", diagrams, mode="scalar")
    np.testing.assert_allclose(entropy(diagrams), expected[:, 0], rtol=1e-6)


# --- Laws ----------------------------------------------------------------------------------------


def test_layers_of_a_landscape_decrease(diagrams):
    layers = Landscape(ENDS, NODES, layers=6)(diagrams).unflatten(-1, (6, NODES))
    assert (layers.diff(dim=-2) <= 0).all()
    assert (layers >= 0).all()
    assert layers[:, 0].max() > 0


def test_layers_beyond_the_bars_are_zero():
    landscape = Landscape((0.0, 4.0), 5, layers=3)
    one = Diagrams.from_bars(torch.tensor([[[0.0, 4.0]]]))
    assert landscape(one).tolist() == [[0, 1, 2, 1, 0] + 10 * [0]]


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_area_under_a_betti_curve_is_the_length_of_all_bars(diagrams, sigma):
    curve = BettiCurve((-2.0, 6.0), 20_001, sigma=sigma)
    area = torch.trapezoid(curve(diagrams), dx=8 / 20_000)
    torch.testing.assert_close(area, diagrams.persistence.sum(1), rtol=2e-3, atol=0)


def test_the_first_and_only_tent_is_its_own_mean(diagrams):
    longest = Diagrams.from_bars(diagrams.bars[:, -1:])
    silhouette, landscape = Silhouette(ENDS, NODES), Landscape(ENDS, NODES, layers=1)
    torch.testing.assert_close(silhouette(longest), landscape(longest))


@pytest.mark.parametrize("power", [5.0, 1000.0])
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_great_power_leaves_the_longest_bar(power, factor):
    bars = factor * torch.tensor([[0.0, 8.0], [1.0, 2.0]])
    curve = Silhouette((0.0, 8.0 * factor), 9, power=power)
    expected = curve(Diagrams.from_bars(bars[:1]))
    torch.testing.assert_close(curve(Diagrams.from_bars(bars)), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_entropy_of_equal_bars_is_the_logarithm_of_their_number(k):
    births = torch.rand(k, generator=torch.Generator().manual_seed(0)).double()
    diagrams = Diagrams.from_bars(torch.stack([births, births + 0.3], dim=1))
    assert entropy(diagrams).item() == pytest.approx(math.log(k))
    # Where all of them are open, the curve is as high.
    curve = EntropyCurve((1.1, 1.2), 2)
    far = Diagrams.from_bars(torch.tensor([[1.0, 1.3]], dtype=torch.float64).repeat(k, 1))
    assert curve(far).tolist() == pytest.approx(2 * [math.log(k)])


def test_entropy_does_not_see_scale(diagrams):
    torch.testing.assert_close(entropy(diagrams.scaled(1e-30)), entropy(diagrams))


def test_bars_too_short_for_a_float_add_nothing_to_the_entropy():
    bars = torch.tensor([[0.0, 1e30], [0.0, 1e-30], [0.0, 1e30]], requires_grad=True)
    found = entropy(Diagrams.from_bars(bars))
    (gradient,) = torch.autograd.grad(found, bars)
    assert found.item() == pytest.approx(math.log(2))
    assert gradient.isfinite().all()


# --- Gradients -----------------------------------------------------------------------------------

SMOOTH = {
    "betti": BettiCurve(ENDS, 7, sigma=0.2),
    "betti in means": BettiCurve(ENDS, 7, sigma=0.2, scale="death_mean"),
    "landscape": Landscape(ENDS, 7, layers=3),
    "landscape in medians": Landscape(ENDS, 7, layers=3, scale="death_median"),
    "silhouette": Silhouette(ENDS, 7, power=0.5),
    "silhouette of all alike": Silhouette(ENDS, 7, power=0.0),
    "silhouette in maxima": Silhouette(ENDS, 7, power=2.0, scale="death_max"),
    "entropy curve": EntropyCurve(ENDS, 7, sigma=0.2),
    "entropy curve, its shares alone": EntropyCurve(ENDS, 7),
    "entropy": entropy,
}


@pytest.fixture(params=SMOOTH)
def curve(request):
    return SMOOTH[request.param]


def test_gradient_matches_finite_differences(curve):
    bars = with_births(clouds=2, bars=6).bars.requires_grad_()
    assert torch.autograd.gradcheck(lambda b: curve(Diagrams.from_bars(b)), bars)


def test_gradient_reaches_the_points(curve):
    points = cloud_batch(clouds=2, n=8).requires_grad_()
    numbers = curve(rips(points))
    (gradient,) = torch.autograd.grad(numbers.square().sum(), points)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 1e-4


def test_points_that_coincide_give_zeros_with_gradient_zero(curve):
    points = torch.ones(2, 6, 3, requires_grad=True)
    numbers = curve(rips(points))
    numbers.sum().backward()
    assert (numbers == 0).all()
    assert (points.grad == 0).all()


def test_no_gradient_is_pretended_without_smoothing():
    bars = with_births().bars.requires_grad_()
    assert not BettiCurve(ENDS, NODES)(Diagrams.from_bars(bars)).requires_grad


def test_smoothing_tends_to_the_exact_curve(diagrams):
    exact, close = BettiCurve(ENDS, NODES), BettiCurve(ENDS, NODES, sigma=1e-9)
    torch.testing.assert_close(close(diagrams), exact(diagrams))


# --- Scales --------------------------------------------------------------------------------------

STATISTICS = {
    f"{kind}_{name}": function
    for kind in ("tree", "death")
    for name, function in {"mean": np.mean, "median": np.median, "max": np.max}.items()
}


@pytest.mark.parametrize("scale", STATISTICS)
@pytest.mark.parametrize("n", [2, 7, 8])
def test_scale_is_the_statistic_of_numpy(scale, n):
    diagrams = rips(cloud_batch(n=n))
    expected = STATISTICS[scale](diagrams.deaths.numpy(), axis=1)
    np.testing.assert_allclose(length_scale(diagrams, scale), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", STATISTICS)
def test_scale_does_not_see_padding(scale):
    points = cloud_batch(clouds=2, n=9)
    ragged = torch.ones(2, 9, dtype=torch.bool)
    ragged[1, 4:] = False
    found = length_scale(rips(points, mask=ragged), scale)
    alone = [length_scale(rips(points[0]), scale), length_scale(rips(points[1, :4]), scale)]
    torch.testing.assert_close(found, torch.stack(alone))


@pytest.mark.parametrize("scale", STATISTICS)
def test_gradient_of_the_scale_matches_finite_differences(scale):
    points = cloud_batch(clouds=2, n=6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: length_scale(rips(x), scale), points)


@pytest.mark.parametrize("scale", STATISTICS)
@pytest.mark.parametrize("n", [4, 1])
def test_scale_of_points_that_coincide_is_one(scale, n):
    points = torch.ones(2, n, 3, requires_grad=True)
    found = length_scale(rips(points), scale)
    found.sum().backward()
    assert found.tolist() == [1, 1]
    assert (points.grad == 0).all()


def test_scale_none_is_one():
    assert length_scale(rips(cloud_batch()), "none").tolist() == [1, 1, 1, 1]


def test_loops_scaled_by_components_are_scale_invariant():
    points = cloud_batch(n=25, d=2)
    curve = Landscape((0.0, 4.0), layers=2)

    def describe(points):
        both = rips(points, max_dim=1)
        return curve(both.scaled(1 / length_scale(both.of(0), "tree_median")).of(1))

    assert describe(points).max() > 0
    torch.testing.assert_close(describe(7 * points), describe(points))


# --- Fits and refusals ---------------------------------------------------------------------------

CURVES = (BettiCurve, Landscape, Silhouette, EntropyCurve)


@pytest.mark.parametrize("kind", CURVES)
def test_range_reaches_three_steps_beyond_all_bars(kind):
    bars = torch.tensor([[2.0, 3.0], [2.5, 4.0]])
    fitted = kind.fit(Diagrams.from_bars(bars), resolution=27)
    assert fitted.lengths == pytest.approx((2 - 3 * 0.1, 4 + 3 * 0.1))


@pytest.mark.parametrize("kind", CURVES)
def test_range_does_not_reach_below_zero(kind):
    diagrams = rips(cloud_batch())
    fitted = kind.fit(diagrams, resolution=27, scale="death_max")
    assert fitted.lengths == pytest.approx((0.0, 1.15))


def test_fit_smooths_by_one_step_or_as_told():
    diagrams = with_births()
    assert BettiCurve.fit(diagrams, smoothing=0).sigma == 0
    fitted = EntropyCurve.fit(diagrams, resolution=41)
    low, high = fitted.lengths
    assert fitted.sigma == pytest.approx((high - low) / 40)


@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize(
    ("diagrams", "resolution", "message"),
    [
        (Diagrams.from_bars(torch.zeros(3, 0, 2)), 20, "all bars have length zero"),
        (rips(torch.ones(3, 5, 2)), 20, "all bars have length zero"),
        (with_births(), 7, "resolution must be more than 7, got 7"),
    ],
)
def test_refuses_to_fit(kind, diagrams, resolution, message):
    with pytest.raises(ValueError, match=message):
        kind.fit(diagrams, resolution=resolution)


def test_refuses_nodes_that_no_bar_reaches():
    bars = torch.tensor([[0.0, 1e-3], [1.0, 1.0 + 1e-3]])  # too short for the grid, far apart
    with pytest.raises(ValueError, match="the curve is 0 at all 8 nodes"):
        BettiCurve.fit(Diagrams.from_bars(bars + 0.9), resolution=8, smoothing=0)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (Landscape, {"lengths": (1.0, 1.0)}, r"must be a range, low then high, got \(1.0, 1.0\)"),
        (BettiCurve, {"lengths": (0.0, math.inf)}, "lengths must be a range"),
        (Silhouette, {"resolution": 0}, "resolution must be positive, got 0"),
        (EntropyCurve, {"normalizer": -1.0}, "normalizer must be positive, got -1.0"),
        (BettiCurve, {"scale": "mode"}, "scale must be one of none, tree_mean, .*, got 'mode'"),
        (Landscape, {"layers": 0}, "layers must be positive, got 0"),
        (Silhouette, {"power": -1.0}, "power must be 0 or more, got -1.0"),
        (BettiCurve, {"sigma": math.nan}, "sigma must be 0 or more, got nan"),
        (EntropyCurve, {"sigma": -1.0}, "sigma must be 0 or more, got -1.0"),
    ],
)
def test_refuses_impossible_parameters(kind, change, message):
    with pytest.raises(ValueError, match=message):
        replace(kind(ENDS), **change)


def test_entropy_refuses_several_dimensions():
    with pytest.raises(ValueError, match=r"bars of dimensions \[0, 1\].* select one with .of"):
        entropy(rips(cloud_batch(), max_dim=1))
