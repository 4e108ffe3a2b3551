"""Loops and voids, distances and masks: against brute force, known diagrams, and the laws."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import homology
from reference.clouds import gaussian, octahedron, polygon
from scipy.spatial.distance import pdist, squareform

from topkd.topology import PersistenceImage, rips
from topkd.topology._prim import merging_edges
from topkd.topology.rips import Diagrams


def bars(diagrams, dimension):
    of = diagrams.of(dimension)
    return of.bars[of.mask]


def distances_of(points):
    return torch.from_numpy(squareform(pdist(points)))


# --- Brute force ---------------------------------------------------------------------------------

tied = st.integers(2, 8).flatmap(
    lambda n: arrays(np.int64, n * (n - 1) // 2, elements=st.integers(0, 5))
)
real = st.integers(2, 8).flatmap(
    lambda n: arrays(np.float64, n * (n - 1) // 2, elements=st.floats(0, 10))
)


@given(st.one_of(tied, real))
def test_agrees_with_the_reduction_of_the_boundary_matrix(condensed):
    distances = squareform(condensed.astype(float))
    found = rips(distances=torch.from_numpy(distances), max_dim=1)
    for dimension, expected in enumerate(homology.diagrams(distances.tolist(), 1)):
        ours = bars(found, dimension).tolist()
        assert sorted((birth, death) for birth, death in ours if birth < death) == expected


@pytest.mark.filterwarnings("ignore:H2 of")
@pytest.mark.parametrize("seed", range(10))
def test_voids_agree_with_the_reduction_of_the_boundary_matrix(seed):
    pytest.importorskip("redzed_tda")
    points = torch.cat([octahedron() + 0.1 * gaussian(6, 3, seed), 3 * gaussian(2, 3, seed + 50)])
    expected = homology.diagrams(distances_of(points).tolist(), 2)
    found = rips(points, max_dim=2)
    for dimension in range(3):
        ours = sorted(map(tuple, bars(found, dimension).tolist()))
        np.testing.assert_allclose(ours, expected[dimension], rtol=1e-12)


@pytest.mark.filterwarnings("ignore:H2 of")
def test_redzed_and_the_kernel_find_the_same_edges():
    pytest.importorskip("redzed_tda")
    clouds = torch.stack([gaussian(30, 4, seed) for seed in range(3)])
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[1, 20:] = False
    ours, theirs = rips(clouds, max_dim=1, mask=mask), rips(clouds, max_dim=2, mask=mask)
    for dimension in (0, 1):
        one, other = ours.of(dimension), theirs.of(dimension)
        for cloud in range(3):
            for found, expected in (
                (one.birth_edges, other.birth_edges),
                (one.death_edges, other.death_edges),
            ):
                there = found[cloud][one.mask[cloud]]
                assert torch.equal(there, expected[cloud][other.mask[cloud]])


@pytest.mark.filterwarnings("ignore:H1 of")
def test_large_clouds_agree_with_ripser():
    ripser, _ = pytest.importorskip("ripser"), pytest.importorskip("redzed_tda")
    points = gaussian(300, 3)
    (expected,) = ripser.ripser(distances_of(points).numpy(), distance_matrix=True, maxdim=1)[
        "dgms"
    ][1:]
    found = bars(rips(points, max_dim=1), 1).numpy()
    long = expected[expected[:, 1] - expected[:, 0] > 1e-4]
    ours = found[found[:, 1] - found[:, 0] > 1e-4]
    np.testing.assert_allclose(np.sort(ours, 0), np.sort(long, 0), rtol=1e-5)


# --- Known diagrams ------------------------------------------------------------------------------


def test_square_has_one_loop():
    found = rips(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), max_dim=1)
    torch.testing.assert_close(bars(found, 1), torch.tensor([[1.0, math.sqrt(2)]]))
    assert found.count.tolist() == [3, 1]
    assert found.dimension.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("k", [4, 5, 6, 7, 12, 33, 64, 65, 100])
def test_polygon_has_one_loop(k):
    found = bars(rips(polygon(k), max_dim=1), 1)
    found = found[found[:, 1] - found[:, 0] > 1e-9]  # rounding makes others
    expected = [2 * math.sin(math.pi / k), 2 * math.sin(math.pi * math.ceil(k / 3) / k)]
    assert found.tolist() == [pytest.approx(expected)]


@pytest.mark.filterwarnings("ignore:H2 of")
def test_octahedron_has_a_void_and_no_loop():
    pytest.importorskip("redzed_tda")
    found = rips(octahedron(), max_dim=2)
    assert found.count.tolist() == [5, 0, 1]
    assert bars(found, 2).tolist() == [pytest.approx([math.sqrt(2), 2])]


def test_complete_bipartite_lengths_have_the_most_loops_there_can_be():
    side = torch.arange(64) % 2
    distances = torch.where(side[:, None] == side, 2.0, 1.0)
    alike = torch.ones(64, 64)  # without loops, before and after: the others need more room
    clouds = torch.stack([alike, distances, distances, alike])
    clouds.diagonal(dim1=1, dim2=2).fill_(0)
    found = rips(distances=clouds, max_dim=1, max_bars=1000)
    assert found.count.tolist() == [[63, 0], [63, 31 * 31], [63, 31 * 31], [63, 0]]
    assert (bars(found, 1) == torch.tensor([1.0, 2.0])).all()


def test_minimal_projective_plane_has_a_loop_over_this_field():
    # Six vertices; its ten triangles come together, all other edges and triangles after them.
    triangles = ["125", "126", "134", "136", "145", "234", "235", "246", "356", "456"]
    inside = {frozenset(map(int, face)) for face in triangles}
    assert len({edge for face in inside for edge in combinations(sorted(face), 2)}) == 15
    # Every pair is an edge, so as a Rips complex it needs the barycentric subdivision.
    simplices = sorted(
        {frozenset(part) for face in inside for k in (1, 2, 3) for part in combinations(face, k)},
        key=lambda simplex: (len(simplex), sorted(simplex)),
    )
    n = len(simplices)
    distances = torch.full((n, n), 2.0)
    for i, j in combinations(range(n), 2):
        if simplices[i] < simplices[j]:
            distances[i, j] = distances[j, i] = 1.0
    distances.fill_diagonal_(0)
    assert bars(rips(distances=distances, max_dim=1), 1).tolist() == [[1, 2]]


def test_collinear_and_identical_points_have_no_loop():
    line = torch.tensor([0.0, 7.0, 3.0, 12.0, 1.0]).double()[:, None] * torch.ones(3)
    assert rips(line, max_dim=1).count.tolist() == [4, 0]
    assert rips(torch.ones(9, 2), max_dim=1).count.tolist() == [8, 0]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_points_have_no_loop(n):
    found = rips(gaussian(n, 4), max_dim=1)
    assert found.count.tolist() == [n - 1, 0]
    assert found.bars.shape == (n - 1, 2)
    assert found.of(1).bars.shape == (0, 2)


def test_no_clouds():
    found = rips(torch.zeros(0, 5, 3), max_dim=1)
    assert found.bars.shape == (0, 4, 2)
    assert found.count.shape == (0, 2)


# --- Laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [10, 40, 64, 65, 90])
def test_both_kernels_and_plain_torch_find_one_tree(n):
    clouds = torch.stack([gaussian(n, 3, seed) for seed in range(2)] + [gaussian(n, 3).round()] * 2)
    h0 = rips(clouds)
    assert torch.equal(h0.death_edges, rips(clouds, max_dim=1).of(0).death_edges)
    squares = (clouds[:, :, None] - clouds[:, None]).square().sum(-1)
    everywhere = torch.ones(clouds.shape[:2], dtype=torch.bool)
    assert torch.equal(merging_edges(squares, everywhere), h0.death_edges)


@given(
    arrays(
        np.int64,
        st.tuples(st.integers(1, 3), st.integers(1, 9), st.just(2)),
        elements=st.integers(0, 3),
    )
)
def test_plain_torch_breaks_ties_as_the_kernel(whole):
    clouds = torch.from_numpy(whole).double()
    squares = (clouds[:, :, None] - clouds[:, None]).square().sum(-1)
    everywhere = torch.ones(clouds.shape[:2], dtype=torch.bool)
    assert torch.equal(merging_edges(squares, everywhere), rips(clouds).death_edges)


@pytest.mark.parametrize("n", [300, 700])
def test_large_clouds_without_a_matrix_have_the_same_tree(n):
    points = gaussian(n, 5)
    assert torch.equal(rips(points).death_edges, rips(distances=distances_of(points)).death_edges)


@pytest.mark.parametrize("seed", range(20))
def test_loops_are_born_at_edges_of_the_relative_neighborhood_graph(seed):
    points = gaussian(25, 3, seed)
    d = distances_of(points)
    neighbors = [
        (i, j)
        for i, j in combinations(range(25), 2)
        if not any(max(d[i, k], d[j, k]) < d[i, j] for k in range(25) if k not in (i, j))
    ]
    found = rips(points, max_dim=1)
    assert found.count[1] == len(neighbors) - 24
    edges = found.of(0).death_edges.tolist() + found.of(1).birth_edges.tolist()
    assert sorted(map(tuple, edges)) == neighbors


@pytest.mark.parametrize("seed", range(20))
def test_loops_are_born_before_they_die_and_none_outlives_the_enclosing_radius(seed):
    points = gaussian(40, 2, seed)
    loops = rips(points, max_dim=1).of(1)
    assert (loops.births < loops.deaths).all()
    assert (loops.deaths <= distances_of(points).amax(1).min()).all()
    assert (loops.persistence.diff() <= 1e-12).all()
    for edges in (loops.birth_edges, loops.death_edges):
        assert (edges[:, 0] < edges[:, 1]).all()


@pytest.mark.parametrize("seed", range(10))
def test_order_place_and_direction_of_the_points_do_not_matter(seed):
    points = gaussian(30, 3, seed)
    rotation, _ = torch.linalg.qr(gaussian(3, 3, seed + 1))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    moved = 2 * points[order] @ rotation + 7
    torch.testing.assert_close(
        bars(rips(moved, max_dim=1), 1), 2 * bars(rips(points, max_dim=1), 1)
    )


# --- Batches, masks, types -----------------------------------------------------------------------


def ragged():
    """Clouds of 1 to 70 points, what pads them, and which is which."""
    sizes = [1, 2, 5, 30, 64, 70]
    clouds = torch.full((len(sizes), 70, 3), math.nan, dtype=torch.float64)
    mask = torch.zeros(len(sizes), 70, dtype=torch.bool)
    for cloud, size in enumerate(sizes):
        places = torch.randperm(70, generator=torch.Generator().manual_seed(cloud))[:size]
        mask[cloud, places] = True
        clouds[cloud, mask[cloud]] = gaussian(size, 3, cloud)
    return clouds, mask, sizes


@pytest.mark.parametrize("max_dim", [0, 1])
def test_padding_does_not_matter(max_dim):
    clouds, mask, sizes = ragged()
    together = rips(clouds, max_dim=max_dim, mask=mask)
    for cloud, size in enumerate(sizes):
        alone = rips(gaussian(size, 3, cloud), max_dim=max_dim)
        assert together.count[cloud].tolist() == alone.count.tolist()
        for dimension in range(max_dim + 1):
            one, other = together.of(dimension), alone.of(dimension)
            there = one.mask[cloud]
            assert torch.equal(one.bars[cloud][there], other.bars[other.mask])
            places = mask[cloud].nonzero()[:, 0]
            assert torch.equal(one.death_edges[cloud][there], places[other.death_edges[other.mask]])
            assert (one.bars[cloud][~there] == 0).all()
            assert (one.death_edges[cloud][~there] == 0).all()


def test_padding_has_no_gradient():
    clouds, mask, _ = ragged()
    clouds.requires_grad_()
    found = rips(clouds, max_dim=1, mask=mask)
    found.bars.square().sum().backward()
    assert (clouds.grad[~mask] == 0).all()
    assert clouds.grad[mask].isfinite().all()
    assert (clouds.grad[5] != 0).any()


def test_plain_torch_leaves_padding_out():
    clouds, mask, _ = ragged()
    clouds = clouds.where(mask[..., None], 0)
    squares = (clouds[:, :, None] - clouds[:, None]).square().sum(-1)
    assert torch.equal(merging_edges(squares, mask), rips(clouds, mask=mask).death_edges)


@pytest.mark.parametrize("max_dim", [0, 1])
def test_distances_give_what_points_give(max_dim):
    points = gaussian(40, 5)
    by_points = rips(points, max_dim=max_dim)
    by_distances = rips(distances=distances_of(points), max_dim=max_dim)
    assert torch.equal(by_points.death_edges, by_distances.death_edges)
    torch.testing.assert_close(by_points.bars, by_distances.bars)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_number_of_threads_does_not_matter(threads):
    clouds = torch.stack([gaussian(20, 3, seed) for seed in range(25)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = rips(clouds, max_dim=1)
    finally:
        torch.set_num_threads(before)
    for cloud in (0, 11, 24):
        alone = rips(clouds[cloud], max_dim=1)
        assert torch.equal(found.of(1).bars[cloud][found.of(1).mask[cloud]], alone.of(1).bars)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_of_less_precision(dtype):
    points = gaussian(20, 3).to(dtype)
    found = rips(points, max_dim=1)
    assert found.bars.dtype == torch.float32
    torch.testing.assert_close(
        found.bars.double(), rips(points.double(), max_dim=1).bars, rtol=1e-6, atol=0
    )


def test_most_persistent_bars_are_kept_and_the_rest_is_counted():
    points = gaussian(40, 3)
    everything, some = rips(points, max_dim=1), rips(points, max_dim=1, max_bars=3)
    assert torch.equal(some.of(1).bars, everything.of(1).bars[:3])
    assert torch.equal(some.count, everything.count)
    assert everything.count[1] > 3


# --- Gradients -----------------------------------------------------------------------------------


def test_gradient_matches_finite_differences():
    points = torch.stack([gaussian(9, 2, seed) for seed in (2, 6)]).requires_grad_()
    assert rips(points, max_dim=1).count[:, 1].min() > 0
    assert torch.autograd.gradcheck(lambda x: rips(x, max_dim=1).bars, points)


def test_gradient_at_distances_matches_finite_differences():
    def bars_of(condensed):
        i, j = torch.triu_indices(8, 8, 1)
        distances = condensed.new_zeros(8, 8).index_put((i, j), condensed)
        return rips(distances=distances + distances.T, max_dim=1).bars

    condensed = torch.from_numpy(pdist(gaussian(8, 2, 0))).requires_grad_()
    assert bars_of(condensed).shape[0] > 7
    assert torch.autograd.gradcheck(bars_of, condensed)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the compiler itself
def test_compiled_in_one_piece_equals_eager():
    points = torch.stack([gaussian(12, 2, seed) for seed in range(2)]).requires_grad_()
    total = torch.compile(lambda x: rips(x, max_dim=1).persistence.square().sum(), fullgraph=True)
    expected = rips(points, max_dim=1).persistence.square().sum()
    torch.testing.assert_close(total(points), expected)
    torch.testing.assert_close(
        torch.autograd.grad(total(points), points), torch.autograd.grad(expected, points)
    )


def test_autocast_does_not_touch_lengths():
    points = gaussian(20, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = rips(points, max_dim=1)
    assert torch.equal(found.bars, rips(points, max_dim=1).bars)


# --- Diagrams ------------------------------------------------------------------------------------


def test_scaled_multiplies_lengths():
    clouds = torch.stack([gaussian(9, 2, seed) for seed in range(2)])
    found = rips(clouds, max_dim=1)
    torch.testing.assert_close(found.scaled(3.0).bars, 3 * found.bars)
    each = torch.tensor([2.0, 5.0]).double()
    torch.testing.assert_close(found.scaled(each).bars[1], 5 * found.bars[1])


def test_diagrams_from_elsewhere():
    given_bars = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[0.0, 3.0], [1.0, 4.0]]])
    found = Diagrams.from_bars(given_bars)
    assert found.mask.tolist() == [[True, False], [True, True]]
    assert found.count.tolist() == [[0, 1], [0, 2]]
    assert torch.equal(found.of(1).bars, given_bars)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.bfloat16])
def test_bars_of_any_numbers_are_floats(dtype):
    found = Diagrams.from_bars(torch.tensor([[1, 3], [2, 6]], dtype=dtype))
    assert found.bars.dtype == torch.float32
    assert found.bars.tolist() == [[1, 3], [2, 6]]
    image = PersistenceImage((0.0, 3.0), (0.0, 5.0), sigma=0.5)
    expected = image(Diagrams.from_bars(torch.tensor([[1.0, 3.0], [2.0, 6.0]])))
    assert torch.equal(image(found), expected)


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        ([[0.0, 1.0], [2.0, 1.5]], "bar 1: .* deaths not below births, got 2.0 and 1.5"),
        ([[[0.0, 1.0]], [[math.nan, 1.5]]], "cloud 1, bar 0: .* finite.*, got nan and 1.5"),
        ([[0.0, math.nan]], "bar 0: .* finite.*, got 0.0 and nan"),
        ([[0.0, math.inf]], "bar 0: .*omit classes that never die.*, got 0.0 and inf"),
        ([[-math.inf, 1.0]], "bar 0: .* finite.*, got -inf and 1.0"),
        ([[math.inf, math.inf]], "bar 0: .* finite.*, got inf and inf"),
        ([[0.0, 1.0, 2.0]], r"bars must be numbers \(bars, 2\) .* got torch.float32 \(1, 3\)"),
        ([0.0, 1.0], r"got torch.float32 \(2,\)"),
        ([[True, False]], r"got torch.bool \(1, 2\)"),
        ([[1j, 2.0]], r"got torch.complex64 \(1, 2\)"),
    ],
)
def test_what_is_no_bar_is_refused(bars, message):
    with pytest.raises(ValueError, match=message) as caught:
        Diagrams.from_bars(torch.tensor(bars))
    assert "\n" not in str(caught.value)


def test_what_makes_no_diagram_is_refused():
    with pytest.raises(ValueError, match="bars must be a tensor .* got list"):
        Diagrams.from_bars([[0.0, 1.0]])
    for dimension in (-1, 0.5, True):
        with pytest.raises(ValueError, match=f"dimension must be .* got {dimension}"):
            Diagrams.from_bars(torch.zeros(2, 2), dimension=dimension)


# --- Errors --------------------------------------------------------------------------------------

LINE = distances_of(torch.tensor([[0.0], [1.0], [3.0]]))


def spoilt(i, j, value):
    distances = LINE.clone()
    distances[i, j] = value
    return distances


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass either points or distances"),
        ({"points": LINE, "distances": LINE}, "pass either points or distances"),
        ({"points": LINE, "max_dim": 3}, "max_dim must be 0, 1 or 2, got 3"),
        ({"distances": LINE[:2]}, r"distances must be floats \(n, n\) .* got torch.float64 \(2, 3"),
        ({"distances": LINE.long()}, "distances must be floats"),
        (
            {"distances": spoilt(0, 1, 2.0)},
            "cloud 0: invalid distances 2.0 from point 0 to 1 and 1.0 back",
        ),
        ({"distances": spoilt(1, 1, 2.0)}, "cloud 0: invalid distances 2.0 from point 1 to 1"),
        ({"distances": -LINE}, "cloud 0: invalid distances -1.0 from point 0 to 1"),
        ({"distances": spoilt(0, 2, math.nan)}, "cloud 0: invalid distances nan from point 0 to 2"),
        ({"distances": spoilt(0, 2, math.inf)}, "cloud 0: invalid distances inf from point 0 to 2"),
        ({"points": LINE, "mask": torch.ones(3)}, r"mask must be bool \(3,\), got torch.float32"),
        ({"points": LINE, "mask": torch.zeros(3).bool()}, "cloud 0: .* all are masked"),
        ({"points": gaussian(40, 3), "max_bars": -1}, "max_bars"),
    ],
)
@pytest.mark.parametrize("max_dim", [0, 1])
def test_says_what_is_wrong(arguments, message, max_dim):
    with pytest.raises(ValueError, match=message):
        rips(**{"max_dim": max_dim} | arguments)


def test_names_the_point_that_is_not_finite():
    points = torch.zeros(3, 5, 2)
    points[1, 4, 1] = math.nan
    with pytest.raises(ValueError, match="cloud 1, point 4: a coordinate is NaN or infinite"):
        rips(points, max_dim=1)


def test_says_how_much_room_is_needed():
    side = torch.arange(64) % 2
    distances = torch.where(side[:, None] == side, 2.0, 1.0)
    distances.fill_diagonal_(0)
    with pytest.raises(ValueError, match="cloud 0 has 961 bars .* pass max_bars=961"):
        rips(distances=distances, max_dim=1)


def test_says_which_dimensions_there_are():
    with pytest.raises(ValueError, match="dimensions 0 to 0, not 1"):
        rips(LINE).of(1)


def test_refuses_voids_that_would_not_fit_into_memory():
    pytest.importorskip("redzed_tda")
    with pytest.warns(UserWarning, match="redzed"), pytest.raises(ValueError, match="tetrahedra"):
        rips(torch.randn(300, 2), max_dim=2)


def test_says_what_to_install_for_voids(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "redzed_tda", None)
    with (
        pytest.warns(UserWarning, match="redzed"),
        pytest.raises(ImportError, match=r"pip install 'topkd\[topology\]'"),
    ):
        rips(LINE, max_dim=2)
