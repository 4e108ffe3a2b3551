"""Losses between diagrams: the papers in plain loops, laws and known cases."""

import math
from dataclasses import replace

import pytest
import torch
from reference import homology
from reference import topological_losses as reference
from reference.clouds import polygon
from reference.features import CLOUD, answers, batch, bound, features, never, source_in
from reference.topology import scale_of
from torch.autograd import gradcheck

from topkd.features import Features
from topkd.losses import PCE, Wasserstein
from topkd.losses.controls import batch_tree
from topkd.losses.diagrams import calibrate
from topkd.losses.functional import persistent_cross_entropy

EDGES = ["persistent", "random"]


@pytest.fixture
def source(tmp_path):
    return source_in(tmp_path)


def lengths(cloud, edges):
    points = cloud.embedding.tolist()
    tree = reference.spanning_tree(points)
    if edges == "random":
        tree = batch_tree(batch(len(points)), 0).tolist()
    return sorted(reference.lengths(points, tree))


def ring(n, seed, size=1.0):
    """Points near a circle, as an embedding."""
    noise = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    points = size * (polygon(n) + 0.05 * noise)
    return Features(torch.zeros(n, 4), points)


# --- Wasserstein ---------------------------------------------------------------------------------


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("scale", ["none", "tree_mean", "tree_median", "tree_max"])
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
def test_wasserstein_is_the_sorted_lengths_in_plain_loops(edges, scale, order):
    clouds = features(3, seed=1), features(5, seed=2)
    ours, theirs = (lengths(cloud, edges) for cloud in clouds)
    scales = scale_of(scale, ours), scale_of(scale, theirs)
    gaps = [abs(a / scales[0] - b / scales[1]) for a, b in zip(ours, theirs, strict=True)]
    expected = sum(gap**order for gap in gaps) ** (1 / order)
    found = Wasserstein(order=order, scale=scale, edges=edges)(*clouds, batch())
    assert found.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", ["none", "tree_mean"])
@pytest.mark.parametrize(("norm", "far"), [("maximum", 1 / 2), ("euclidean", 1 / math.sqrt(2))])
def test_wasserstein_of_loops_scaled_by_the_spanning_tree(scale, norm, far):
    # One loop each: either it is matched, or both meet the diagonal.
    clouds = ring(9, seed=1), ring(9, seed=2, size=1.3)
    bars = []
    for cloud in clouds:
        points = cloud.embedding.tolist()
        matrix = [[math.dist(a, b) for b in points] for a in points]
        (loop,) = homology.diagrams(matrix, 1)[1]
        divisor = scale_of(scale, lengths(cloud, "persistent"))
        bars.append([end / divisor for end in loop])
    apart = [abs(a - b) for a, b in zip(*bars, strict=True)]
    matched = max(apart) if norm == "maximum" else math.hypot(*apart)
    expected = min(matched, sum(far * (death - birth) for birth, death in bars))
    assert expected > 0
    found = Wasserstein(dimension=1, scale=scale, ground_norm=norm)(*clouds, batch(9))
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_a_loop_that_is_not_there_costs_half_its_persistence():
    line = Features(torch.zeros(8, 4), torch.arange(8.0).double()[:, None])
    octagon = Features(torch.zeros(8, 4), polygon(8))
    loss = Wasserstein(dimension=1, scale="none")
    birth, death = 2 * math.sin(math.pi / 8), 2 * math.sin(3 * math.pi / 8)
    assert loss(line, octagon, batch(8)).item() == pytest.approx((death - birth) / 2)
    assert loss(line, line, batch(8)) == 0


def test_the_gradient_of_loops_matches_finite_differences():
    student, teacher = ring(9, seed=1), ring(9, seed=2, size=1.3)
    loss = Wasserstein(dimension=1, order=2.0, scale="tree_median")

    def of(points):
        return loss(Features(student.logits, points), teacher, batch(9))

    assert gradcheck(of, [student.embedding.requires_grad_()])
    assert torch.autograd.grad(of(student.embedding), student.embedding)[0].norm() > 0


