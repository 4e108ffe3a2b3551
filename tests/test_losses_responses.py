"""Losses on pre-activations: activation boundaries and the overhaul."""

from dataclasses import replace

import pytest
import scipy.integrate
import scipy.stats
import torch
from reference import map_losses as reference
from reference.features import IMAGES, answers, batch, bound, features, source_in
from torch import nn
from torch.autograd import gradcheck

from topkd.features import FeatureExtractor, Teacher
from topkd.losses import AB, OFD
from topkd.losses.functional import activation_boundaries, partial_distance
from topkd.losses.ofd import negative_mean, normalizations
from topkd.models import MODELS


@pytest.fixture
def source(tmp_path):
    return source_in(tmp_path)


def maps(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def stages(seed):
    return [maps(3, 2, 4, 4, seed=seed), maps(3, 4, 2, 2, seed=seed + 1)]


MARGINS = [torch.tensor([-0.5, -1.0]).double(), torch.tensor([-0.1, -0.7, -2.0, -0.4]).double()]


def plainly(lists):
    return [m.tolist() for m in lists]


BY_STAGES = {
    "ab": (activation_boundaries, reference.activation_boundaries),
    "ab, narrow": (
        lambda s, t: activation_boundaries(s, t, margin=0.3),
        lambda s, t: reference.activation_boundaries(s, t, margin=0.3),
    ),
    "ofd": (
        lambda s, t: partial_distance(s, t, MARGINS),
        lambda s, t: reference.overhaul(s, t, plainly(MARGINS)),
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), BY_STAGES.values(), ids=BY_STAGES)
def test_losses_of_responses_are_their_papers_in_plain_loops(ours, theirs):
    student, teacher = stages(seed=1), stages(seed=11)
    expected = theirs(plainly(student), plainly(teacher))
    assert expected > 0
    assert ours(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    inputs = [m.clone().requires_grad_() for m in student]
    assert gradcheck(lambda *own: ours(list(own), teacher), inputs, fast_mode=True)
    # and the gradient is that of the loops, by central differences along one direction
    found = torch.autograd.grad(ours(inputs, teacher), inputs)
    step, ways = 1e-6, stages(seed=21)
    up, down = (
        theirs(
            plainly([m + sign * step * w for m, w in zip(student, ways, strict=True)]),
            plainly(teacher),
        )
        for sign in (1, -1)
    )
    along = sum((f * w).sum().item() for f, w in zip(found, ways, strict=True))
    assert along == pytest.approx((up - down) / (2 * step), rel=1e-5)


# --- activation boundaries ----------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.2, 1.0, 3.0])
def test_nothing_is_asked_beyond_the_margin(margin):
    teacher = maps(3, 2, 4, 4, seed=1)
    side = torch.where(teacher > 0, 1.0, -1.0)
    beyond = side * (margin + maps(3, 2, 4, 4, seed=2).abs())
    assert activation_boundaries([beyond], [teacher], margin=margin) == 0
    assert activation_boundaries([0.99 * margin * side], [teacher], margin=margin) > 0


def test_only_the_side_of_the_teacher_counts():
    student, teacher = maps(3, 2, 4, 4, seed=1), maps(3, 2, 4, 4, seed=2)
    torch.testing.assert_close(
        activation_boundaries([student], [100 * teacher]),
        activation_boundaries([student], [teacher]),
    )
    # A student between the margins is as far from one side as its mirror image from the other.
    inner = 0.9 * student / student.abs().max()
    torch.testing.assert_close(
        activation_boundaries([-inner], [-teacher]), activation_boundaries([inner], [teacher])
    )


def test_a_deeper_stage_counts_twice_as_much():
    own, aim = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)  # each loses 1
    values = [activation_boundaries([own] * n, [aim] * n).item() for n in (1, 2, 3)]
    assert values == [1.0, 1.5, 1.75]


def test_connectors_stand_where_shapes_differ(source):
    student, teacher = features(3, seed=1), features(5, seed=2)
    loss = bound(AB, student, teacher, source)
    assert [type(c) for c in loss.connectors] == [nn.Sequential] * 3
    assert not any(isinstance(m, nn.ReLU) for m in loss.modules())  # negative is an answer too
    same = bound(AB, teacher, teacher, source)
    assert not list(same.parameters())
    own, aim = features(5, seed=1), teacher
    expected = reference.activation_boundaries(
        plainly(own.preactivations[1:]), plainly(aim.preactivations[1:])
    )
    assert same(own, aim, batch()).item() == pytest.approx(expected)


def test_margins_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"margin must be positive, got 0\.0"):
        AB(margin=0.0)


