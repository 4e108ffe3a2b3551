"""Losses through classifiers, and the student with its teacher's classifier."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from reference import map_loops as loops
from reference.features import CLASSES, WIDTH, agreeing, batch, bound, features, source_in, tapped
from reference.losses import mean_square
from torch import nn

from topkd.features import FeatureExtractor, Teacher
from topkd.losses import CATKD, SRRL, SimKD
from topkd.losses.functional import class_attention, class_maps, last_map
from topkd.models import MODELS
from topkd.models.reused import projector, rebuild, reuse

HALF = (0.5,) * 3


def agreed(width, seed):
    """Features whose classifier reads the averages of the last map, as in `source_in`."""
    return agreeing(features(width, seed=seed), tapped(width, seed=seed))


def seasoned(network):
    """Gives normalizations something that they have seen, so that nothing is 0 or 1."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, mean=1.0, std=0.3)
            nn.init.normal_(module.bias)
    return network.eval()


@pytest.fixture
def source(tmp_path):
    return source_in(tmp_path)


# --- SimKD ---------------------------------------------------------------------------------------


def test_projector_is_three_layers_in_plain_loops():
    network = seasoned(projector(2, 5).double())
    seen = torch.randn(2, 3, 4, dtype=torch.float64)
    layers = [network[0:2], network[3:5], network[6:8]]
    made = seen.tolist()
    for convolution, norm in layers:
        made = loops.layer(made, convolution, norm, relu=True)
    torch.testing.assert_close(network(seen[None])[0], seen.new_tensor(made))
    assert [layer[0].out_channels for layer in layers] == [2, 2, 5]


def test_projector_has_the_published_number_of_weights():
    # c_s c_t / f + 9 (c_t / f)^2 + c_t^2 / f and the normalizations; resnet8x4 from resnet32x4.
    weights = sum(w.numel() for w in projector(256, 256).parameters())
    assert weights == 256 * 128 + 9 * 128**2 + 128 * 256 + 2 * (128 + 128 + 256)


@pytest.mark.parametrize(("s_side", "t_side"), [(4, 4), (4, 2), (2, 4)])
def test_last_maps_are_compared_at_the_smaller_size(s_side, t_side):
    student = torch.randn(2, 3, s_side, s_side, dtype=torch.float64)
    teacher = torch.randn(2, 3, t_side, t_side, dtype=torch.float64)
    side = min(s_side, t_side)
    maps = [[loops.averaged(m, side) for m in seen.tolist()] for seen in (student, teacher)]
    found = last_map(student, teacher).item()
    assert found == pytest.approx(loops.mean_square(*maps), rel=1e-12)
    assert torch.autograd.gradcheck(last_map, (student.requires_grad_(), teacher))


def test_a_student_with_its_own_classifier_is_refused(source):
    message = (
        r"^losses.simkd: the student \(Network\) must use its teacher's classifier: set student"
    )
    with pytest.raises(ValueError, match=message):
        (1.0 * SimKD()).setup(agreed(3, seed=1), agreed(WIDTH, seed=2), source)


def test_refuses_last_maps_that_differ():
    with pytest.raises(ValueError, match=r"maps differ: student \(6, 3, 2, 2\), teacher \(6, 5, 2"):
        last_map(torch.zeros(6, 3, 2, 2), torch.zeros(6, 5, 2, 2))


# --- the student with its teacher's classifier ---------------------------------------------------

NAMES = ["resnet8x0.25", "wrn_16_1", "vgg8", "mobilenetv2", "shufflev2"]


def pair(student, teacher):
    models = MODELS[student].build(10), MODELS[teacher].build(10)
    seasoned(models[1])
    return models[0], Teacher(models[1], HALF, HALF)