def test_the_diagonal_never_costs_more():
    loss = [Wasserstein(scale="none", diagonal=diagonal) for diagonal in (False, True)]
    student, teacher = features(3, seed=1), features(5, seed=2).apply(lambda t: 10 * t)
    sorted_apart, matched = (each(student, teacher, batch()) for each in loss)
    assert matched < sorted_apart
    # The far greater bars of the teacher are matched in order or half as far from the diagonal.
    assert matched >= sum(lengths(teacher, "persistent")) / 2 - sum(lengths(student, "persistent"))


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_refuses_an_order_below_1(value):
    with pytest.raises(ValueError, match=f"order must be at least 1, got {value}"):
        Wasserstein(order=value)


# --- Persistent Cross Entropy --------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pce", "em-pce"])
@pytest.mark.parametrize(("bandwidth", "tolerance"), [(0.07, 16.0), (0.5, 0.3), (3.0, 1.0)])
@pytest.mark.parametrize("edges", EDGES)
def test_pce_is_the_formula_in_plain_loops(form, bandwidth, tolerance, edges):
    clouds = features(3, seed=1), features(5, seed=2)
    tree = None if edges == "persistent" else batch_tree(batch(), 0).tolist()
    ours, theirs = (reference.lifetimes(cloud.embedding.tolist(), tree) for cloud in clouds)
    expected = reference.persistent_cross_entropy(ours, theirs, bandwidth, tolerance, form)
    assert expected > 0
    loss = PCE(bandwidth=bandwidth, tolerance=tolerance, form=form, edges=edges).double()
    assert loss(*clouds, batch()).item() == pytest.approx(expected, rel=1e-5)


def test_pce_is_a_divergence():
    # Of the weights from what they are multiplied by e^(-gap); made to sum to 1 in EM-PCE.
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.rand(2, 20, dtype=torch.float64, generator=generator)
    options = {"bandwidth": 0.1, "tolerance": 2.0}
    one = persistent_cross_entropy(ours, theirs, **options)
    weights = theirs / theirs.sum()
    gaps = [
        reference.density(u, ours.tolist(), 0.1) - reference.density(u, theirs.tolist(), 0.1)
        for u in theirs.tolist()
    ]
    induced = weights * torch.tensor([math.exp(-(gap**2) / 8) for gap in gaps])
    torch.testing.assert_close(one, (weights * (weights / induced).log()).sum())
    induced = induced / induced.sum()
    other = persistent_cross_entropy(ours, theirs, form="em-pce", **options)
    torch.testing.assert_close(other, (weights * (weights / induced).log()).sum())
    assert 0 < other < one


def test_pce_does_not_see_the_size_of_embeddings():
    student, teacher = features(3, seed=1), features(5, seed=2)
    loss = PCE(bandwidth=0.1, tolerance=2.0)
    far = student.apply(lambda t: t * torch.arange(1, CLOUD + 1).view(-1, *[1] * (t.ndim - 1)))
    torch.testing.assert_close(loss(far, teacher, batch()), loss(student, teacher, batch()))


@pytest.mark.parametrize("form", ["pce", "em-pce"])
def test_pce_is_finite_where_points_coincide_or_have_no_direction(form):
    teacher = features(5, seed=2)
    for scale in (0.0, 1.0):
        flat = torch.full((CLOUD, 3), scale, dtype=torch.float64, requires_grad=True)
        loss = PCE(bandwidth=0.1, tolerance=0.01, form=form)
        for pair in [(flat, teacher.embedding), (flat, flat.detach()), (teacher.embedding, flat)]:
            ours, theirs = (Features(teacher.logits, points) for points in pair)
            value = loss(ours, theirs, batch())
            assert value.isfinite()
        (gradient,) = torch.autograd.grad(
            loss(Features(teacher.logits, flat), teacher, batch()), flat
        )
        assert gradient.isfinite().all()


