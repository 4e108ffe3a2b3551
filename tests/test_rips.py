"""Exact persistence: against four other libraries, known diagrams, and the laws it must keep."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import topology as reference
from reference.clouds import gaussian, octahedron, polygon
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import pdist, squareform
from torch.library import opcheck

from topkd.topology import edge_lengths, rips
from topkd.topology.critical import critical_edges


def grid(side):
    axis = torch.arange(side, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


def collinear():
    return torch.tensor([0.0, 7.0, 3.0, 12.0, 1.0]).double()[:, None] * torch.ones(3).double()


# What features look like, and what breaks minimum spanning trees: ties, duplicates, large offsets.
CLOUDS = {
    "two points": gaussian(2, 5),
    "three points": gaussian(3, 1),
    "feature-like": gaussian(64, 64).relu(),
    "more points than a machine word has bits": gaussian(130, 3),
    "wide": gaussian(20, 500),
    "grid, all ties": grid(6),
    "grid, twice": grid(4).repeat(2, 1),
    "some duplicates": gaussian(15, 4)[torch.arange(40) % 15],
    "collinear": collinear(),
    "polygon": polygon(12),
    "octahedron": octahedron(),
    "far from the origin": gaussian(40, 8) + 1e6,  # in float32 its points are a coarse grid
    "clusters": gaussian(60, 10) + 30 * gaussian(6, 10, seed=1).repeat(10, 1),
}


@pytest.fixture(params=CLOUDS)
def cloud(request):
    return CLOUDS[request.param]


# --- Other implementations -----------------------------------------------------------------------


def test_agrees_with_the_simplex_tree_of_gudhi(cloud):
    gudhi = pytest.importorskip("gudhi")
    tree = gudhi.RipsComplex(points=cloud.numpy()).create_simplex_tree(max_dimension=1)
    tree.compute_persistence(homology_coeff_field=2, min_persistence=-1)
    expected = tree.persistence_intervals_in_dimension(0)
    expected = np.sort(expected[np.isfinite(expected[:, 1]), 1])
    np.testing.assert_allclose(rips(cloud).deaths, expected, rtol=1e-12, atol=1e-12)


def test_agrees_with_the_fast_path_of_gudhi(cloud):
    gudhi = pytest.importorskip("gudhi.sklearn")
    distances = squareform(pdist(cloud.numpy()))
    persistence = gudhi.RipsPersistence(
        [0], homology_coeff_field=2, input_type="full distance matrix"
    )
    (bars,) = persistence.fit_transform([distances])[0]
    expected = np.sort(bars[np.isfinite(bars[:, 1]), 1])  # it leaves bars of length zero out
    found = rips(cloud).deaths
    np.testing.assert_allclose(found[found > 0], expected, rtol=1e-12)


def test_agrees_with_ripser(cloud):
    ripser = pytest.importorskip("ripser")
    distances = squareform(pdist(cloud.numpy()))
    bars = ripser.ripser(distances, distance_matrix=True, maxdim=0)["dgms"][0]
    expected = np.sort(bars[np.isfinite(bars[:, 1]), 1])
    found = rips(cloud).deaths
    # Ripser computes in float32 and leaves bars of length zero out.
    np.testing.assert_allclose(found[found > 0], expected, rtol=1e-6)


def test_agrees_with_the_spanning_tree_of_scipy(cloud):
    # scipy takes a distance of 0 for "no edge"; a constant on every edge leaves the tree the same.
    tree = minimum_spanning_tree(squareform(pdist(cloud.numpy()) + 1))
    expected = np.sort(tree.data) - 1
    np.testing.assert_allclose(rips(cloud).deaths, expected, rtol=1e-12, atol=1e-12)


def test_critical_edges_are_those_of_gudhi():
    gudhi = pytest.importorskip("gudhi")
    points = gaussian(50, 6)
    tree = gudhi.RipsComplex(points=points.numpy()).create_simplex_tree(max_dimension=1)
    tree.compute_persistence(homology_coeff_field=2)
    expected = np.sort(tree.flag_persistence_generators()[0][:, 1:], axis=1)
    assert {*map(tuple, rips(points).death_edges.tolist())} == {*map(tuple, expected.tolist())}


def test_edges_are_those_of_kruskal_in_the_order_of_length_and_ends(cloud):
    tree = reference.kruskal(cloud.tolist())
    by_square = cloud == cloud.round()  # whole numbers: no rounding, so that ties are ties
    if by_square.all():
        assert rips(cloud).death_edges.tolist() == [[i, j] for _, i, j in tree]
    np.testing.assert_allclose(rips(cloud).deaths, [length for length, _, _ in tree], rtol=1e-12)


@given(
    arrays(np.int64, st.tuples(st.integers(1, 14), st.integers(1, 3)), elements=st.integers(0, 3))
)
def test_ties_are_broken_as_kruskal_breaks_them(whole):
    points = torch.from_numpy(whole).double()
    expected = [[i, j] for _, i, j in reference.kruskal(points.tolist())]
    assert rips(points).death_edges.tolist() == expected


def test_edges_are_found_in_float64_whatever_the_points_are():
    # A float32 Gram matrix, as in torch.cdist, cannot tell these distances apart.
    points = (gaussian(40, 64) + 1000).float()
    expected = [[i, j] for _, i, j in reference.kruskal(points.tolist())]
    assert rips(points).death_edges.tolist() == expected


# --- Known diagrams ------------------------------------------------------------------------------


def test_two_points_die_at_their_distance_with_the_unit_vector_as_gradient():
    points = torch.tensor([[1.0, 1.0], [4.0, 5.0]], dtype=torch.float64, requires_grad=True)
    (death,) = rips(points).deaths
    death.backward()
    assert death.item() == 5
    expected = torch.tensor([[-0.6, -0.8], [0.6, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(points.grad, expected)


def test_square():
    diagram = rips(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]))
    assert diagram.bars.tolist() == [[0, 1]] * 3
    assert diagram.death_edges.tolist() == [[0, 1], [0, 3], [1, 2]]  # the first of four equal edges


@pytest.mark.parametrize("n", [3, 4, 5, 6, 12, 64])
def test_components_of_a_regular_polygon_die_at_its_side(n):
    side = 2 * math.sin(math.pi / n)
    assert rips(polygon(n)).deaths.tolist() == pytest.approx([side] * (n - 1))


def test_octahedron():
    assert rips(octahedron()).deaths.tolist() == pytest.approx([math.sqrt(2)] * 5)


def test_gaps_of_collinear_points():
    expected = [gap * math.sqrt(3) for gap in (1, 2, 4, 5)]  # of 0, 1, 3, 7 and 12
    assert rips(collinear()).deaths.tolist() == pytest.approx(expected)


def test_identical_points_give_zeros_with_gradient_zero():
    points = torch.ones(6, 3, dtype=torch.float64, requires_grad=True)
    diagram = rips(points)
    diagram.deaths.sum().backward()
    assert diagram.bars.tolist() == [[0, 0]] * 5
    assert (points.grad == 0).all()


def test_a_duplicate_spoils_no_other_gradient():
    points = torch.tensor([[0.0], [0.0], [2.0]], requires_grad=True)
    rips(points).deaths.sum().backward()
    assert points.grad.isfinite().all()
    assert points.grad.flatten().abs().sum() == 2  # of the edge of length 2 alone


# --- Shapes, types, batches ----------------------------------------------------------------------


def test_a_batch_is_its_clouds_one_by_one():
    clouds = torch.stack(
        [gaussian(17, 4, seed) for seed in range(5)] + [torch.zeros(17, 4).double()]
    )
    together, alone = rips(clouds), [rips(cloud) for cloud in clouds]
    assert torch.equal(together.bars, torch.stack([diagram.bars for diagram in alone]))
    assert torch.equal(
        together.death_edges, torch.stack([diagram.death_edges for diagram in alone])
    )


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 4), (0, 2)), ((3, 1, 4), (3, 0, 2)), ((0, 5, 4), (0, 4, 2)), ((2, 5, 1), (2, 4, 2))],
)
def test_small_shapes(shape, expected):
    points = torch.randn(shape, requires_grad=True)
    diagram = rips(points)
    assert diagram.bars.shape == diagram.death_edges.shape == expected
    assert diagram.births.shape == diagram.deaths.shape == expected[:-1]
    diagram.bars.sum().backward()
    assert points.grad.shape == shape


def test_rows_are_by_increasing_death_and_births_are_zero(cloud):
    diagram = rips(cloud)
    assert (diagram.births == 0).all()
    # Lengths that are read again may cross by a unit in the last place.
    assert (diagram.deaths.diff() >= -1e-12 * diagram.deaths.max()).all()
    assert diagram.death_edges.dtype == torch.int64
    assert (diagram.death_edges[:, 0] < diagram.death_edges[:, 1]).all()


def test_deaths_are_the_lengths_of_the_edges(cloud):
    diagram = rips(cloud)
    expected = [math.dist(cloud[i].tolist(), cloud[j].tolist()) for i, j in diagram.death_edges]
    assert diagram.deaths.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32(dtype):
    points = gaussian(30, 8).to(dtype)
    diagram = rips(points)
    assert diagram.bars.dtype == torch.float32
    assert torch.equal(diagram.bars, rips(points.float()).bars)


def test_half_precision_has_a_gradient():
    points = gaussian(8, 3).half().requires_grad_()
    rips(points).deaths.sum().backward()
    assert points.grad.dtype == torch.float16
    assert points.grad.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_type_of_the_points_is_kept(dtype):
    assert rips(gaussian(5, 2).to(dtype)).bars.dtype == dtype


def test_float32_points_have_the_lengths_of_float64_rounded_once():
    points = torch.stack([gaussian(64, 64, seed) for seed in range(4)]).float()
    assert torch.equal(rips(points).deaths, rips(points.double()).deaths.float())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack([x, x], dim=2)[..., 0],
        lambda x: torch.cat([x, x])[::2][: len(x)],
        lambda x: x[:1].expand(len(x), -1),
        lambda x: x.flip(0)[:, 2:],
    ],
)
def test_layout_in_memory_does_not_matter(view):
    points = view(gaussian(12, 6))
    assert torch.equal(rips(points).bars, rips(points.clone().contiguous()).bars)


def test_arguments_are_never_changed(cloud):
    before, points = cloud.clone(), cloud.clone().requires_grad_()
    rips(points).deaths.sum().backward()
    assert torch.equal(points.detach(), before)


def test_several_threads_at_once():
    clouds = [gaussian(40, 16, seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(rips, clouds))
    assert all(
        torch.equal(diagram.bars, rips(cloud).bars)
        for cloud, diagram in zip(clouds, together, strict=True)
    )


# --- Gradients and the compiler ------------------------------------------------------------------


def test_gradient_matches_finite_differences():
    points = torch.stack([gaussian(7, 3, seed) for seed in range(2)])
    assert torch.autograd.gradcheck(lambda x: rips(x).bars, points.requires_grad_())


def test_gradient_of_lengths_matches_finite_differences():
    points = gaussian(6, 3)[None].requires_grad_()
    edges = torch.tensor([[[0, 1], [1, 5], [0, 1], [2, 4]]])
    assert torch.autograd.gradcheck(lambda x: edge_lengths(x, edges), points)


@pytest.mark.parametrize("shape", [(2, 9, 4), (1, 1, 3), (0, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_critical_edges_is_a_sound_operator(shape, dtype):
    points = torch.randn(shape).to(dtype)
    inside = torch.ones(shape[:2], dtype=torch.bool)
    for max_dim in (0, 1):
        arguments = (points, inside, False, max_dim, 5 * max_dim, False)
        opcheck(torch.ops.topkd.critical_edges.default, arguments)
        births, deaths, count = critical_edges(*arguments)
        assert births.shape == deaths.shape == (shape[0], shape[1] - 1 + 5 * max_dim, 2)
        assert count.shape == (shape[0], max_dim + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths_are_sound_operators(dtype):
    points = torch.randn(2, 5, 3, dtype=dtype)
    edges = torch.tensor([[[0, 1], [2, 2]], [[3, 4], [0, 4]]])
    opcheck(torch.ops.topkd.edge_lengths.default, (points, edges))
    arguments = (points, edges, edge_lengths(points, edges), torch.ones(2, 2, dtype=dtype))
    opcheck(torch.ops.topkd.pull_lengths.default, arguments)


def test_gradient_of_the_gradient_matches_finite_differences():
    points = torch.stack([gaussian(5, 3, seed) for seed in range(2)])
    assert torch.autograd.gradgradcheck(lambda x: rips(x).deaths, points.requires_grad_())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the compiler itself
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_piece_equals_eager(backend):
    points = torch.stack([gaussian(12, 3, seed) for seed in range(2)]).requires_grad_()
    compiled = torch.compile(lambda x: rips(x).bars, fullgraph=True, backend=backend)
    bars, expected = compiled(points), rips(points).bars
    torch.testing.assert_close(bars, expected)
    torch.testing.assert_close(
        torch.autograd.grad(bars.square().sum(), points),
        torch.autograd.grad(expected.square().sum(), points),
    )


# --- Laws ----------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(-4, 4).map(float), st.floats(-100, 100, width=32))
clouds = arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 4)), elements=numbers).map(
    torch.from_numpy
)
seeds = st.integers(0, 2**32 - 1)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@given(clouds, seeds)
def test_order_of_the_points_does_not_matter(points, seed):
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    close(rips(points[order]).deaths, rips(points).deaths)


@given(clouds, seeds)
def test_place_and_direction_do_not_matter(points, seed):
    d = points.shape[1]
    rotation, _ = torch.linalg.qr(gaussian(d, d, seed))
    close(rips(points @ rotation + 100 * gaussian(1, d, seed + 1)).deaths, rips(points).deaths)


@given(clouds, st.floats(0.1, 10))
def test_scaling_the_cloud_scales_the_diagram(points, factor):
    close(rips(factor * points).deaths, factor * rips(points).deaths)


@given(clouds, clouds, seeds)
def test_diagrams_move_at_most_twice_as_far_as_points(points, scale, seed):
    moved = points + scale.abs().max() * gaussian(*points.shape, seed) / 50
    farthest = (moved - points).norm(dim=1).max()
    apart = (rips(moved).deaths - rips(points).deaths).abs()
    assert (apart <= 2 * farthest + 1e-9).all()


@given(clouds, st.integers(0, 11))
def test_a_point_said_twice_adds_a_bar_of_length_zero(points, which):
    again = torch.cat([points, points[which % len(points)][None]])
    deaths = rips(points).deaths
    close(rips(again).deaths, torch.cat([deaths.new_zeros(1), deaths]))


@given(clouds)
def test_nothing_dies_beyond_the_enclosing_radius(points):
    deaths = rips(points).deaths
    radius = torch.from_numpy(squareform(pdist(points))).amax(1).min() if len(points) > 1 else 0
    assert (deaths <= radius + 1e-9).all()


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (
            torch.zeros(4, 2, dtype=torch.int64),
            r"points must be floats .* got torch.int64 \(4, 2\)",
        ),
        (torch.zeros(4, 2, dtype=torch.bool), r"points must be floats .* got torch.bool \(4, 2\)"),
        (torch.zeros(4), r"\(n, d\) or \(clouds, n, d\), got torch.float32 \(4,\)"),
        (torch.zeros(1, 2, 3, 4), r"got torch.float32 \(1, 2, 3, 4\)"),
        (torch.zeros(0, 3), r"at least one point, got \(0, 3\)"),
        (torch.zeros(2, 0, 3), r"at least one point, got \(2, 0, 3\)"),
    ],
)
def test_says_what_is_wrong_with_the_points(points, message):
    with pytest.raises(ValueError, match=message):
        rips(points)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_names_the_point_that_is_not_finite(value, dtype):
    points = torch.zeros(3, 5, 2, dtype=dtype)
    points[1, 4, 1] = value
    with pytest.raises(ValueError, match="cloud 1, point 4: a coordinate is NaN or infinite"):
        rips(points)