@pytest.mark.parametrize("name", NAMES)
def test_any_student_answers_through_its_teachers_classifier(name):
    student, teacher = pair(name, "resnet8")
    images = torch.randn(3, 3, 32, 32)
    reused = reuse(student, teacher, images).eval()
    made, plain = reused(images), student.eval()(images)
    projected, network = made.maps[-1], reused.network
    assert projected.shape[1] == 64
    assert projected.shape[2] == min(8, plain.maps[-1].shape[2])
    torch.testing.assert_close(made.embedding, projected.mean((2, 3)))
    torch.testing.assert_close(made.logits, teacher.network.head(made.embedding))
    torch.testing.assert_close(made.maps[:-1], plain.maps[:-1])
    torch.testing.assert_close(made.preactivations[:-1], plain.preactivations[:-1])
    torch.testing.assert_close(made.preactivations[-1].relu(), projected)
    last = nn.functional.adaptive_avg_pool2d(plain.maps[-1], projected.shape[2])
    torch.testing.assert_close(projected, network.projector(last))


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_that_is_kept_is_needed(name):
    student, teacher = pair(name, "resnet8")
    reused = reuse(student, teacher, torch.randn(2, 3, 32, 32)).train()
    reused(torch.randn(4, 3, 32, 32)).logits.square().sum().backward()
    weights = dict(reused.network.named_parameters())
    trained = {name for name, weight in weights.items() if weight.grad is not None}
    assert weights.keys() - trained == {"classifier.weight", "classifier.bias"}
    brought = reused.network.brought
    body = sum(w.numel() for w in reused.network.body.parameters())
    assert sum(w.numel() for w in weights.values()) == body + brought
    assert body < sum(w.numel() for w in student.parameters())


@pytest.mark.parametrize("teacher", ["wrn_16_1", "mobilenetv2", "vgg8"])
def test_any_teacher_lends_its_classifier(teacher):
    student, teacher = pair("resnet8x0.25", teacher)
    reused = reuse(student, teacher, torch.randn(2, 3, 32, 32)).eval()
    made = reused(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(made.logits, teacher.network.head(made.embedding))


def test_the_description_is_all_it_takes_to_build_it_again(tmp_path):
    student, teacher = pair("wrn_16_1", "resnet8")
    images = torch.randn(2, 3, 32, 32)
    first = seasoned(reuse(student, teacher, images, factor=4))
    described = json.loads(json.dumps(first.network.description))
    second = rebuild(MODELS["wrn_16_1"].build(10), described).eval()
    second.network.load_state_dict(first.network.state_dict())
    torch.testing.assert_close(second(images).tensors(), first(images).tensors(), rtol=0, atol=0)
    assert not any(w.requires_grad for w in second.classifier.parameters())


def test_neither_network_is_changed():
    student, teacher = pair("resnet8x0.25", "resnet8")
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in (student, teacher.network)]
    images = torch.randn(2, 3, 32, 32)
    seen = student.eval()(images)
    reused = reuse(student.train(), teacher, images)
    assert reused.training
    with torch.no_grad():
        for weight in reused.parameters():
            weight.add_(1)
    for network, state in zip((student, teacher.network), before, strict=True):
        assert all(torch.equal(state[k], v) for k, v in network.state_dict().items())
    assert teacher.network.others == ()
    torch.testing.assert_close(student.eval()(images).tensors(), seen.tensors())


def test_no_tap_holds_on_to_what_it_read():
    student, teacher = pair("resnet8x0.25", "resnet8")
    reused = reuse(student, teacher, torch.randn(2, 3, 32, 32))
    reused(torch.randn(2, 3, 32, 32))
    assert not reused._records
    assert not reused.network.body._records
    hooks = [
        hook
        for module in reused.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert {id(h.records) for h in hooks} == {id(reused._records), id(reused.network.body._records)}
    copy.deepcopy(reused)


def test_simkd_of_a_reused_network_is_its_projected_map(source):
    student, teacher = tapped(3, seed=1), source.teacher
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    reused = reuse(student, teacher, images, teacher_tap="stages.3")
    made, answer = reused.double()(images), teacher(images)
    loss = bound(SimKD, made, answer, replace(source, student=reused))
    assert not list(loss.parameters())
    torch.testing.assert_close(
        loss(made, answer, batch(4)), (made.maps[-1] - answer.maps[-1]).square().mean()
    )
    assert loss.metadata() == {
        "classifier": "the teacher's",
        "weights_brought": 3 * 2 + 9 * 2 * 2 + 2 * 5 + 2 * (2 + 2 + 5) + 5 * CLASSES + CLASSES,
    }


def test_refuses_a_map_that_the_teachers_classifier_does_not_average():
    student, teacher = pair("resnet8x0.25", "wrn_16_1")
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="does not read the averages of 'block3'"):
        reuse(student, teacher, images, teacher_tap="block3")
    with pytest.raises(ValueError, match="has no module 'stages.9'"):
        reuse(student, teacher, images, teacher_tap="stages.9")
    with pytest.raises(ValueError, match=r"tap 'fc' reads \(2, 10\), which is not a map"):
        reuse(student, teacher, images, tap="fc")
    with pytest.raises(ValueError, match="factor must be between 1 and the teacher's width 64"):
        reuse(student, teacher, images, factor=65)


