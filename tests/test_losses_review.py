"""Knowledge review: the authors' code in plain loops, laws and known cases."""

from dataclasses import replace

import pytest
import torch
from reference import map_loops as loops
from reference.features import WIDTH, batch, bound, features, source_in
from torch import nn

from topkd.features import Features
from topkd.losses import ReviewKD
from topkd.losses.functional import hierarchical


def review(tmp_path, **options):
    """The loss between networks of the contract, with normalizations that have seen something."""
    student, teacher = features(3, seed=1), features(WIDTH, seed=2)
    loss = bound(ReviewKD, student, teacher, source_in(tmp_path), **options).double().eval()
    for module in loss.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return loss, student, teacher


def pair(side):
    generator = torch.Generator().manual_seed(side)
    return torch.randn(2, 2, 3, side, side, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_pooling_is_the_authors_code_in_plain_loops(side):
    student, teacher = pair(side)
    expected = loops.hierarchical(student.tolist(), teacher.tolist())
    assert hierarchical(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(hierarchical, (student.requires_grad_(), teacher))


def test_constant_gaps_are_seen_alike_at_every_size():
    _, teacher = pair(8)
    assert hierarchical(teacher + 3, teacher).item() == pytest.approx(9)


def test_gaps_that_cancel_count_only_where_they_are_seen():
    # A chessboard is 1 as it is, with the weight 1 of 1 + 1/2 + 1/4 + 1/8, and 0 averaged.
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert hierarchical(board[None, None], torch.zeros(1, 1, 8, 8)).item() == pytest.approx(8 / 15)


@pytest.mark.parametrize("before", [False, True])
def test_value_is_the_authors_code_in_plain_loops(before, tmp_path):
    loss, student, teacher = review(tmp_path, preactivations=before)
    levels = [
        [*maps[1:], made.embedding[:, :, None, None]]
        for made, maps in (
            (student, student.preactivations if before else student.maps),
            (teacher, teacher.preactivations),
        )
    ]
    own, wanted = ([level.tolist() for level in side] for side in levels)
    sides = [len(level[0][0]) for level in wanted]
    made = [loops.reviewed(list(image), loss.fusions, sides) for image in zip(*own, strict=True)]
    expected = sum(
        loops.hierarchical([image[place] for image in made], wanted[place])
        for place in range(len(wanted))
    )
    assert loss(student, teacher, batch()).item() == pytest.approx(expected, rel=1e-9)


def test_maps_of_any_size_are_brought_to_the_teachers(tmp_path):
    loss, student, teacher = review(tmp_path)
    larger = [nn.functional.interpolate(m, scale_factor=3) for m in teacher.preactivations]
    value = loss(student, replace(teacher, preactivations=larger), batch())
    assert value.isfinite()


def test_the_embedding_is_the_deepest_and_the_stem_is_left_out(tmp_path):
    loss, student, teacher = review(tmp_path)
    inputs = [m.requires_grad_() for m in [*student.maps, student.embedding]]
    stem, *others = torch.autograd.grad(loss(student, teacher, batch()), inputs, allow_unused=True)
    assert stem is None
    assert all(gradient.norm() > 0 for gradient in others)
    assert loss.fusions[-1].gates is None


def narrow_but_for_its_embedding(width):
    maps = [torch.zeros(1, 8, 2, 2)] * 2
    return Features(torch.zeros(1, 4), torch.zeros(1, width), maps, maps)


@pytest.mark.parametrize(
    ("width", "options", "expected"), [(16, {}, 16), (1024, {}, 512), (1024, {"width": 64}, 64)]
)
def test_it_is_as_wide_inside_as_the_students_embedding(tmp_path, width, options, expected):
    student, teacher = map(narrow_but_for_its_embedding, (width, 32))
    loss = bound(ReviewKD, student, teacher, source_in(tmp_path), **options)
    assert loss.fusions[0].enter[0].out_channels == expected


def test_refuses_networks_whose_stages_do_not_match(tmp_path):
    student, teacher = features(3, seed=1), features(WIDTH, seed=2)
    source = source_in(tmp_path)
    fewer = replace(teacher, preactivations=teacher.preactivations[1:])
    with pytest.raises(ValueError, match="got 3 stages of the student and 2 of the teacher"):
        bound(ReviewKD, student, fewer, source)
    with pytest.raises(ValueError, match="the teacher needs pre-activations .* but has 0"):
        bound(ReviewKD, student, replace(teacher, preactivations=[]), source)
    with pytest.raises(ValueError, match="the student needs maps of a stem and a stage, but has 1"):
        bound(ReviewKD, replace(student, maps=student.maps[:1]), teacher, source)
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        ReviewKD(width=0)
    with pytest.raises(ValueError, match=r"maps differ: student \(1, 2, 4, 4\), teacher \(1, 2, 2"):
        hierarchical(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2))
