"""Images and vectors of diagrams: against GUDHI, scipy and the definitions in plain loops."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import topology as reference
from safetensors.torch import load, save
from scipy.stats import norm

from topkd.topology import Diagrams, PersistenceImage, PersistenceVector, rips
from topkd.topology.images import WEIGHTS
from topkd.topology.scaling import length_scale
from topkd.topology.serialization import (
    VectorizationLayer,
    from_json,
    lost_mass,
    to_json,
)
from topkd.topology.vectorization import VECTORIZATIONS


def cloud_batch(clouds=6, n=40, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clouds, n, d, dtype=torch.float64, generator=generator)


def with_births(clouds=3, bars=25, seed=0):
    """Diagrams that are born at other times than 0, as those of higher dimensions."""
    generator = torch.Generator().manual_seed(seed)
    birth, length = torch.rand(2, clouds, bars, dtype=torch.float64, generator=generator)
    bars = torch.stack([birth, birth + length], dim=-1)
    return Diagrams.from_bars(bars)


def gudhi_images(diagrams, image):
    representations = pytest.importorskip("gudhi.representations")
    transform = representations.PersistenceImage(
        bandwidth=image.sigma,
        weight=lambda point: 10 * np.tanh(point[1]) + 10 * np.log(100 * point[0] + 1),
        resolution=[image.resolution, image.resolution],
        im_range=[*image.births, *image.persistences],
    )
    return transform.fit_transform([bars.numpy() for bars in diagrams.bars]) / image.normalizer


# --- Images --------------------------------------------------------------------------------------


def test_image_agrees_with_gudhi():
    diagrams = with_births()
    image = PersistenceImage((-0.2, 1.1), (0.1, 1.5), sigma=0.07, normalizer=3.0)
    expected = gudhi_images(diagrams, image)
    np.testing.assert_allclose(image(diagrams), expected, rtol=1e-6, atol=1e-6 * expected.max())


def test_image_of_another_weight_agrees_with_gudhi():
    representations = pytest.importorskip("gudhi.representations")
    diagrams = with_births()
    image = PersistenceImage((-0.2, 1.1), (0.1, 1.5), sigma=0.07, weight="persistence")
    transform = representations.PersistenceImage(
        bandwidth=0.07,
        weight=lambda point: point[1],
        resolution=[20, 20],
        im_range=[-0.2, 1.1, 0.1, 1.5],
    )
    expected = transform.fit_transform([bars.numpy() for bars in diagrams.bars])
    np.testing.assert_allclose(image(diagrams), expected, rtol=1e-6, atol=1e-6 * expected.max())


def test_image_of_integrals_agrees_with_persim():
    persim = pytest.importorskip("persim")
    diagrams = with_births()
    image = PersistenceImage(
        (0.0, 1.0), (0.5, 1.5), 0.07, resolution=8, sampling="integral", weight="persistence"
    )
    other = persim.PersistenceImager(
        birth_range=image.births,
        pers_range=image.persistences,
        pixel_size=1 / 8,
        weight="persistence",
        weight_params={"n": 1.0},
        kernel_params={"sigma": [[0.07**2, 0.0], [0.0, 0.07**2]]},  # a covariance
    )
    # Its axes are birth, then persistence.
    expected = [other.transform(bars.numpy(), skew=True).T.ravel() for bars in diagrams.bars]
    np.testing.assert_allclose(image(diagrams), expected, rtol=1e-10, atol=1e-13)


def test_fitted_image_of_dimension_zero_agrees_with_gudhi():
    diagrams = rips(cloud_batch())
    image = PersistenceImage.fit(diagrams)
    assert image.births == (0, 0)
    np.testing.assert_allclose(image(diagrams), gudhi_images(diagrams, image), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sampling", ["density", "integral"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("scale", ["none", "death_mean", "death_median", "death_max"])
def test_image_is_the_definition(sampling, weight, scale):
    diagrams = with_births(clouds=2, bars=5)
    image = PersistenceImage((0.0, 1.0), (0.0, 2.0), 0.3, 1.7, 5, sampling, weight, scale)
    for bars, pixels in zip(diagrams.bars.tolist(), image(diagrams).tolist(), strict=True):
        expected = reference.image(
            bars, (0.0, 1.0), (0.0, 2.0), 0.3, 1.7, 5, sampling, weight, scale
        )
        assert pixels == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_fit_is_the_recipe_of_the_authors():
    diagrams = rips(cloud_batch(clouds=8))  # 8 x 39 bars: the width is read off the first 200
    image = PersistenceImage.fit(diagrams, resolution=7)
    expected = reference.fit_image(diagrams.bars.tolist(), resolution=7)
    assert image.resolution == 7
    assert image.births == expected["births"]
    assert image.persistences == pytest.approx(expected["persistences"], rel=1e-12)
    assert image.sigma == pytest.approx(expected["sigma"], rel=1e-12)
    assert image.normalizer == pytest.approx(expected["normalizer"], rel=1e-10)


def test_fit_reads_the_width_off_the_first_200_bars_alone():
    near, far = rips(cloud_batch(clouds=10)), rips(100 * cloud_batch(clouds=4, seed=1))
    both = Diagrams.from_bars(torch.cat([near.bars, far.bars]), dimension=0)
    assert PersistenceImage.fit(both).sigma == PersistenceImage.fit(near).sigma


def test_fit_does_not_see_bars_of_length_zero():
    # GUDHI does not report them, so the authors never had one; a dead network makes many.
    clouds = cloud_batch(clouds=4, n=20)
    alone = PersistenceImage.fit(rips(clouds), resolution=5)
    twice = PersistenceImage.fit(rips(torch.cat([clouds, clouds], dim=1)), resolution=5)
    assert twice.persistences == pytest.approx(alone.persistences)
    assert twice.sigma == pytest.approx(alone.sigma)
    assert twice.scale == pytest.approx(alone.scale)


def test_columns_are_equal_as_all_births_are():
    diagrams = rips(cloud_batch())
    pixels = PersistenceImage.fit(diagrams)(diagrams).unflatten(-1, (20, 20))
    assert torch.equal(pixels, pixels[..., :1].expand_as(pixels))
    assert (pixels[..., 0].std(1) > 0).all()  # the rows are not


def test_pixels_of_integrals_sum_to_the_weights():
    diagrams = with_births()
    image = PersistenceImage((-5.0, 5.0), (-5.0, 5.0), 0.3, 0.5, 10, "integral", "persistence")
    torch.testing.assert_close(image(diagrams).sum(1) * 0.5, diagrams.persistence.sum(1))
    image = replace(image, weight="one")
    assert (image(diagrams).sum(1) * 0.5).tolist() == pytest.approx(3 * [25])


def test_density_times_area_is_nearly_the_integral_for_wide_gaussians():
    diagrams, cell = with_births(), 0.1
    integral = PersistenceImage((0.0, 2.0), (0.0, 2.0), 0.2, 1.0, 20, "integral")
    nodes = (0.05, 1.95)  # the centers of the cells
    density = replace(integral, births=nodes, persistences=nodes, sampling="density")
    difference = density(diagrams) * cell**2 - integral(diagrams)
    assert difference.abs().sum() < 0.01 * integral(diagrams).sum()


@pytest.mark.parametrize("stretch", [0.1, 10.0])  # either side of a cell may be the longer
def test_fit_of_cells_covers_all_bars_by_three_widths(stretch):
    births, lengths = with_births().births, stretch * with_births().persistence
    diagrams = Diagrams.from_bars(torch.stack([births, births + lengths], dim=-1))
    image = PersistenceImage.fit_cells(diagrams, resolution=16)
    assert image.births[0] == pytest.approx(births.min().item() - 3 * image.sigma)
    assert image.births[1] == pytest.approx(births.max().item() + 3 * image.sigma)
    assert image.persistences[0] == 0
    assert image.persistences[1] == pytest.approx(lengths.max().item() + 3 * image.sigma)
    cells = [(high - low) / 16 for low, high in (image.births, image.persistences)]
    assert max(cells) == pytest.approx(image.sigma)
    assert image(diagrams).max().item() == pytest.approx(1)
    assert lost_mass(image, diagrams) == 0


def test_cells_of_dimension_zero_are_refused():
    with pytest.raises(ValueError, match="all births are 0.* use a PersistenceVector"):
        PersistenceImage.fit_cells(rips(cloud_batch()))


def test_cells_of_nothing_are_refused():
    with pytest.raises(ValueError, match="all bars have length zero"):
        PersistenceImage.fit_cells(Diagrams.from_bars(torch.zeros(2, 0, 2)))
    with pytest.raises(ValueError, match="resolution must be more than 6, got 6"):
        PersistenceImage.fit_cells(with_births(), resolution=6)


# --- Vectors -------------------------------------------------------------------------------------


def test_vector_is_the_definition():
    diagrams = rips(cloud_batch(clouds=3, n=12))
    vector = PersistenceVector((0.3, 1.9), sigma=0.11, normalizer=2.3, resolution=6)
    for deaths, numbers in zip(diagrams.deaths.tolist(), vector(diagrams).tolist(), strict=True):
        expected = reference.vector(deaths, (0.3, 1.9), 0.11, 2.3, 6)
        assert numbers == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_vector_agrees_with_the_normal_distribution_of_scipy():
    diagrams = rips(cloud_batch(clouds=3))
    vector = PersistenceVector.fit(diagrams)
    edges = np.linspace(*vector.persistences, vector.resolution + 1)
    for deaths, numbers in zip(diagrams.deaths.numpy(), vector(diagrams).numpy(), strict=True):
        relative = deaths / deaths.mean()
        below = norm.cdf(edges[:, None], loc=relative, scale=vector.sigma)
        expected = (np.diff(below, axis=0) * relative).sum(1) / vector.normalizer
        np.testing.assert_allclose(numbers, expected, rtol=1e-9, atol=1e-12)


def test_fit_of_a_vector():
    diagrams = rips(cloud_batch(n=15))
    vector = PersistenceVector.fit(diagrams, resolution=8)
    expected = reference.fit_vector(diagrams.deaths.tolist(), resolution=8)
    assert vector.resolution == 8
    assert vector.persistences == pytest.approx(expected["persistences"], rel=1e-12)
    assert vector.sigma == pytest.approx(expected["sigma"], rel=1e-12)
    assert vector.normalizer == pytest.approx(expected["normalizer"], rel=1e-6)


def test_mass_of_a_vector_is_the_sum_of_the_weights():
    diagrams = rips(cloud_batch(clouds=3, n=30))
    vector = PersistenceVector((-20.0, 20.0), sigma=0.3, normalizer=0.5)
    # Relative deaths sum to their number, whatever they are.
    assert vector(diagrams).sum(1).tolist() == pytest.approx([29 / 0.5] * 3)


@given(st.floats(1e-3, 1e3))
def test_vector_does_not_see_scale(factor):
    clouds = cloud_batch(clouds=2, n=15)
    vector = PersistenceVector.fit(rips(clouds))
    torch.testing.assert_close(vector(rips(factor * clouds)), vector(rips(clouds)))


def test_image_sees_scale():
    clouds = cloud_batch(clouds=2)
    image = PersistenceImage.fit(rips(clouds))
    assert not torch.allclose(image(rips(2 * clouds)), image(rips(clouds)), atol=0.1)


# --- Image and vector ----------------------------------------------------------------------------


@pytest.fixture(params=["image", "vector"])
def form(request):
    return VECTORIZATIONS[request.param]


def test_fit_scales_the_greatest_number_to_one(form):
    diagrams = rips(cloud_batch())
    numbers = form.fit(diagrams)(diagrams)
    assert numbers.max().item() == pytest.approx(1)
    assert numbers.min() >= 0


def test_size_is_the_length(form):
    diagrams = rips(cloud_batch())
    fitted = form.fit(diagrams, resolution=9)
    assert fitted(diagrams).shape == (6, fitted.size)


def test_a_batch_is_its_diagrams_one_by_one(form):
    clouds = cloud_batch()
    fitted = form.fit(rips(clouds))
    alone = torch.stack([fitted(rips(cloud)) for cloud in clouds])
    torch.testing.assert_close(fitted(rips(clouds)), alone, rtol=1e-12, atol=1e-12)


def test_order_of_the_points_does_not_matter(form):
    clouds = cloud_batch()
    fitted = form.fit(rips(clouds))
    torch.testing.assert_close(fitted(rips(clouds.flip(1))), fitted(rips(clouds)))


def test_gradient_matches_finite_differences(form):
    clouds = cloud_batch(clouds=2, n=6, d=3)
    fitted = form.fit(rips(clouds), resolution=5)
    assert torch.autograd.gradcheck(lambda x: fitted(rips(x)), clouds.requires_grad_())


def test_autocast_rounds_nothing(form):
    clouds = cloud_batch()
    fitted = form.fit(rips(clouds))
    found = []
    for half in (False, True):
        points = (1.1 * clouds).float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            numbers = fitted(rips(points))
            value = numbers.square().sum()
        found.append([numbers, *torch.autograd.grad(value, points)])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_gradient_through_births_matches_finite_differences():
    image = PersistenceImage((0.0, 1.0), (0.0, 1.0), sigma=0.2, resolution=4)
    diagrams = with_births(clouds=2, bars=3)
    bars = diagrams.bars.requires_grad_()
    assert torch.autograd.gradcheck(lambda b: image(Diagrams.from_bars(b)), bars)


def test_coinciding_points_give_zeros_with_gradient_zero(form):
    fitted = form.fit(rips(cloud_batch()))
    points = torch.ones(2, 40, 5, dtype=torch.float64, requires_grad=True)
    numbers = fitted(rips(points))
    numbers.sum().backward()
    assert (numbers == 0).all()
    assert (points.grad == 0).all()


def test_a_diagram_without_bars_gives_zeros(form):
    fitted = form.fit(rips(cloud_batch()))
    points = torch.ones(3, 1, 5, requires_grad=True)
    numbers = fitted(rips(points))
    numbers.sum().backward()
    assert torch.equal(numbers, torch.zeros(3, fitted.size))
    assert (points.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_type_of_the_diagram_is_kept(form, dtype):
    clouds = cloud_batch()
    fitted = form.fit(rips(clouds))
    numbers = fitted(rips(clouds.to(dtype)))
    assert numbers.dtype == dtype
    torch.testing.assert_close(numbers.double(), fitted(rips(clouds)), rtol=1e-3, atol=1e-4)


def test_arguments_are_never_changed(form):
    diagrams = rips(cloud_batch())
    before = diagrams.bars.clone()
    form.fit(diagrams)(diagrams)
    assert torch.equal(diagrams.bars, before)


def test_fit_leaves_no_gradient_behind(form):
    fitted = form.fit(rips(cloud_batch().requires_grad_()))
    assert all(isinstance(value, float | int | tuple | str) for value in vars(fitted).values())


def test_is_rebuilt_from_real_json(form):
    fitted = form.fit(rips(cloud_batch()), resolution=11)
    again = from_json(json.loads(json.dumps(to_json(fitted))))
    assert again == fitted
    assert type(again) is form
    assert hash(again) == hash(fitted)


@pytest.mark.parametrize("name", ["sigma", "normalizer"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_width_or_normalizer_that_is_not_positive(form, name, value):
    description = to_json(form.fit(rips(cloud_batch()))) | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
        from_json(description)


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
def test_refuses_an_empty_range(ends):
    with pytest.raises(ValueError, match="persistences must be a range, low then high"):
        PersistenceVector(ends, sigma=0.1)


@pytest.mark.parametrize(
    ("clouds", "message"),
    [
        (torch.zeros(4, 5, 2), "(a persistence vector needs a range|do not determine sigma)"),
        (
            torch.zeros(4, 1, 2),
            "(a persistence vector needs a range|do not determine sigma)",
        ),  # one point: no bar at all
        (torch.zeros(0, 5, 2), "(a persistence vector needs a range|do not determine sigma)"),
    ],
)
def test_refuses_to_fit_what_has_no_extent(form, clouds, message):
    with pytest.raises(ValueError, match=message):
        form.fit(rips(clouds))


@pytest.mark.parametrize("resolution", [3, 2, 0])
def test_refuses_a_vector_of_too_few_cells(resolution):
    with pytest.raises(ValueError, match="resolution"):  # three cells are margin
        PersistenceVector.fit(rips(cloud_batch()), resolution=resolution)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"births": (2.0, 1.0)}, "births must be a range, low then high"),
        ({"births": (1.0, 1.0), "sampling": "integral"}, "births must be a range, low then high"),
        ({"sampling": "nodes"}, "sampling must be one of density, integral, got 'nodes'"),
        ({"weight": "p"}, "weight must be one of topkd, persistence, one, got 'p'"),
        ({"scale": "mode"}, "scale must be one of none, tree_mean, .*, death_max, got 'mode'"),
        ({"resolution": 0}, "resolution must be positive, got 0"),
    ],
)
def test_refuses_impossible_images(change, message):
    image = PersistenceImage((0.0, 1.0), (0.0, 1.0), sigma=0.1)
    with pytest.raises(ValueError, match=message):
        replace(image, **change)


# --- All that can be stored ----------------------------------------------------------------------


def fit(name, diagrams, **options):
    if name == "cells":
        return PersistenceImage.fit_cells(diagrams, **options)
    return VECTORIZATIONS[name].fit(diagrams, **options)


@pytest.fixture(params=[*VECTORIZATIONS, "cells"])
def name(request):
    return request.param


@pytest.fixture
def fitted(name):
    return fit(name, with_births(), resolution=9)


def test_greatest_number_is_one(fitted):
    numbers = fitted(with_births())
    assert numbers.shape == (3, fitted.size)
    assert numbers.max().item() == pytest.approx(1)


def test_diagrams_come_one_by_one_or_in_any_order(fitted):
    bars = with_births().bars
    alone = torch.stack([fitted(Diagrams.from_bars(some)) for some in bars])
    together = fitted(Diagrams.from_bars(bars))
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fitted(Diagrams.from_bars(bars.flip(1))), together)


def test_padding_is_not_seen(fitted):
    diagrams = with_births()
    births = torch.nn.functional.pad(diagrams.births, (0, 4), value=0.3)
    deaths = torch.nn.functional.pad(diagrams.deaths, (0, 4), value=0.9).requires_grad_()
    padded = Diagrams.from_bars(torch.stack([births, deaths], dim=-1))
    padded = replace(padded, mask=padded.mask & (torch.arange(29) < 25))
    torch.testing.assert_close(fitted(padded), fitted(diagrams), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lost_mass(fitted, padded), lost_mass(fitted, diagrams))
    (gradient,) = torch.autograd.grad(fitted(padded).sum(), deaths)
    assert (gradient[:, 25:] == 0).all()
    assert (gradient[:, :25] != 0).any()


def test_bars_of_length_zero_are_not_seen(name):
    points = cloud_batch(clouds=3, n=10)
    fitted = replace(fit(name if name != "cells" else "image", rips(points)), scale="none")
    if name in ("image", "vector", "cells"):
        fitted = replace(fitted, weight="one")
    twice = torch.cat([points, points], dim=1)
    torch.testing.assert_close(fitted(rips(twice)), fitted(rips(points)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("shape", [(0, 2), (2, 0, 2), (2, 3, 2)])
def test_no_bars_give_zeros(fitted, shape, dimension):
    # Those there are have length zero, or end before they begin, as rounded lengths may.
    bars = (1 - torch.tensor([0.0, 1e-7]) * torch.rand(shape).round()).requires_grad_()
    numbers = fitted(Diagrams.from_bars(bars, dimension=dimension))
    assert torch.equal(numbers, torch.zeros(*shape[:-2], fitted.size))
    (gradient,) = torch.autograd.grad(numbers.sum(), bars)
    assert (gradient == 0).all()
    assert lost_mass(fitted, Diagrams.from_bars(bars)) == 0


def test_single_precision_is_kept(fitted):
    diagrams = with_births()
    numbers = fitted(Diagrams.from_bars(diagrams.bars.float()))
    assert numbers.dtype == torch.float32
    torch.testing.assert_close(numbers.double(), fitted(diagrams), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", ["death_mean", "death_median", "death_max"])
def test_a_scale_hides_the_size(fitted, scale):
    diagrams = with_births()
    fitted = replace(fitted, scale=scale)
    torch.testing.assert_close(fitted(diagrams.scaled(37.0)), fitted(diagrams))
    factors = torch.tensor([0.1, 1.0, 20.0]).double()  # each cloud has its own scale
    torch.testing.assert_close(fitted(diagrams.scaled(factors)), fitted(diagrams))


@pytest.mark.parametrize("scale", ["death_mean", "death_median", "death_max"])
def test_gradient_passes_through_the_scale_or_not(fitted, scale):
    bars = with_births().bars.requires_grad_()
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)

    def gradients(fitted, diagrams):
        return torch.autograd.grad(fitted(diagrams.scaled(factor)).square().sum(), [factor, bars])

    diagrams = Diagrams.from_bars(bars)
    through, _ = gradients(replace(fitted, scale=scale), diagrams)
    assert through.abs() < 1e-12  # size has no effect
    held, of_bars = gradients(replace(fitted, scale=scale, detach_scale=True), diagrams)
    assert held.abs() > 1e-3
    constant = diagrams.scaled(1 / length_scale(diagrams, scale).detach())
    expected = gradients(replace(fitted, scale="none"), constant)
    torch.testing.assert_close([held, of_bars], [*expected])


@pytest.mark.parametrize("scale", ["none", "death_mean"])
def test_all_gradients_match_finite_differences(name, scale):
    bars = with_births(clouds=2, bars=7).bars.requires_grad_()
    fitted = replace(fit(name, Diagrams.from_bars(bars), resolution=8), scale=scale)
    assert torch.autograd.gradcheck(lambda b: fitted(Diagrams.from_bars(b)), bars)


def test_bars_of_one_dimension_at_a_time(fitted):
    both = rips(cloud_batch(), max_dim=1)
    assert fitted(both.of(0)).shape == fitted(both.of(1)).shape == (6, fitted.size)
    with pytest.raises(ValueError, match=r"bars of dimensions \[0, 1\]"):
        fitted(both)


# --- Storing -------------------------------------------------------------------------------------


def test_all_are_rebuilt_from_json(name):
    fitted = fit(name, with_births(), resolution=9, scale="death_max", detach_scale=True)
    again = from_json(json.loads(json.dumps(to_json(fitted))))
    assert again == fitted
    assert type(again) is type(fitted)
    assert torch.equal(again(with_births()), fitted(with_births()))


def test_descriptions_that_name_no_choices_are_those_of_topkd():
    ranges = {"persistences": [0.1, 2.0], "sigma": 0.3, "normalizer": 4.0, "resolution": 3}
    image = from_json({"form": "image", "births": [0.0, 0.0], **ranges})
    assert (image.sampling, image.weight, image.scale) == ("density", "topkd", "none")
    vector = from_json({"form": "vector", **ranges})
    assert (vector.weight, vector.scale, vector.detach_scale) == (
        "persistence",
        "death_mean",
        False,
    )


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "form must be one of .*vector.*, got 'None'"),
        ({"form": "picture"}, "form must be one of .*vector.*, got 'picture'"),
        ({"form": "betti"}, "invalid parameters of the form 'betti': .*lengths"),
        ({"form": "betti", "lengths": [0.0, 1.0], "weight": "one"}, "parameters .*weight"),
    ],
)
def test_other_descriptions_are_refused(description, message):
    with pytest.raises(ValueError, match=message):
        from_json(description)


def through_torch(state):
    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    return torch.load(content, weights_only=True)


@pytest.mark.parametrize("through", [through_torch, lambda state: load(save(state))])
def test_a_layer_keeps_its_parameters_in_its_state(fitted, through):
    network = torch.nn.Sequential(VectorizationLayer(fitted), torch.nn.Linear(fitted.size, 2))
    other = PersistenceVector((0.0, 1.0), sigma=0.5)
    again = torch.nn.Sequential(VectorizationLayer(other), torch.nn.Linear(fitted.size, 2))
    again.load_state_dict(through(network.state_dict()))
    assert again[0].vectorization == fitted
    diagrams = Diagrams.from_bars(with_births().bars.float())
    assert torch.equal(again(diagrams), network(diagrams))


# --- Lost mass -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["none", "death_mean"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_lost_mass_is_the_weight_of_the_bars_outside(scale, weight):
    ends, diagrams = ((0.1, 0.5), (0.2, 0.7)), with_births(clouds=2)
    image = PersistenceImage(*ends, sigma=0.1, weight=weight, scale=scale)
    vector = PersistenceVector(ends[1], sigma=0.1, weight="one", scale=scale)
    total = lost = outside = 0.0
    for bars in diagrams.bars.tolist():
        length = reference.scale_of(scale, [d for _, d in bars])
        for b, p in ((b / length, (d - b) / length) for b, d in bars):
            total += reference.weight_of(weight, b, p)
            seen = ends[0][0] <= b <= ends[0][1] and ends[1][0] <= p <= ends[1][1]
            lost += 0 if seen else reference.weight_of(weight, b, p)
            outside += not ends[1][0] <= p <= ends[1][1]
    assert lost_mass(image, diagrams).item() == pytest.approx(lost / total)
    assert lost_mass(vector, diagrams).item() == pytest.approx(outside / 50)


def test_lost_mass_of_curves_is_the_length_outside():
    bars = torch.tensor([[[0.0, 4.0], [5.0, 9.0], [1.0, 3.0]], [[9.0, 11.0], [0.0, 0.0], [0, 0]]])
    for name in ("betti", "landscape", "silhouette", "entropy"):
        curve = VECTORIZATIONS[name]((2.0, 6.0))
        assert lost_mass(curve, Diagrams.from_bars(bars)).item() == pytest.approx(8 / 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_lost_of_what_was_fitted(name, dtype):
    both = rips(cloud_batch(clouds=10, n=30).to(dtype), max_dim=1)
    for dimension in (0, 1) if name != "cells" else (1,):
        fitted = fit(name, both.of(dimension))
        assert lost_mass(fitted, both.of(dimension)).item() == pytest.approx(0, abs=1e-6)


def test_a_layer_warns_once(fitted):
    layer, far = VectorizationLayer(replace(fitted, scale="none")), with_births().scaled(1000.0)
    with pytest.warns(UserWarning, match="100% of the mass .* is outside the range"):
        layer(far)
    for _ in range(9):  # a warning is an error here
        layer(far)


def test_a_layer_looks_at_calls_whose_number_is_a_power_of_two(monkeypatch, fitted):
    seen = []
    monkeypatch.setattr(
        "topkd.topology.serialization.lost_mass",
        lambda vectorization, diagrams: seen.append(diagrams) or torch.zeros(()),
    )
    layer = VectorizationLayer(fitted)
    calls = [with_births() for _ in range(20)]
    for diagrams in calls:
        layer(diagrams)
    assert [id(diagrams) for diagrams in seen] == [id(calls[k - 1]) for k in (1, 2, 4, 8, 16)]


def test_a_compiled_layer_does_not_look(fitted):
    layer, far = VectorizationLayer(fitted), with_births().scaled(1000.0)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(far), fitted(far))