def test_refuses_a_teacher_whose_classifier_is_more_than_one_layer():
    student, _ = pair("resnet8x0.25", "resnet8")
    head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 10))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    teacher = Teacher(FeatureExtractor(network, ["0"], "3"), HALF, HALF)
    with pytest.raises(ValueError, match="classifier must be one linear layer, got Sequential"):
        reuse(student, teacher, torch.randn(2, 3, 32, 32), teacher_tap="0")


def test_a_convolution_of_one_place_is_a_classifier_too():
    student, _ = pair("resnet8x0.25", "resnet8")
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 10, 1), nn.Flatten()
    )
    teacher = Teacher(FeatureExtractor(network, ["0"], "2"), HALF, HALF)
    made = reuse(student, teacher, torch.randn(2, 3, 32, 32), teacher_tap="0").eval()(
        torch.randn(2, 3, 32, 32)
    )
    torch.testing.assert_close(made.logits, teacher.network.head(made.embedding))


# --- SRRL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 1.0, 5.0])
def test_softmax_regression_is_the_paper_in_plain_loops(weight, source):
    student, teacher = agreed(3, seed=1), agreed(WIDTH, seed=2)
    loss = seasoned(bound(SRRL, student, teacher, source, logits=weight).double())
    head = source.teacher.network.classifier
    embeddings, logits = [], []
    for seen in student.maps[-1].tolist():
        projected = loops.layer(seen, loss.project[0], loss.project[1], relu=True)
        own = [sum(map(sum, channel)) / 4 for channel in projected]
        embeddings.append(own)
        rows = zip(head.weight.tolist(), head.bias.tolist(), strict=True)
        logits.append([sum(a * b for a, b in zip(w, own, strict=True)) + c for w, c in rows])
    expected = sum(map(mean_square, embeddings, teacher.embedding.tolist())) / len(embeddings)
    expected += weight * sum(map(mean_square, logits, teacher.logits.tolist())) / len(logits)
    assert loss(student, teacher, batch()).item() == pytest.approx(expected, rel=1e-9)


def test_softmax_regression_trains_its_projection_and_never_the_teacher(source):
    student, teacher = agreed(3, seed=1), agreed(WIDTH, seed=2)
    loss = seasoned(bound(SRRL, student, teacher, source).double())
    assert sum(w.numel() for w in loss.parameters()) == 3 * WIDTH + 2 * WIDTH
    assert not any("teacher" in name for name in loss.state_dict())
    last = student.maps[-1].requires_grad_()

    def value(*_):
        return loss(student, teacher, batch())

    assert torch.autograd.gradcheck(value, (last, *loss.parameters()), fast_mode=True)
    value().backward()
    assert all(w.grad is None for w in source.teacher.network.parameters())


def test_a_student_with_the_teachers_embedding_and_logits_loses_nothing(source):
    teacher = agreed(WIDTH, seed=2)
    seen = teacher.maps[-1]
    made = replace(teacher, embedding=seen.mean((2, 3)))
    made = replace(made, logits=source.teacher.network.head(made.embedding))
    loss = bound(SRRL, made, made, source).double().eval()
    with torch.no_grad():  # the projection that changes nothing
        nn.init.dirac_(loss.project[0].weight).mul_((1 + loss.project[1].eps) ** 0.5)
    assert loss(made, made, batch()).item() == pytest.approx(0, abs=1e-20)