# --- the overhaul --------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [-7.0, -1.0, 0.0, 0.5, 2.9])
@pytest.mark.parametrize("std", [0.3, 1.0, 4.0])
def test_margins_are_the_mean_of_what_is_negative(mean, std):
    below = scipy.stats.norm.cdf(0, mean, std)
    found = negative_mean(torch.tensor([mean]).double(), torch.tensor([std]).double()).item()
    if below <= 0.001:
        assert found == pytest.approx(-3 * std)
        return
    low = min(mean, 0) - 12 * std
    part, _ = scipy.integrate.quad(
        lambda x: x * scipy.stats.norm.pdf(x, mean, std), low, 0, points=[min(mean, 0)]
    )
    assert found == pytest.approx(part / below, rel=1e-6)


@pytest.mark.parametrize(("steps", "usual"), [(3.09, False), (3.091, True)])
def test_a_channel_that_is_hardly_ever_negative_has_another_margin(steps, usual):
    # Phi(-3.0902) = 0.001
    found = negative_mean(torch.tensor([2 * steps]).double(), torch.tensor([2.0]).double()).item()
    assert (found == -6.0) == usual


def test_a_channel_without_scale_is_constant():
    found = negative_mean(torch.tensor([-2.0, 2.0, 0.0]), torch.zeros(3))
    assert found.tolist() == pytest.approx([-2.0, 0.0, 0.0], abs=1e-30)


def test_only_what_matters_behind_the_relu_is_asked():
    teacher = maps(3, 2, 4, 4, seed=1)
    margin = torch.tensor([-0.5, -0.2]).double()
    cut = torch.maximum(teacher, margin[:, None, None])
    assert partial_distance([cut], [teacher], [margin]) == 0
    lower = torch.where(teacher > 0, cut, cut - 5)
    assert partial_distance([lower], [teacher], [margin]) == 0
    assert partial_distance([cut + 1], [teacher], [margin]).item() == pytest.approx(32)
    assert partial_distance([cut - 1], [teacher], [margin]).item() == pytest.approx(
        (teacher > 0).sum().item() / 3
    )


def with_random_normalizations(network):
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(-1, 1, generator=generator)
            module.bias.data.uniform_(-1, 1, generator=generator)
    return network


def test_margins_are_read_off_the_normalizations(source):
    with_random_normalizations(source.teacher.network)
    loss = bound(OFD, features(3, seed=1), features(5, seed=2), source)
    assert loss.metadata() == {"margins": ["stages.1.1", "stages.2.1", "stages.3.1"]}
    for number in range(3):
        normalization = source.teacher.network.network.stages[number + 1][1]
        for margin, mean, std in zip(
            loss.get_buffer(f"margin{number}").tolist(),
            normalization.bias.tolist(),
            normalization.weight.abs().tolist(),
            strict=True,
        ):
            below = scipy.stats.norm(mean, std)
            if below.cdf(0) <= 0.001:
                assert margin == pytest.approx(-3 * std)
            else:
                expected = below.expect(lambda x: x, ub=0, conditional=True)
                assert margin == pytest.approx(expected, rel=1e-4)


