"""Labeled comparisons: against plain loops, scipy and gudhi, known cases, and their laws."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import topology as reference
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.spatial.distance import pdist, squareform
from torch.library import opcheck

from topkd.topology.matched import (
    attaining_edges,
    edge_matching,
    persistence_weighted,
    rtd_lite,
    single_linkage,
    ultrametric,
)
from topkd.topology.rips import rips

SCALES = ["none", "mean", "median", "quantile", "matrix_quantile", "max"]
SCALE_FREE = SCALES[1:]
SOME_SCALES = ["none", "mean", "quantile"]  # one whose gradient is everywhere, one at two edges

LOSSES = {
    "edge matching": edge_matching,
    "edge matching, one side": lambda s, t, **o: edge_matching(s, t, symmetric=False, **o),
    "RTD-Lite": rtd_lite,
    "ultrametric": ultrametric,
    "ultrametric, squared": lambda s, t, **o: ultrametric(s, t, order=2, **o),
    "weighted": persistence_weighted,
    "weighted, symmetric": lambda s, t, **o: persistence_weighted(s, t, symmetric=True, **o),
    "weighted, H1": lambda s, t, **o: persistence_weighted(
        s, t, max_dim=1, power=2, symmetric=True, **o
    ),
    "random edges": lambda s, t, **o: edge_matching(
        s, t, edges="random", generator=torch.Generator().manual_seed(3), **o
    ),
}
TREES = [name for name in LOSSES if name != "random edges"]


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


@pytest.fixture(params=TREES)
def tree_loss(request):
    """Those whose edges move with the points."""
    return LOSSES[request.param]


def gaussian(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def pair(n=12, clouds=()):
    return gaussian(*clouds, n, 3), gaussian(*clouds, n, 5, seed=1)


def moved(points, seed=5):
    """A rotated and shifted copy."""
    rotation, _ = torch.linalg.qr(gaussian(points.shape[-1], points.shape[-1], seed=seed))
    return points @ rotation + 7


# --- Plain loops ---------------------------------------------------------------------------------


def distance_matrix(points):
    return [[math.dist(a, b) for b in points] for a in points]


def scale_of(points, scale):
    matrix = distance_matrix(points)
    pairs = [matrix[i][j] for i, j in itertools.combinations(range(len(points)), 2)]
    return {
        "none": 1.0,
        "mean": sum(pairs) / len(pairs),
        "median": reference.quantile(pairs, 0.5),
        "quantile": reference.quantile(pairs, 0.9),
        "matrix_quantile": reference.quantile(sum(matrix, []), 0.9),
        "max": max(pairs),
    }[scale]


def scaled_distances(points, scale):
    divisor = scale_of(points, scale)
    return [[length / divisor for length in row] for row in distance_matrix(points)]


def weight_of_tree(matrix):
    """Grows the tree point by point."""
    inside, total = {0}, 0.0
    while len(inside) < len(matrix):
        length, joins = min(
            (matrix[i][j], j) for i in inside for j in range(len(matrix)) if j not in inside
        )
        inside.add(joins)
        total += length
    return total


def tree_edges(points):
    return [(i, j) for _, i, j in reference.kruskal(points)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_edge_matching_in_plain_loops(scale, symmetric):
    student, teacher = pair()
    s, t = scaled_distances(student.tolist(), scale), scaled_distances(teacher.tolist(), scale)
    expected = sum((s[i][j] - t[i][j]) ** 2 for i, j in tree_edges(teacher.tolist())) / 2
    if symmetric:
        expected += sum((s[i][j] - t[i][j]) ** 2 for i, j in tree_edges(student.tolist())) / 2
    found = edge_matching(student, teacher, scale=scale, symmetric=symmetric)
    assert found.item() == pytest.approx(expected / 12)


def test_scales_of_topological_autoencoders():
    student, teacher = pair()
    s, t = scaled_distances(student.tolist(), "none"), scaled_distances(teacher.tolist(), "max")
    edges = tree_edges(teacher.tolist()) + tree_edges(student.tolist())
    expected = sum((s[i][j] / 4 - t[i][j]) ** 2 for i, j in edges) / 2 / 12
    found = edge_matching(student / 4, teacher, scale="none", teacher_scale="max")
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("scale", SOME_SCALES)
def test_rtd_lite_in_plain_loops(scale):
    student, teacher = pair()
    b, a = scaled_distances(student.tolist(), scale), scaled_distances(teacher.tolist(), scale)
    least = [[min(p, q) for p, q in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]
    expected = (weight_of_tree(a) + weight_of_tree(b)) / 2 - weight_of_tree(least)
    assert rtd_lite(student, teacher, scale=scale).item() == pytest.approx(expected)


@pytest.mark.parametrize("scale", SOME_SCALES)
@pytest.mark.parametrize("order", [1, 1.5, 2])
def test_ultrametric_is_that_of_scipy(scale, order):
    student, teacher = pair()
    s, t = (
        cophenet(linkage(points.numpy(), method="single")) / scale_of(points.tolist(), scale)
        for points in (student, teacher)
    )
    expected = (np.abs(s - t) ** order).mean()
    found = ultrametric(student, teacher, scale=scale, order=order)
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("scale", SOME_SCALES)
@pytest.mark.parametrize("power", [0, 1, 2.5])
def test_weighted_edges_in_plain_loops(scale, power):
    student, teacher = pair()
    s, t = scaled_distances(student.tolist(), scale), scaled_distances(teacher.tolist(), scale)

    def side(points):
        tree = reference.kruskal(points)
        total = sum(length**power * (s[i][j] - t[i][j]) ** 2 for length, i, j in tree)
        return total / sum(length**power for length, _, _ in tree)

    options = {"scale": scale, "power": power}
    expected = side(teacher.tolist())
    assert persistence_weighted(student, teacher, **options).item() == pytest.approx(expected)
    both = persistence_weighted(student, teacher, symmetric=True, **options)
    assert both.item() == pytest.approx(expected + side(student.tolist()))


@pytest.mark.parametrize("scale", SOME_SCALES)
@pytest.mark.parametrize("power", [0, 1])
def test_weighted_edges_of_loops_are_those_of_gudhi(scale, power):
    gudhi = pytest.importorskip("gudhi")
    student, teacher = pair(n=20)
    s, t = scaled_distances(student.tolist(), scale), scaled_distances(teacher.tolist(), scale)
    tree = gudhi.RipsComplex(points=teacher.numpy()).create_simplex_tree(max_dimension=2)
    tree.compute_persistence(homology_coeff_field=2)
    merging, loops = tree.flag_persistence_generators()[:2]
    lengths = distance_matrix(teacher.tolist())
    edges = [(i, j, lengths[i][j]) for _, i, j in merging]
    for i, j, k, l in loops[0]:  # noqa: E741
        edges += [(i, j, lengths[k][l] - lengths[i][j]), (k, l, lengths[k][l] - lengths[i][j])]
    assert len(edges) > 19 + 2  # there are loops
    total = sum(p**power * (s[i][j] - t[i][j]) ** 2 for i, j, p in edges)
    expected = total / sum(p**power for _, _, p in edges)
    found = persistence_weighted(student, teacher, scale=scale, power=power, max_dim=1)
    assert found.item() == pytest.approx(expected)


def test_persistence_weighs_as_a_constant():
    student = gaussian(8, 3).requires_grad_()
    teacher = gaussian(8, 3, seed=1).requires_grad_()
    weights = [length for length, _, _ in reference.kruskal(teacher.tolist())]
    i, j = torch.tensor(tree_edges(teacher.tolist())).T
    gap = (student[i] - student[j]).norm(dim=1) - (teacher[i] - teacher[j]).norm(dim=1)
    expected = (torch.tensor(weights) * gap.square()).sum() / sum(weights)
    found = persistence_weighted(student, teacher, scale="none")
    for one, other in zip(
        torch.autograd.grad(found, (student, teacher)),
        torch.autograd.grad(expected, (student, teacher)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


# --- Random pairs --------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_random_edges_are_uniform_over_all_pairs(symmetric):
    student, teacher = gaussian(4, 2), gaussian(4, 2, seed=1)
    s, t = (scaled_distances(points.tolist(), "none") for points in (student, teacher))
    squares = [(s[i][j] - t[i][j]) ** 2 for i, j in itertools.combinations(range(4), 2)]
    expected = (2 if symmetric else 1) * 3 / 2 * sum(squares) / 6 / 4
    found = edge_matching(
        student.expand(20000, -1, -1),
        teacher.expand(20000, -1, -1),
        scale="none",
        symmetric=symmetric,
        edges="random",
        generator=torch.Generator().manual_seed(0),
    )
    error = found.std().item() / math.sqrt(20000)
    assert abs(found.mean().item() - expected) < 4 * error
    assert error < 0.02 * expected


def test_random_edges_are_repeated_by_their_generator():
    student, teacher = pair()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return edge_matching(student, teacher, edges="random", generator=generator)

    assert draw(0) == draw(0) != draw(1)
    state = torch.get_rng_state()
    draw(0)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator stays as it was


# --- Known cases ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("edge matching", 4 / 2),
        ("edge matching, one side", 4 / 4),
        ("random edges", 4 / 2),  # there is but one edge
        ("RTD-Lite", (3 + 5) / 2 - 3),
        ("ultrametric", 2),
        ("ultrametric, squared", 4),
        ("weighted", 4),
        ("weighted, symmetric", 8),
    ],
)
def test_of_two_points(name, expected):
    student, teacher = torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert LOSSES[name](student, teacher, scale="none").item() == pytest.approx(expected)


def test_rtd_lite_sees_clusters_where_the_lengths_of_both_trees_are_equal():
    teacher = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    # Tree of both: 1, 1, 9. Their minimum: 1 from 0 to 1 and 2 to 3, 1 from 0 to 2 and 1 to 3.
    assert rtd_lite(teacher[[0, 2, 1, 3]], teacher, scale="none").item() == pytest.approx(11 - 3)


def test_of_points_that_all_coincide(loss):
    student = torch.ones(2, 6, 3, dtype=torch.float64, requires_grad=True)
    teacher = gaussian(2, 6, 4)
    teacher[1] = 2.0
    for scale in SCALES:
        values = loss(student, teacher, scale=scale)
        (grad,) = torch.autograd.grad(values.sum(), student)
        assert values.isfinite().all()
        assert values[1] == 0
        assert (grad == 0).all()


def test_of_points_that_mostly_coincide(loss):
    student = torch.zeros(9, 2, dtype=torch.float64)
    student[0] = 1.0  # so that the median distance is 0
    student.requires_grad_()
    for scale in SCALES:
        value = loss(student, gaussian(9, 2), scale=scale)
        (grad,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert grad.isfinite().all()


# --- Laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SOME_SCALES)
def test_is_zero_for_the_same_cloud(loss, scale):
    points = gaussian(3, 16, 4).requires_grad_()
    values = loss(points, points.detach(), scale=scale)
    (grad,) = torch.autograd.grad(values.sum(), points)
    assert values.abs().max() < 1e-12
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("scale", SOME_SCALES[1:])
def test_is_zero_for_a_moved_and_scaled_copy(loss, scale):
    points = gaussian(16, 4)
    assert abs(loss(3 * moved(points), points, scale=scale)) < 1e-12


@pytest.mark.parametrize("scale", SOME_SCALES)
def test_place_and_direction_do_not_matter(loss, scale):
    student, teacher = pair()
    torch.testing.assert_close(
        loss(moved(student), moved(teacher), scale=scale), loss(student, teacher, scale=scale)
    )


@pytest.mark.parametrize("scale", SOME_SCALES[1:])
def test_scale_does_not_matter_nor_is_there_a_gradient_along_it(tree_loss, scale):
    student, teacher = pair()
    student.requires_grad_()
    value = tree_loss(student, teacher, scale=scale)
    torch.testing.assert_close(tree_loss(5 * student, teacher / 3, scale=scale), value)
    (grad,) = torch.autograd.grad(value, student)
    assert grad.norm() > 1e-3
    assert abs((grad * student).sum()) < 1e-12


@pytest.mark.parametrize("scale", SOME_SCALES[1:])
def test_a_detached_scale_is_a_constant(tree_loss, scale):
    student, teacher = pair()
    scales = [scale_of(points.tolist(), scale) for points in (student, teacher)]
    student.requires_grad_()
    value = tree_loss(student, teacher, scale=scale, detach_scale=True)
    torch.testing.assert_close(value, tree_loss(student, teacher, scale=scale))
    torch.testing.assert_close(
        torch.autograd.grad(value, student),
        torch.autograd.grad(
            tree_loss(student / scales[0], teacher / scales[1], scale="none"), student
        ),
    )


def test_permuting_the_student_alone_matters(tree_loss):
    student, teacher = pair()
    order = torch.randperm(12)
    value = tree_loss(student, teacher)
    assert abs(tree_loss(student[order], teacher) - value) > 1e-3
    torch.testing.assert_close(tree_loss(student[order], teacher[order]), value)
    assert tree_loss(student[order], student) > 1e-3  # though the diagrams are equal


@pytest.mark.parametrize("name", ["edge matching", "RTD-Lite", "ultrametric"])
def test_student_and_teacher_may_change_places(name):
    student, teacher = pair()
    torch.testing.assert_close(LOSSES[name](student, teacher), LOSSES[name](teacher, student))


# Small whole numbers make ties and duplicates.
numbers = st.one_of(st.integers(-3, 3).map(float), st.floats(-100, 100, width=32))
pairs_of_clouds = st.integers(1, 10).flatmap(
    lambda n: st.tuples(
        arrays(np.float64, (n, 2), elements=numbers), arrays(np.float64, (n, 3), elements=numbers)
    )
)


@given(pairs_of_clouds, st.sampled_from(SCALES), st.sampled_from(list(LOSSES)))
def test_is_finite_and_never_negative(clouds, scale, name):
    student, teacher = map(torch.from_numpy, clouds)
    student.requires_grad_()
    value = LOSSES[name](student, teacher, scale=scale)
    (grad,) = torch.autograd.grad(value, student)
    assert value.shape == ()
    assert value >= 0
    assert value.isfinite()
    assert grad.isfinite().all()


@given(pairs_of_clouds)
def test_single_linkage_is_that_of_scipy(clouds):
    for points in clouds:
        assume(len(points) > 1)
        expected = cophenet(linkage(pdist(points), method="single"))
        found = single_linkage(torch.from_numpy(points))
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_single_linkage_of_more_points_is_that_of_scipy():
    points = gaussian(90, 3)
    expected = cophenet(linkage(points.numpy(), method="single"))
    np.testing.assert_allclose(single_linkage(points), expected, rtol=1e-12)


@given(pairs_of_clouds)
def test_single_linkage_is_an_ultrametric_below_the_distances(clouds):
    points = clouds[0]
    assume(len(points) > 1)
    linked = single_linkage(torch.from_numpy(points)).numpy()
    assert (linked <= pdist(points) + 1e-9).all()
    u = squareform(linked)
    assert (u[:, None, :] <= np.maximum(u[:, :, None], u[None]) + 1e-9).all()


@given(pairs_of_clouds)
def test_single_linkage_moves_at_most_as_far_as_the_distances(clouds):
    student, teacher = clouds
    assume(len(student) > 1)
    greatest = np.abs(pdist(student) - pdist(teacher)).max()
    u, v = (single_linkage(torch.from_numpy(points)) for points in clouds)
    assert (u - v).abs().max() <= greatest + 1e-9
    mean = ultrametric(*map(torch.from_numpy, clouds), scale="none")
    assert mean <= greatest + 1e-9


def test_every_pair_pulls_at_the_edge_that_attains_it():
    points = gaussian(10, 2).requires_grad_()
    deaths = rips(points).deaths
    index = attaining_edges(rips(points).death_edges[None])[0]
    torch.testing.assert_close(single_linkage(points), deaths[index])
    assert index.bincount(minlength=9).min() >= 1
    assert len(index) == 45


# --- Gradients -----------------------------------------------------------------------------------


# Weights by the student's own persistence are constants that move with it: here all are 1.
SMOOTH = {name: loss for name, loss in LOSSES.items() if not name.startswith("weighted, ")} | {
    "weighted, H1": lambda s, t, **o: persistence_weighted(
        s, t, power=0, max_dim=1, symmetric=True, **o
    )
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradient_matches_finite_differences(name):
    clouds = gaussian(6, 3).requires_grad_(), gaussian(6, 2, seed=1).requires_grad_()
    loss = SMOOTH[name]
    if name == "weighted":
        clouds[1].requires_grad_(False)
    for scale in SOME_SCALES:
        assert torch.autograd.gradcheck(lambda *c, scale=scale: loss(*c, scale=scale), clouds)


@pytest.mark.parametrize("scale", SCALES)
def test_gradient_passes_through_all_scales_of_a_batch(scale):
    clouds = gaussian(2, 5, 3).requires_grad_(), gaussian(2, 5, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *c: edge_matching(*c, scale=scale), clouds)


@pytest.mark.parametrize(
    "loss", [edge_matching, rtd_lite, lambda *c, **o: ultrametric(*c, order=2, **o)]
)
def test_gradient_of_the_gradient_matches_finite_differences(loss):
    student, teacher = gaussian(4, 2).requires_grad_(), gaussian(4, 2, seed=1)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, teacher, scale="quantile"), student)


def test_single_linkage_has_the_gradient_of_finite_differences():
    assert torch.autograd.gradcheck(single_linkage, gaussian(2, 7, 3).requires_grad_())


def test_attaining_edges_is_a_sound_operator():
    edges = rips(gaussian(3, 7, 2)).death_edges
    opcheck(torch.ops.topkd.attaining_edges.default, (edges,))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the compiler itself
@pytest.mark.parametrize("scale", ["mean", "quantile"])
@pytest.mark.parametrize("compared", [edge_matching, rtd_lite, ultrametric, persistence_weighted])
def test_compiled_in_one_piece_equals_eager(compared, scale):
    student, teacher = pair(clouds=(2,))
    student.requires_grad_()
    compiled = torch.compile(
        lambda s, t: compared(s, t, scale=scale), fullgraph=True, backend="aot_eager"
    )
    found, expected = compiled(student, teacher), compared(student, teacher, scale=scale)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), student), torch.autograd.grad(expected.sum(), student)
    )


# --- Shapes, types, batches ----------------------------------------------------------------------


@pytest.mark.parametrize("scale", SOME_SCALES)
def test_a_batch_is_its_clouds_one_by_one(tree_loss, scale):
    student, teacher = pair(clouds=(3,))
    together = tree_loss(student, teacher, scale=scale)
    alone = [tree_loss(s, t, scale=scale) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_padding_of_clouds_with_fewer_loops_weighs_nothing():
    student, teacher = pair(n=20, clouds=(4,))
    assert len(set(rips(teacher, max_dim=1).count[:, 1].tolist())) > 1
    options = {"max_dim": 1, "power": 0}  # which makes 1 of all that is not masked
    alone = [persistence_weighted(s, t, **options) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(
        persistence_weighted(student, teacher, **options), torch.stack(alone)
    )


@pytest.mark.parametrize("scale", SOME_SCALES)
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 1, 3), (1, 3)])
def test_small_shapes(loss, scale, shape):
    student = torch.randn(shape, requires_grad=True)
    values = loss(student, torch.randn(shape), scale=scale)
    assert values.shape == shape[:-2]
    values.sum().backward()
    assert (values == 0).all()
    assert (student.grad == 0).all()


def test_float32_is_close_to_float64(loss):
    student, teacher = pair(n=32)
    found = loss(student.float(), teacher.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), loss(student, teacher), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(loss, dtype):
    student, teacher = (points.to(dtype) for points in pair())
    student.requires_grad_()
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert value == loss(student.float(), teacher.float())
    (grad,) = torch.autograd.grad(value, student)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


def test_arguments_are_never_changed(loss):
    student, teacher = pair()
    copies = student.clone().requires_grad_(), teacher.clone()
    loss(*copies).backward()
    assert torch.equal(copies[0], student)
    assert torch.equal(copies[1], teacher)
    assert copies[1].grad is None


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((4, 2), (5, 2), r"clouds differ: student \(4, 2\), teacher \(5, 2\)"),
        ((3, 4, 2), (2, 4, 2), r"clouds differ: student \(3, 4, 2\), teacher \(2, 4, 2\)"),
        ((1, 4, 2), (4, 2), r"clouds differ: student \(1, 4, 2\), teacher \(4, 2\)"),
        ((4,), (4, 2), r"student must be floats .* got torch.float32 \(4,\)"),
        ((4, 2), (1, 1, 4, 2), r"teacher must be floats .* got torch.float32 \(1, 1, 4, 2\)"),
        ((0, 2), (0, 2), r"student: a cloud needs at least one point, got \(0, 2\)"),
    ],
)
def test_says_what_is_wrong_with_the_shapes(loss, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(student), torch.zeros(teacher))


def test_says_that_points_must_be_floats(loss):
    with pytest.raises(ValueError, match=r"teacher must be floats .* got torch.int64 \(4, 2\)"):
        loss(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_names_the_point_that_is_not_finite(loss, value):
    good, bad = torch.zeros(3, 5, 2), torch.zeros(3, 5, 2)
    bad[1, 4, 0] = value
    with pytest.raises(ValueError, match="student, cloud 1, point 4: a coordinate is NaN or inf"):
        loss(bad, good)
    with pytest.raises(ValueError, match="teacher, point 4: a coordinate is NaN or infinite"):
        loss(good[1], bad[1])


def test_says_which_options_there_are():
    student, teacher = pair()
    with pytest.raises(ValueError, match="scale must be one of none, mean, .* got 'meter'"):
        rtd_lite(student, teacher, scale="meter")
    with pytest.raises(ValueError, match="teacher_scale must be one of none, mean, .* got 'meter'"):
        edge_matching(student, teacher, teacher_scale="meter")
    with pytest.raises(ValueError, match="edges must be one of tree, random, got 'all'"):
        edge_matching(student, teacher, edges="all")
    with pytest.raises(ValueError, match="order must be finite and at least 1, got 0.5"):
        ultrametric(student, teacher, order=0.5)
    with pytest.raises(ValueError, match="power must be finite and at least 0, got -1"):
        persistence_weighted(student, teacher, power=-1)
    with pytest.raises(ValueError, match="max_dim must be 0, 1 or 2, got 3"):
        persistence_weighted(student, teacher, max_dim=3)