# --- CAT-KD --------------------------------------------------------------------------------------


def test_class_maps_are_a_convolution_with_the_classifiers_weight():
    seen, head = torch.randn(2, 5, 4, 4, dtype=torch.float64), nn.Linear(5, 3).double()
    kernels = [[[[w]] for w in row] for row in head.weight.tolist()]
    expected = [loops.convolution(image, kernels) for image in seen.tolist()]
    torch.testing.assert_close(class_maps(seen, head), seen.new_tensor(expected))
    torch.testing.assert_close(
        class_maps(seen, head), nn.functional.conv2d(seen, head.weight[:, :, None, None])
    )
    convolution = nn.Conv2d(5, 3, 1).double()
    torch.testing.assert_close(
        class_maps(seen, convolution), nn.functional.conv2d(seen, convolution.weight)
    )


@pytest.mark.parametrize("resolution", [1, 2, 4])
@pytest.mark.parametrize("normalize", [False, True])
def test_class_attention_is_the_paper_in_plain_loops(resolution, normalize):
    student, teacher = (torch.randn(2, 3, side, side, dtype=torch.float64) for side in (8, 4))
    expected = []
    for seen in (student, teacher):
        maps = [loops.averaged(image, resolution) for image in seen.tolist()]
        if normalize:
            maps = [
                [
                    [[v / sum(x * x for r in m for x in r) ** 0.5 for v in row] for row in m]
                    for m in image
                ]
                for image in maps
            ]
        expected.append(maps)
    found = class_attention(student, teacher, resolution=resolution, normalize=normalize)
    assert found.item() == pytest.approx(loops.mean_square(*expected), rel=1e-12, abs=1e-12)
    assert torch.autograd.gradcheck(
        lambda s: class_attention(s, teacher, resolution=resolution, normalize=normalize),
        student.requires_grad_(),
        fast_mode=True,
        atol=1e-4,
    )


def test_normalized_class_maps_that_are_nothing_have_a_gradient():
    student = torch.zeros(1, 2, 2, 2, requires_grad=True)
    class_attention(student, torch.ones(1, 2, 2, 2), normalize=True).backward()
    assert student.grad.abs().max() < 10


def test_the_students_classifier_learns_and_is_read_anew(source):
    student, teacher = agreed(3, seed=1), agreed(WIDTH, seed=2)
    source = replace(source, student=tapped(3, seed=1))
    loss = bound(CATKD, student, teacher, source)
    assert not list(loss.parameters())
    assert not loss.state_dict()
    weight = source.student.classifier.weight

    def value(_):
        return loss(student, teacher, batch())

    assert torch.autograd.gradcheck(value, weight, fast_mode=True)
    value(None).backward()
    assert weight.grad.norm() > 0
    assert source.teacher.network.classifier.weight.grad is None
    before = value(None)
    with torch.no_grad():
        weight.mul_(2)
    assert value(None) != before


def test_networks_with_one_classifier_and_one_map_lose_nothing(source):
    teacher = agreed(WIDTH, seed=2)
    source = replace(source, student=source.teacher.network)
    loss = bound(CATKD, teacher, teacher, source)
    assert loss(teacher, teacher, batch()) == 0


def test_refuses_what_has_no_class_maps(source):
    student, teacher = agreed(3, seed=1), agreed(WIDTH, seed=2)
    with pytest.raises(ValueError, match="the student has no maps"):
        bound(CATKD, replace(student, maps=[]), teacher, source)
    with pytest.raises(ValueError, match="one linear layer, got ReLU"):
        class_maps(student.maps[-1], nn.ReLU())
    with pytest.raises(ValueError, match="resolution must be positive, got 0"):
        CATKD(resolution=0)
    with pytest.raises(ValueError, match=r"class maps differ: student \(1, 2, 2, 2\), teacher"):
        class_attention(torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 2, 2))