def without_normalizations(width=5):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(4, width, 3, 2, padding=1), nn.ReLU()
    )
    whole = nn.Sequential(*network, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
    return FeatureExtractor(whole, ["1", "3"], "6", ["0", "3:in"])


def test_margins_are_measured_where_there_is_no_normalization(source):
    teacher = Teacher(without_normalizations(), (0.5,) * 3, (0.25,) * 3)
    loss = bound(
        OFD,
        replace(features(3, seed=1), preactivations=features(3, seed=1).preactivations[2:]),
        replace(features(5, seed=2), preactivations=features(5, seed=2).preactivations[2:]),
        replace(
            source,
            student=without_normalizations(3),
            teacher=teacher,
            teacher_batches=two_stages,
        ),
        skip=0,
    )
    assert loss.metadata() == {"margins": ["measured on 16 batches"] * 2}
    for place, found in ((0, loss.margin0), (1, loss.margin1)):
        for channel, margin in enumerate(found.tolist()):
            negative = [
                v
                for _, answer in two_stages(0)
                for image in answer.preactivations[place].tolist()
                for v in reference.flat(image[channel])
                if v < 0
            ]
            assert len(negative) > IMAGES
            assert margin == pytest.approx(sum(negative) / len(negative), rel=1e-5)


def two_stages(epoch):
    for shown, answer in answers(epoch):
        yield shown, replace(answer, preactivations=answer.preactivations[2:])


def test_a_channel_that_is_never_negative_has_margin_0(source):
    def positive(epoch):
        for shown, answer in two_stages(epoch):
            yield shown, replace(answer, preactivations=[m.abs() for m in answer.preactivations])

    teacher = Teacher(without_normalizations(), (0.5,) * 3, (0.25,) * 3)
    few = [
        replace(f, preactivations=f.preactivations[2:]) for f in (features(5, 1), features(5, 2))
    ]
    source = replace(source, student=without_normalizations(), teacher=teacher)
    loss = bound(OFD, *few, replace(source, teacher_batches=positive), skip=1)
    assert loss.margin0.tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet8", ["bn1", "layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"]),
        ("resnet14", ["bn1", "layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2"]),
        ("wrn_16_1", ["block1.layer.0.bn1", "block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]),
        ("vgg8", ["block0.1", "block1.1", "block2.1", "block3.1", "block4.1"]),
    ],
)
def test_the_normalization_before_each_relu_is_found(name, expected):
    teacher = Teacher(MODELS[name].build(3), (0.5,) * 3, (0.25,) * 3)
    taps = teacher.network.preactivations
    found = normalizations(teacher, torch.zeros(1, 3, 32, 32), taps)
    modules = dict(teacher.network.network.named_modules())
    assert [place for place, _ in found] == expected
    assert all(modules[place] is module for place, module in found)
    assert not any(
        m._forward_hooks
        and isinstance(m, nn.BatchNorm2d)
        and place not in teacher.network.preactivations
        for place, m in modules.items()
    )


def test_asking_a_teacher_leaves_it_as_it_was(source):
    network = source.teacher.network.network
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    bound(OFD, features(3, seed=1), features(5, seed=2), source)
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    assert after == hooks


def test_the_overhaul_is_the_definition_in_plain_loops(source):
    with_random_normalizations(source.teacher.network)
    student, teacher = features(3, seed=1), features(5, seed=2)
    small = [student.preactivations[0], *(m[..., ::2, ::2] for m in student.preactivations[1:])]
    for own in (student.preactivations, small):
        made = replace(student, preactivations=own)
        loss = bound(OFD, made, teacher, source).double().eval()
        moved, aims = [], []
        for connect, s, t in zip(loss.connectors, own[1:], teacher.preactivations[1:], strict=True):
            guess = reference.convolved(s.tolist(), connect[0].weight.tolist())
            guess = reference.each(guess, lambda v, c: v / (1 + 1e-5) ** 0.5)  # as at the start
            guess, aim = reference.to_smaller(guess, t.tolist())
            moved.append(guess)
            aims.append(aim)
        margins = [loss.get_buffer(f"margin{n}").tolist() for n in range(3)]
        expected = reference.overhaul(moved, aims, margins)
        assert loss(made, teacher, batch()).item() == pytest.approx(expected, rel=1e-6)


def test_margins_go_with_a_checkpoint_and_are_not_trained(source):
    with_random_normalizations(source.teacher.network)
    loss = bound(OFD, features(3, seed=1), features(5, seed=2), source)
    assert {"margin0", "margin1", "margin2"} <= loss.state_dict().keys()
    assert not any(name.startswith("margin") for name, _ in loss.named_parameters())


# --- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [AB, OFD])
def test_networks_with_other_numbers_of_preactivations_are_refused(source, loss):
    student, teacher = features(5, seed=1), features(5, seed=2)
    fewer = replace(teacher, preactivations=teacher.preactivations[1:])
    with pytest.raises(ValueError, match="the student has 4 pre-activations and the teacher 3"):
        bound(loss, student, fewer, source)


@pytest.mark.parametrize(
    "compare", [activation_boundaries, lambda s, t: partial_distance(s, t, [torch.zeros(3)])]
)
def test_preactivations_of_other_shapes_are_refused(compare):
    with pytest.raises(
        ValueError, match=r"pre-activations differ: student \(1, 2, 2, 2\), teacher"
    ):
        compare([torch.zeros(1, 2, 2, 2)], [torch.zeros(1, 3, 2, 2)])
