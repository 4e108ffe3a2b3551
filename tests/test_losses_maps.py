"""Losses on feature maps: hints, attention, selectivity, information, flow."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from reference import map_losses as reference
from reference.features import batch, bound, features, source_in
from reference.losses import mean_square as reference_mean_square
from torch.autograd import gradcheck

from topkd.features import Features
from topkd.losses import AT, FSP, MSE, NST, VID, FitNet
from topkd.losses.functional import (
    attention_transfer,
    fsp_matrix,
    gaussian_nll,
    mean_square,
    neuron_selectivity,
)
from topkd.losses.regression import regressor


@pytest.fixture
def source(tmp_path):
    return source_in(tmp_path)


def maps(channels, side, seed, n=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, side, side, dtype=torch.float64, generator=generator)


def stages(*shapes, seed, n=3):
    """Features whose maps and pre-activations have these (channels, side)."""
    made = [maps(c, side, seed + place, n) for place, (c, side) in enumerate(shapes)]
    return Features(torch.zeros(n, 2), torch.zeros(n, 2), made, made)


def gradient(function, tensor):
    tensor = tensor.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(tensor), tensor)
    return found


def slope(function, tensor, direction, step=1e-6):
    """The derivative along a direction, by central differences."""
    return (function(tensor + step * direction) - function(tensor - step * direction)) / (2 * step)


PAIRS = {  # channels and side of student and teacher
    "same shape": ((3, 4), (3, 4)),
    "other channels": ((2, 4), (5, 4)),
    "larger student": ((3, 4), (4, 2)),
    "smaller student": ((6, 2), (3, 4)),
}


@pytest.fixture(params=PAIRS.values(), ids=PAIRS)
def pair(request):
    (c_s, side_s), (c_t, side_t) = request.param
    return maps(c_s, side_s, seed=1), maps(c_t, side_t, seed=2)


# --- values and gradients, against plain loops ------------------------------------------------

BY_PAIR = {
    "at": (attention_transfer, reference.attention_transfer),
    "at, paper": (
        lambda s, t: attention_transfer(s, t, form="paper"),
        lambda s, t: reference.attention_transfer(s, t, paper=True),
    ),
    "nst": (neuron_selectivity, reference.neuron_selectivity),
}


@pytest.mark.parametrize(("ours", "theirs"), BY_PAIR.values(), ids=BY_PAIR)
def test_losses_of_two_maps_are_their_papers_in_plain_loops(pair, ours, theirs):
    student, teacher = pair
    expected = theirs(student.tolist(), teacher.tolist())
    assert expected > 0
    assert ours(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    direction = maps(*student.shape[1:3], seed=3)

    def plain(moved):
        return theirs(moved.tolist(), teacher.tolist())

    found = (gradient(lambda s: ours(s, teacher), student) * direction).sum().item()
    assert found == pytest.approx(slope(plain, student, direction), rel=1e-6)
    assert gradcheck(
        ours, (student.clone().requires_grad_(), teacher.requires_grad_()), fast_mode=True
    )


@pytest.mark.parametrize("channels", [2, 8])  # fewer and more than the square root of positions
def test_both_ways_to_nst_are_the_paper(channels):
    student, teacher = maps(channels, 2, seed=1), maps(channels + 1, 2, seed=2)
    expected = reference.neuron_selectivity(student.tolist(), teacher.tolist())
    assert neuron_selectivity(student, teacher).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("pooling", ["average", "maximum"])
def test_fsp_is_the_paper_in_plain_loops(pooling):
    shapes = (2, 4), (3, 4), (4, 2)
    student, teacher = stages(*shapes, seed=1), stages(*shapes, seed=11)
    loss = FSP(pooling=pooling)
    aim = [m.tolist() for m in teacher.maps]

    def plain(first):
        own = [first.tolist(), *(m.tolist() for m in student.maps[1:])]
        return reference.fsp(own, aim, maximum=pooling == "maximum")

    def value(first):
        return loss(replace(student, maps=[first, *student.maps[1:]]), teacher, batch(3))

    assert value(student.maps[0]).item() == pytest.approx(plain(student.maps[0]), rel=1e-9)
    direction = maps(2, 4, seed=3)
    found = (gradient(value, student.maps[0]) * direction).sum().item()
    assert found == pytest.approx(slope(plain, student.maps[0], direction), rel=1e-6)


@pytest.mark.parametrize(("name", "skip"), [("at", 1), ("at", 0), ("nst", 2), ("fsp", 1)])
def test_stages_are_added_but_for_those_that_are_skipped(name, skip):
    shapes = (2, 4), (3, 4), (4, 2)
    student, teacher = stages(*shapes, seed=1), stages(*shapes, seed=11)
    made = {"at": AT, "nst": NST, "fsp": FSP}[name](skip=skip)
    own, aim = ([m.tolist() for m in made.maps[skip:]] for made in (student, teacher))
    if name == "fsp":
        expected = reference.fsp(own, aim)
    else:
        one = reference.attention_transfer if name == "at" else reference.neuron_selectivity
        expected = sum(one(s, t) for s, t in zip(own, aim, strict=True))
    assert made(student, teacher, batch(3)).item() == pytest.approx(expected, rel=1e-9)


def test_the_stem_is_skipped_by_all_but_fsp():
    assert AT().skip == NST().skip == 1
    assert VID().skip == 1
    assert FSP().skip == 0


def test_mean_square_is_the_definition(pair):
    student = pair[0]
    teacher = maps(*student.shape[1:3], seed=2)
    expected = reference_mean_square(student.flatten().tolist(), teacher.flatten().tolist())
    assert mean_square(student, teacher).item() == pytest.approx(expected)


@pytest.mark.parametrize("relu", [True, False])
def test_fitnet_is_the_definition_in_plain_loops(source, relu):
    student, teacher = features(3, seed=1), features(5, seed=2)
    loss = bound(FitNet, student, teacher, source, relu=relu).double()
    convolution, normalization = loss.regress[:2]
    normalization.running_mean.uniform_(-1, 1)
    normalization.running_var.uniform_(0.5, 2)
    torch.nn.init.uniform_(normalization.weight)
    torch.nn.init.uniform_(normalization.bias)
    assert convolution.kernel_size == (1, 1)  # maps of the same size
    guess = reference.convolved(
        student.maps[2].tolist(), convolution.weight.tolist(), convolution.bias.tolist()
    )
    guess = reference.normalized(
        guess,
        normalization.running_mean.tolist(),
        normalization.running_var.tolist(),
        normalization.weight.tolist(),
        normalization.bias.tolist(),
    )
    if relu:
        guess = reference.each(guess, lambda v, c: max(v, 0.0))
    expected = reference_mean_square(reference.flat(guess), teacher.maps[2].flatten().tolist())
    assert loss.eval()(student, teacher, batch()).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("width", [5, 3])
def test_feature_mimicking_is_the_definition_in_numpy(source, width):
    student, teacher = features(width, seed=1), features(5, seed=2)
    loss = bound(MSE, student, teacher, source).double()
    guess = student.embedding.numpy()
    if width == 5:
        assert not list(loss.parameters())
    else:
        matrix, bias = (w.detach().numpy() for w in loss.project.parameters())
        guess = guess @ matrix.T + bias
    expected = np.square(guess - teacher.embedding.numpy()).mean()
    assert loss(student, teacher, batch()).item() == pytest.approx(expected)


def test_gaussian_nll_is_a_gaussian_of_scipy():
    mean, aim = maps(3, 2, seed=1), maps(3, 2, seed=2)
    variance = torch.tensor([0.3, 1.0, 7.0], dtype=torch.float64)
    spread = np.sqrt(variance.numpy())[:, None, None]
    density = scipy.stats.norm.logpdf(aim.numpy(), mean.numpy(), spread)
    expected = -density.mean() - 0.5 * np.log(2 * np.pi)
    assert gaussian_nll(mean, variance, aim).item() == pytest.approx(expected, rel=1e-12)
    inputs = [t.clone().requires_grad_() for t in (mean, variance, aim)]
    assert gradcheck(gaussian_nll, inputs)


@pytest.mark.parametrize("side", [4, 2])
def test_vid_is_the_definition_in_plain_loops(source, side):
    student, teacher = stages((2, side), (2, side), seed=1), stages((2, 2), (3, 2), seed=11)
    loss = bound(VID, student, teacher, source, variance=2.0).double()
    guess = reference.pooled(student.maps[1].tolist(), 2, 2)
    for number in (0, 2, 4):
        if number:
            guess = reference.each(guess, lambda v, c: max(v, 0.0))
        guess = reference.convolved(guess, loss.regressors[0][number].weight.tolist())
    density = scipy.stats.norm.logpdf(teacher.maps[1].numpy(), np.array(guess), np.sqrt(2.0))
    expected = -density.mean() - 0.5 * np.log(2 * np.pi)
    assert loss(student, teacher, batch(3)).item() == pytest.approx(expected, rel=1e-6)


def test_variances_of_vid_come_to_rest_at_the_mean_squared_error(source):
    # The likeliest variance of Gaussians whose means are given.
    student, teacher = stages((2, 2), (2, 4), seed=1), stages((2, 2), (3, 4), seed=11)
    loss = bound(VID, student, teacher, source).double()
    start = torch.nn.functional.softplus(loss.rho[0]) + 1e-5
    assert start.tolist() == pytest.approx([5.0] * 3, rel=1e-6)

    def pull():
        return torch.autograd.grad(loss(student, teacher, batch(3)), loss.rho[0])[0]

    assert (pull().abs() > 1e-3).all()
    likeliest = (loss.regressors[0](student.maps[1]) - teacher.maps[1]).square().mean((0, 2, 3))
    loss.rho[0].data = ((likeliest.detach() - 1e-5).exp() - 1).log()
    assert (pull().abs() < 1e-9).all()


# --- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mean", "paper"])
def test_attention_sees_neither_scale_nor_order_of_channels(pair, form):
    student, teacher = pair
    before = attention_transfer(student, teacher, form=form)
    scale = torch.tensor([0.1, 3.0, 20.0], dtype=torch.float64)[:, None, None, None]
    changed = (scale * student).flip(1)
    torch.testing.assert_close(attention_transfer(changed, teacher, form=form), before)
    torch.testing.assert_close(attention_transfer(student, -teacher, form=form), before)


def test_selectivity_sees_neither_order_nor_scale_of_channels(pair):
    student, teacher = pair
    scale = torch.rand(student.shape[1], 1, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(
        neuron_selectivity((scale * student).flip(1), teacher.flip(1)),
        neuron_selectivity(student, teacher),
    )


@pytest.mark.parametrize("compare", [attention_transfer, neuron_selectivity])
def test_the_same_move_of_all_positions_does_not_matter(compare):
    student, teacher = maps(3, 4, seed=1), maps(5, 4, seed=2)
    moved = compare(student.roll((1, 2), (2, 3)), teacher.roll((1, 2), (2, 3)))
    torch.testing.assert_close(moved, compare(student, teacher))
    assert not torch.isclose(compare(student.roll(1, 3), teacher), compare(student, teacher))


def test_selectivity_is_a_square_that_no_map_makes_negative():
    for seed in range(20):
        assert neuron_selectivity(maps(3, 3, seed), maps(4, 3, seed + 100)) > 0


@pytest.mark.parametrize("compare", [attention_transfer, neuron_selectivity])
def test_silent_maps_are_nothing_to_divide_by(compare):
    silent = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    assert gradient(lambda s: compare(s, maps(3, 2, seed=1, n=2)), silent).isfinite().all()
    assert compare(silent, silent) == 0


def test_selectivity_of_patterns_by_hand():
    # One neuron for the left, one for the right; the teacher has only the first. With unit vectors
    # the kernels are k(s, s) = 1/2, k(t, t) = 1, k(s, t) = 1/2.
    student = torch.eye(2).view(1, 2, 1, 2)
    assert neuron_selectivity(student, 9 * student[:, :1]).item() == pytest.approx(0.5)


def test_flow_of_an_identity_is_an_identity():
    one_hot = torch.eye(4).view(1, 4, 2, 2)
    torch.testing.assert_close(4 * fsp_matrix(one_hot, one_hot), torch.eye(4)[None])


def test_flow_by_hand():
    shallow = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 1, 2, 2)
    deep = torch.tensor([5.0]).view(1, 1, 1, 1)
    assert fsp_matrix(shallow, deep).item() == 15.0  # the average, 3, times 5
    assert fsp_matrix(shallow, deep, pooling="maximum").item() == 30.0
    assert fsp_matrix(deep, shallow).item() == 15.0


def test_flow_backwards_is_the_transpose():
    shallow, deep = maps(3, 4, seed=1), maps(2, 2, seed=2)
    torch.testing.assert_close(fsp_matrix(shallow, deep), fsp_matrix(deep, shallow).mT)


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        ((3, 8, 8), (5, 4, 4), torch.nn.Conv2d),
        ((3, 2, 2), (5, 4, 4), torch.nn.ConvTranspose2d),
        ((3, 4, 4), (5, 4, 4), torch.nn.Conv2d),
        ((3, 7, 9), (5, 4, 3), torch.nn.Conv2d),
    ],
)
@pytest.mark.parametrize("relu", [True, False])
def test_regressors_end_at_the_shape_of_the_teacher(student, teacher, kind, relu):
    made = regressor(student, teacher, relu=relu)
    assert made(torch.randn(2, *student)).shape == (2, *teacher)
    assert isinstance(made[0], kind)
    assert isinstance(made[-1], torch.nn.ReLU) == relu


def test_regressors_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="no regressor maps 2x2 to 5x5: the student's"):
        regressor((3, 2, 2), (3, 5, 5), relu=True)


MADE = {
    "fitnet": FitNet,
    "at": AT,
    "nst": NST,
    "vid": VID,
    "fsp": FSP,
}


@pytest.mark.parametrize("loss", MADE.values(), ids=MADE)
def test_networks_with_other_numbers_of_maps_are_refused(source, loss):
    student, teacher = features(5, seed=1), features(5, seed=2)
    teacher = replace(teacher, maps=teacher.maps[1:])
    said = (
        "the student has 4 maps and the teacher 3; maps are compared in pairs, so select the same"
    )
    with pytest.raises(ValueError, match=said):
        bound(loss, student, teacher, source)


@pytest.mark.parametrize("loss", [AT, NST, VID, FSP])
def test_something_must_be_left_to_compare(source, loss):
    made = features(5, seed=1)
    with pytest.raises(ValueError, match="skip leaves out the first 4 of 4 maps; it must be"):
        bound(loss, made, made, source, skip=4)
    with pytest.raises(ValueError, match="^skip must not be negative, got -1$"):
        loss(skip=-1)


def test_what_is_no_map_is_refused(source):
    made = features(5, seed=1)
    tokens = replace(made, maps=[m.flatten(2) for m in made.maps])
    with pytest.raises(ValueError, match=r"maps must be \(n, c, h, w\) .* got \(6, 3, 16\) of the"):
        bound(AT, tokens, made, source)
    with pytest.raises(ValueError, match="of the same images"):
        bound(AT, features(5, seed=1, n=4), made, source)


def test_fsp_names_the_maps_whose_channels_differ(source):
    said = (
        "fsp needs as many channels in the student as in the teacher, but map 1 has 2 and 3, map 2 "
        "has 2 and 4, map 3 has 3 and 5; select matching maps with the term's taps, or use at, nst"
    )
    with pytest.raises(ValueError, match=said):
        bound(FSP, features(3, seed=1), features(5, seed=2), source)
    made = features(5, seed=1)
    with pytest.raises(
        ValueError, match="fsp compares consecutive maps and needs at least two, got 1"
    ):
        bound(FSP, made, made, source, skip=3)


@pytest.mark.parametrize("stage", [4, -5])
def test_a_stage_that_is_not_there_is_refused(source, stage):
    made = features(5, seed=1)
    with pytest.raises(
        ValueError, match=f"there is no map {stage}: of 4 maps the last is 3, or -1"
    ):
        bound(FitNet, made, made, source, stage=stage)


def test_stages_of_fitnet_count_from_both_ends(source):
    student, teacher = features(3, seed=1), features(5, seed=2)
    last = bound(FitNet, student, teacher, source, stage=-1)
    assert last.regress[0].weight.shape == (5, 3, 1, 1)
    first = bound(FitNet, student, teacher, source, stage=0)
    assert first.regress[0].weight.shape == (2, 2, 1, 1)


@pytest.mark.parametrize("compare", [mean_square, lambda s, t: gaussian_nll(s, torch.ones(2), t)])
def test_features_of_other_shapes_are_refused(compare):
    with pytest.raises(ValueError, match=r"differ: .*\(1, 2, 2, 2\), teacher \(1, 1, 2, 2\)"):
        compare(torch.ones(1, 2, 2, 2), torch.ones(1, 1, 2, 2))


def test_variances_must_be_above_their_floor():
    with pytest.raises(ValueError, match="variance must be above 1e-05, got 0.0"):
        VID(variance=0.0)
