"""Losses on shape that see which image is which: the papers in plain loops."""

import math

import pytest
import torch
from reference import topological_losses as reference
from reference.features import CLOUD, batch, features
from torch.autograd import gradcheck

from topkd.losses import EdgeMatching, RTDLite, Ultrametric
from topkd.losses.controls import batch_tree, random_tree
from topkd.topology import edge_matching, rtd_lite, single_linkage, ultrametric

SCALES = ["none", "mean", "max", "quantile"]
EDGES = ["persistent", "random"]


@pytest.fixture
def clouds():
    return features(3, seed=1), features(5, seed=2)


def in_lists(clouds):
    return tuple(made.embedding.tolist() for made in clouds)


def trees_of(edges, points):
    """The student's and the teacher's."""
    if edges == "persistent":
        return [reference.spanning_tree(cloud) for cloud in points]
    return [batch_tree(batch(), 0).tolist()] * 2


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_edge_matching_is_the_paper_in_plain_loops(clouds, edges, scale, symmetric):
    loss, points = EdgeMatching(scale=scale, symmetric=symmetric, edges=edges), in_lists(clouds)
    scales = [reference.scale_of(scale, cloud) for cloud in points]
    trees = trees_of(edges, points)
    expected = reference.edge_matching(*points, trees if symmetric else trees[1:], scales)
    assert loss(*clouds, batch()).item() == pytest.approx(expected, rel=1e-6)


def test_edge_matching_by_a_learned_scale_is_the_released_code(clouds):
    loss, points = EdgeMatching(scale="learned").double(), in_lists(clouds)
    assert [name for name, _ in loss.named_parameters()] == ["log_scale"]
    trees, greatest = trees_of("persistent", points), reference.scale_of("max", points[1])
    for scale in (1.0, 2.5):
        with torch.no_grad():
            loss.log_scale.fill_(math.log(scale))
        expected = reference.edge_matching(*points, trees, (scale, greatest))
        assert loss(*clouds, batch()).item() == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():  # nothing is left of a teacher in another size once that is known
        loss.log_scale.fill_(math.log(3 * greatest))
    assert loss(clouds[1].apply(lambda t: 3 * t), clouds[1], batch()) < 1e-12


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("scale", SCALES)
def test_rtd_lite_is_the_paper_in_plain_loops(clouds, edges, scale):
    points = in_lists(clouds)
    tree = None if edges == "persistent" else batch_tree(batch(), 0).tolist()
    scales = [reference.scale_of(scale, cloud) for cloud in points]
    expected = reference.rtd_lite(*points, scales, tree)
    assert expected > 0.01
    found = RTDLite(scale=scale, edges=edges)(*clouds, batch())
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("order", [1.0, 2.0])
def test_ultrametric_is_the_definition_in_plain_loops(clouds, edges, scale, order):
    points = in_lists(clouds)
    scales = [reference.scale_of(scale, cloud) for cloud in points]
    expected = reference.ultrametric(*points, trees_of(edges, points), scales, order)
    found = Ultrametric(order=order, scale=scale, edges=edges)(*clouds, batch())
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_a_scale_that_is_a_constant_pulls_at_the_size_of_the_student(clouds):
    student, teacher = clouds
    for kind in (EdgeMatching, RTDLite, Ultrametric):
        for constant in (False, True):
            size = torch.ones((), dtype=torch.float64, requires_grad=True)
            made = student.apply(lambda t, size=size: size * t)
            kind(detach_scale=constant)(made, teacher, batch()).backward()
            assert (size.grad.abs() > 1e-6) == constant


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_refuses_an_order_below_1(value):
    with pytest.raises(ValueError, match=f"order must be at least 1, got {value}"):
        Ultrametric(order=value)


# --- The functions, by the edges of given trees --------------------------------------------------


@pytest.mark.parametrize("function", [edge_matching, rtd_lite, ultrametric])
def test_several_clouds_take_one_tree_or_one_each(clouds, function):
    student, teacher = (
        torch.stack([features(width, seed=seed).embedding for seed in range(3)]) for width in (3, 5)
    )
    teacher = teacher + 0.1
    trees = torch.stack([random_tree(CLOUD, torch.Generator().manual_seed(s)) for s in range(3)])
    alone = [
        function(*each[:2], edges=each[2]) for each in zip(student, teacher, trees, strict=True)
    ]
    torch.testing.assert_close(function(student, teacher, edges=trees), torch.stack(alone))
    same = [function(s, t, edges=trees[0]) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(function(student, teacher, edges=trees[0]), torch.stack(same))
    inputs = student.requires_grad_(), teacher.requires_grad_()
    assert gradcheck(lambda s, t: function(s, t, edges=trees).sum(), inputs, fast_mode=True)


def test_heights_in_a_given_tree_are_its_longest_edges():
    points = features(3, seed=1, n=9).embedding
    tree = random_tree(9, torch.Generator().manual_seed(4))
    expected = reference.heights(points.tolist(), tree.tolist())
    found = single_linkage(points, edges=tree)
    pairs = [(i, j) for i in range(9) for j in range(i + 1, 9)]
    assert found.tolist() == pytest.approx([expected[pair] for pair in pairs])
    both = single_linkage(torch.stack([points, points]), edges=tree)
    assert torch.equal(both, torch.stack([found, found]))
