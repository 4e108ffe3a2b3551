"""Images and vectors of diagrams: against GUDHI, scipy and the definitions in plain loops."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import topology as reference
from scipy.stats import norm

from topkd.topology import Diagrams, PersistenceImage, PersistenceVector, rips
from topkd.topology.images import FORMS, from_json, to_json


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
    return transform.fit_transform([bars.numpy() for bars in diagrams.bars]) / image.scale


# --- Images --------------------------------------------------------------------------------------


def test_image_agrees_with_gudhi():
    diagrams = with_births()
    image = PersistenceImage((-0.2, 1.1), (0.1, 1.5), sigma=0.07, scale=3.0)
    expected = gudhi_images(diagrams, image)
    np.testing.assert_allclose(image(diagrams), expected, rtol=1e-6, atol=1e-6 * expected.max())


def test_fitted_image_of_dimension_zero_agrees_with_gudhi():
    diagrams = rips(cloud_batch())
    image = PersistenceImage.fit(diagrams)
    assert image.births == (0, 0)
    np.testing.assert_allclose(image(diagrams), gudhi_images(diagrams, image), rtol=1e-6, atol=1e-9)


def test_image_is_the_definition():
    diagrams = with_births(clouds=2, bars=4)
    image = PersistenceImage((0.0, 1.0), (0.0, 2.0), sigma=0.3, scale=1.7, resolution=5)
    for bars, pixels in zip(diagrams.bars.tolist(), image(diagrams).tolist(), strict=True):
        expected = reference.image(bars, (0.0, 1.0), (0.0, 2.0), 0.3, 1.7, 5)
        assert pixels == pytest.approx(expected, rel=1e-10)


def test_fit_is_the_recipe_of_the_authors():
    diagrams = rips(cloud_batch(clouds=8))  # 8 x 39 bars: the width is read off the first 200
    image = PersistenceImage.fit(diagrams, resolution=7)
    expected = reference.fit_image(diagrams.bars.tolist(), resolution=7)
    assert image.resolution == 7
    assert image.births == expected["births"]
    assert image.persistences == pytest.approx(expected["persistences"], rel=1e-12)
    assert image.sigma == pytest.approx(expected["sigma"], rel=1e-12)
    assert image.scale == pytest.approx(expected["scale"], rel=1e-10)


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


# --- Vectors -------------------------------------------------------------------------------------


def test_vector_is_the_definition():
    diagrams = rips(cloud_batch(clouds=3, n=12))
    vector = PersistenceVector((0.3, 1.9), sigma=0.11, scale=2.3, resolution=6)
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
        expected = (np.diff(below, axis=0) * relative).sum(1) / vector.scale
        np.testing.assert_allclose(numbers, expected, rtol=1e-9, atol=1e-12)


def test_fit_of_a_vector():
    diagrams = rips(cloud_batch(n=15))
    vector = PersistenceVector.fit(diagrams, resolution=8)
    expected = reference.fit_vector(diagrams.deaths.tolist(), resolution=8)
    assert vector.resolution == 8
    assert vector.persistences == pytest.approx(expected["persistences"], rel=1e-12)
    assert vector.sigma == pytest.approx(expected["sigma"], rel=1e-12)
    assert vector.scale == pytest.approx(expected["scale"], rel=1e-6)


def test_mass_of_a_vector_is_the_sum_of_the_weights():
    diagrams = rips(cloud_batch(clouds=3, n=30))
    vector = PersistenceVector((-20.0, 20.0), sigma=0.3, scale=0.5)
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


# --- Both ----------------------------------------------------------------------------------------


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


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
    assert all(isinstance(value, float | int | tuple) for value in vars(fitted).values())


def test_is_rebuilt_from_real_json(form):
    fitted = form.fit(rips(cloud_batch()), resolution=11)
    again = from_json(json.loads(json.dumps(to_json(fitted))))
    assert again == fitted
    assert type(again) is form
    assert hash(again) == hash(fitted)


@pytest.mark.parametrize("name", ["sigma", "scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_width_or_scale_that_is_not_positive(form, name, value):
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
        (torch.zeros(4, 5, 2), "a persistence .* needs"),
        (torch.zeros(4, 1, 2), "a persistence .* needs"),  # one point: no bar at all
        (torch.zeros(0, 5, 2), "a persistence .* needs"),
    ],
)
def test_refuses_to_fit_what_has_no_extent(form, clouds, message):
    with pytest.raises(ValueError, match=message):
        form.fit(rips(clouds))


@pytest.mark.parametrize("resolution", [3, 2, 0])
def test_refuses_a_vector_of_too_few_cells(resolution):
    with pytest.raises(ValueError, match="resolution"):  # three cells are margin
        PersistenceVector.fit(rips(cloud_batch()), resolution=resolution)
