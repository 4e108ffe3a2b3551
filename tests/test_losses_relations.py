"""Losses on relations within a batch: the papers in plain loops, laws and known cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import relation_losses as reference
from reference.features import WIDTH, batch, bound, features, source_in

from topkd.losses import CC, RKD, SP
from topkd.losses.functional import (
    correlation_kernel,
    correlation_products,
    neighbor_products,
    probabilistic_transfer,
    relational_angles,
    relational_distances,
    similarity_preserving,
)

PAIRS = {
    "neighbors": (
        lambda s, t: neighbor_products(s, t[:, :3]),
        lambda s, t: reference.neighbor_products(s, [row[:3] for row in t]),
        {},
    ),
    "sp": (similarity_preserving, reference.similarity_preserving, {}),
    "kernel": (correlation_kernel, reference.correlation_kernel, {"gamma": 0.4, "order": 2}),
    "wide kernel": (correlation_kernel, reference.correlation_kernel, {"gamma": 1.3, "order": 4}),
    "distances": (relational_distances, reference.relational_distances, {}),
    "angles": (relational_angles, reference.relational_angles, {}),
    "pkt": (probabilistic_transfer, reference.probabilistic_transfer, {}),
    "pkt, large epsilon": (
        probabilistic_transfer,
        reference.probabilistic_transfer,
        {"epsilon": 0.1},
    ),
}
RELATIONS = [similarity_preserving, correlation_kernel, relational_distances, relational_angles]
RELATIONS += [probabilistic_transfer]


def clouds(n=5):
    return features(3, seed=1, n=n).embedding, features(WIDTH, seed=2, n=n).embedding


def rotation(width):
    generator = torch.Generator().manual_seed(7)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q


@pytest.mark.parametrize(("function", "expected", "options"), PAIRS.values(), ids=PAIRS)
def test_value_is_the_paper_in_plain_loops(function, expected, options):
    student, teacher = clouds()
    found = function(student, teacher, **options).item()
    assert found == pytest.approx(expected(student.tolist(), teacher.tolist(), **options), rel=1e-9)


@pytest.mark.parametrize(("function", "expected", "options"), PAIRS.values(), ids=PAIRS)
def test_gradient_is_the_slope_of_the_paper(function, expected, options):
    student, teacher = clouds(n=4)
    student.requires_grad_()
    (found,) = torch.autograd.grad(function(student, teacher, **options), student)
    slopes = reference.slopes(
        lambda rows: expected(rows, teacher.tolist(), **options), student.tolist()
    )
    torch.testing.assert_close(found, found.new_tensor(slopes), rtol=1e-5, atol=1e-8)


def test_products_are_the_mean_of_the_authors_code_over_all_orders():
    student, teacher = features(4, seed=1, n=5).embedding, features(4, seed=2, n=5).embedding
    expected = reference.products_over_all_orders(student.tolist(), teacher.tolist())
    assert correlation_products(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(correlation_products, (student.requires_grad_(), teacher))


def test_neighbors_are_pairs_of_rows_that_follow_each_other():
    # |e| is 1, 2, 3 and 10: (1 * 2 + 2 * 3 + 3 * 10) / 3
    student = torch.tensor([[1.0], [-2.0], [3.0], [10.0]], dtype=torch.float64)
    assert neighbor_products(student, torch.zeros_like(student)).item() == pytest.approx(38 / 3)
    swapped = neighbor_products(student[[0, 2, 1, 3]], torch.zeros_like(student))
    assert swapped.item() == pytest.approx((3 + 6 + 20) / 3)  # the order matters


def test_kernel_of_high_order_is_the_gaussian_kernel():
    student, teacher = clouds()
    kernels = []
    for rows in (student, teacher):
        unit = rows / rows.norm(dim=1, keepdim=True)
        kernels.append((-0.4 * torch.cdist(unit, unit).square()).exp())
    found = correlation_kernel(student, teacher, gamma=0.4, order=20)
    torch.testing.assert_close(found, torch.nn.functional.mse_loss(*kernels))


@pytest.mark.parametrize("function", RELATIONS)
@given(factor=st.floats(0.01, 100))
def test_no_relation_sees_scale(function, factor):
    student, teacher = clouds()
    torch.testing.assert_close(function(factor * student, teacher), function(student, teacher))


@pytest.mark.parametrize("function", RELATIONS)
def test_no_relation_sees_a_rotation(function):
    student, teacher = clouds()
    torch.testing.assert_close(function(student @ rotation(3), teacher), function(student, teacher))


@pytest.mark.parametrize("function", [relational_distances, relational_angles])
@given(shift=st.floats(-10, 10), factor=st.floats(0.1, 10))
def test_distances_and_angles_see_no_similarity_transform(function, shift, factor):
    _, teacher = clouds()
    moved = factor * teacher @ rotation(WIDTH) + shift
    assert function(moved, teacher).item() == pytest.approx(0, abs=1e-12)


@given(factors=st.lists(st.floats(0.1, 10), min_size=5, max_size=5))
def test_probabilities_see_no_lengths(factors):
    student, teacher = clouds()
    scaled = student * student.new_tensor(factors)[:, None]
    torch.testing.assert_close(
        probabilistic_transfer(scaled, teacher), probabilistic_transfer(student, teacher)
    )


def test_similarity_sees_the_scale_of_all_but_not_that_of_a_row():
    student, teacher = clouds()
    scaled = torch.cat([3 * student[:1], student[1:]])
    apart = similarity_preserving(scaled, teacher) - similarity_preserving(student, teacher)
    assert apart.abs() > 1e-4


def test_similarity_of_maps_is_that_of_all_their_numbers():
    student, teacher = features(3, seed=1), features(WIDTH, seed=2)
    found = SP()(student, teacher, batch())
    rows = (made.maps[-1].flatten(1).tolist() for made in (student, teacher))
    assert found.item() == pytest.approx(reference.similarity_preserving(*rows), rel=1e-12)


def test_relational_weighs_distances_and_angles():
    student, teacher = features(3, seed=1), features(WIDTH, seed=2)
    rows = student.embedding.tolist(), teacher.embedding.tolist()
    distances, angles = reference.relational_distances(*rows), reference.relational_angles(*rows)
    for options, expected in (
        ({}, 25 * distances + 50 * angles),
        ({"distance": 2.0, "angle": 0.0}, 2 * distances),
    ):
        found = RKD(**options)(student, teacher, batch())
        assert found.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("function", RELATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_bounded_where_samples_coincide_or_are_nothing(function, dtype):
    student = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [3.0, -1.0]], dtype=dtype)
    teacher = clouds(n=4)[1].to(dtype)
    (gradient,) = torch.autograd.grad(
        function(student.requires_grad_(), teacher) + function(0 * student, teacher), student
    )
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 100


def test_an_equilateral_triangle_against_a_line_is_known():
    # Distances 1, 1, 1 against 1, 1, 2 with the mean 4/3; cosines 1/2 against 1, -1, 1.
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)
    line = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    huber = reference.huber
    distances = 2 * (2 * huber(1 - 3 / 4) + huber(1 - 6 / 4)) / 9
    angles = 2 * (2 * huber(0.5 - 1) + huber(0.5 + 1)) / 27
    assert relational_distances(triangle, line).item() == pytest.approx(distances)
    assert relational_angles(triangle, line).item() == pytest.approx(angles)


@pytest.mark.parametrize("form", ["products", "neighbors", "kernel"])
def test_correlation_congruence_has_three_forms(form, tmp_path):
    student, teacher = features(3, seed=1), features(WIDTH, seed=2)
    source = source_in(tmp_path)
    loss = bound(CC, student, teacher, source, form=form).double()
    rows = student.embedding, teacher.embedding
    if form != "kernel":
        compare = {"products": correlation_products, "neighbors": neighbor_products}[form]
        expected = compare(loss.student(rows[0]), loss.teacher(rows[1]))
        assert sum(w.numel() for w in loss.parameters()) == 128 * (3 + 1 + WIDTH + 1)
    else:
        expected = correlation_kernel(*rows)
        assert not list(loss.parameters())
    torch.testing.assert_close(loss(student, teacher, batch()), expected)


@pytest.mark.parametrize("function", RELATIONS)
def test_refuses_batches_that_differ(function):
    with pytest.raises(ValueError, match=r"batches differ: student \(6, .*, teacher \(5, "):
        function(torch.zeros(6, 4), torch.zeros(5, 4))


@pytest.mark.parametrize("shape", [(6, 3), (5, 4)])
def test_refuses_products_of_embeddings_that_differ(shape):
    with pytest.raises(ValueError, match=r"embeddings differ: student \(6, 4\), teacher \("):
        correlation_products(torch.zeros(6, 4), torch.zeros(shape))
    with pytest.raises(ValueError, match=r"embeddings differ: student \(6, 4\), teacher \("):
        neighbor_products(torch.zeros(6, 4), torch.zeros(shape))


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (RKD, {"angle": -1.0}, "angle must not be negative, got -1.0"),
        (RKD, {"distance": math.nan}, "distance must not be negative, got nan"),
        (CC, {"form": "sums"}, "form must be products or neighbors or kernel, got sums"),
        (CC, {"size": 64, "form": "kernel"}, "size has no effect with form: kernel; leave it out"),
        (CC, {"order": 2, "form": "neighbors"}, "order has no effect with form: neighbors"),
        (CC, {"gamma": 0.4}, "gamma has no effect with form: products"),
        (CC, {"gamma": 0.0}, "gamma must be positive, got 0.0"),
        (CC, {"order": 0}, "order must be positive, got 0"),
        (CC, {"size": -1}, "size must be positive, got -1"),
    ],
)
def test_refuses_wrong_options(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(**options)


def test_refuses_networks_without_maps():
    student = features(3, seed=1)
    bare = type(student)(student.logits, student.embedding)
    with pytest.raises(ValueError, match="the teacher has no maps"):
        SP()(student, bare, batch())