@pytest.mark.parametrize("form", ["pce", "em-pce"])
def test_far_students_still_have_a_finite_loss(form):
    ours, theirs = torch.full((20,), 0.5), torch.linspace(0.4, 0.6, 20)
    value = persistent_cross_entropy(ours, theirs, bandwidth=0.1, tolerance=1e-3, form=form)
    assert value.isfinite()  # e^(-gap) itself is 0 for every lifetime
    assert value > 0


@pytest.mark.parametrize("edges", EDGES)
def test_pce_is_calibrated_on_the_answers_of_both_networks(source, edges):
    def lit(epoch):  # all images of the source are black, which no network tells apart
        for shown, made in answers(epoch):
            generator = torch.Generator().manual_seed(int(shown.index[0]))
            yield replace(shown, images=torch.rand(CLOUD, 3, 8, 8, generator=generator)), made

    student, pairs = source.student.train(), []
    before = {key: value.clone() for key, value in student.state_dict().items()}
    asked = replace(source, teacher_batches=lit)
    loss = bound(PCE, features(3, seed=1), features(5, seed=2), asked, edges=edges)
    assert student.training
    after = student.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    student.eval()
    for shown, made in lit(0):
        tree = None if edges == "persistent" else batch_tree(shown, 0).tolist()
        with torch.no_grad():
            seen = student(shown.images.double())
        clouds = seen.embedding, made.embedding
        pairs.append([reference.lifetimes(points.tolist(), tree) for points in clouds])
    bandwidth, tolerance = reference.calibrated(pairs)
    assert loss.metadata() == {
        "bandwidth": pytest.approx(bandwidth, rel=1e-4),
        "tolerance": pytest.approx(tolerance, rel=1e-4),
    }
    assert set(loss.state_dict()) == {"bandwidth", "tolerance"}
    assert not list(loss.parameters())


def test_calibration_of_known_lifetimes():
    # Gaps of 1, 1, 2, 3, 3 beside a 0, and of 2. Without a student all of the teacher is missing.
    nothing = torch.zeros(1)
    pairs = [(nothing, torch.tensor([1.0, 1.0, 2.0, 4.0])), (nothing, torch.tensor([1.0, 3.0]))]
    bandwidth, tolerance = calibrate(pairs)
    assert bandwidth == 2
    teacher = [[1.0, 1.0, 2.0, 4.0], [1.0, 3.0]]
    missing = sorted(reference.density(u, bars, 2.0) for bars in teacher for u in bars)
    assert tolerance == pytest.approx((missing[2] + missing[3]) / 2)
    # Where nothing differs no tolerance is needed.
    assert calibrate([(pairs[0][1], pairs[0][1])]) == (2.0, 1.0)


def test_lifetimes_that_do_not_differ_are_no_ground_for_a_bandwidth():
    with pytest.raises(ValueError, match="no two lifetimes .* give bandwidth and tolerance"):
        calibrate([(torch.ones(3), torch.ones(3))])


def test_bandwidth_and_tolerance_can_be_told(source):
    networks = features(3, seed=1), features(5, seed=2), replace(source, teacher_batches=never)
    loss = bound(PCE, *networks, bandwidth=0.0741, tolerance=16.06)
    assert loss.metadata() == pytest.approx({"bandwidth": 0.0741, "tolerance": 16.06})
    with pytest.raises(ValueError, match="give bandwidth and tolerance, or neither"):
        bound(PCE, *networks, tolerance=16.06)
    with pytest.raises(ValueError, match=r"bandwidth must be positive, got -1\.0"):
        bound(PCE, *networks, bandwidth=-1.0, tolerance=16.06)


def test_a_run_that_goes_on_keeps_what_was_calibrated(source):
    networks = features(3, seed=1), features(5, seed=2), source
    first = bound(PCE, *networks)
    other = bound(PCE, *networks, bandwidth=1.0, tolerance=1.0)
    other.load_state_dict(first.state_dict())
    assert other(*networks[:2], batch()) == first(*networks[:2], batch())
