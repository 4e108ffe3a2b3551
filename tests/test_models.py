"""The networks: sizes and keys of the public benchmark, taps, and how weights begin."""

import math
import re

import pytest
import torch

from topkd import checkpoint, evaluate
from topkd.data.cifar import cifar100
from topkd.models import MODELS
from topkd.models.resnet import ResNet

PARAMETERS = {  # with 100 classes, as the public benchmark's definitions have
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
}
WIDTHS = {"resnet8x4": (32, 64, 128, 256), "resnet32x4": (32, 64, 128, 256)} | {
    "resnet8x0.25": (4, 4, 8, 16)
}


def widths_of(name):
    return WIDTHS.get(name, (16, 16, 32, 64))


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters_is_that_of_the_benchmark(name):
    network = MODELS[name].build(100)
    assert sum(w.numel() for w in network.parameters()) == PARAMETERS[name]


def test_number_of_parameters_is_the_sum_over_the_layers(name):
    depth, (stem, *stages) = int(re.search(r"\d+", name)[0]), widths_of(name)

    def convolution(channels_in, channels, side):  # without bias, and two numbers for its norm
        return channels_in * channels * side**2 + 2 * channels

    expected, channels = convolution(3, stem, 3), stem
    for stage, width in enumerate(stages):
        for block in range((depth - 2) // 6):
            expected += convolution(channels, width, 3) + convolution(width, width, 3)
            if block == 0 and (stage > 0 or channels != width):
                expected += convolution(channels, width, 1)
            channels = width
    expected += 7 * (channels + 1)
    assert sum(w.numel() for w in MODELS[name].build(7).parameters()) == expected


def test_taps_have_the_shapes_of_the_benchmark(name):
    stem, first, second, third = widths_of(name)
    made = MODELS[name].build(10).eval()(torch.randn(2, 3, 32, 32))
    assert [tuple(m.shape) for m in made.maps] == [
        (2, stem, 32, 32),
        (2, first, 32, 32),
        (2, second, 16, 16),
        (2, third, 8, 8),
    ]
    assert made.embedding.shape == (2, third)
    assert made.logits.shape == (2, 10)


def test_taps_are_what_the_network_computes(name):
    network = MODELS[name].build(10).double().eval()
    made = network(torch.randn(2, 3, 16, 16).double())
    assert all((m >= 0).all() for m in made.maps)  # after the ReLU
    torch.testing.assert_close(made.embedding, made.maps[-1].mean((2, 3)))
    torch.testing.assert_close(network.head(made.embedding), made.logits)


def test_keys_are_those_of_published_weights(name):
    pattern = (
        r"(conv1|fc|bn1|layer[123]\.\d+\.(conv[12]|bn[12]|downsample\.[01]))"
        r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
    )
    keys = MODELS[name].network(classes=10).state_dict()
    assert [key for key in keys if not re.fullmatch(pattern, key)] == []
    blocks = (int(re.search(r"\d+", name)[0]) - 2) // 6
    assert sum(key.endswith("conv2.weight") for key in keys) == 3 * blocks


def test_every_weight_is_reached_by_the_gradient(name):
    network = MODELS[name].build(10)
    network(torch.randn(2, 3, 8, 8)).logits.square().sum().backward()
    assert all(w.grad is not None and w.grad.norm() > 0 for w in network.parameters())


def test_convolutions_begin_with_the_variance_of_he():
    network = MODELS["resnet32x4"].network(classes=10)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 34
    for layer in convolutions:
        side, channels = layer.kernel_size[0], layer.out_channels
        weight = layer.weight.detach()
        spread = 5 * math.sqrt(2 / weight.numel())  # five standard errors of a variance
        assert weight.var().item() == pytest.approx(2 / (side**2 * channels), rel=spread)
        assert layer.bias is None


def test_normalisations_begin_as_the_identity():
    network = MODELS["resnet20"].network(classes=10)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()


def test_a_seed_fixes_the_weights():
    built = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        built.append(checkpoint.hash_of(MODELS["resnet8"].build(10)))
    assert built[0] == built[1] != built[2]


@pytest.mark.parametrize("depth", [2, 9, 10, 19, 21, -4])
def test_impossible_depths_are_refused(depth):
    with pytest.raises(ValueError, match=rf"6k \+ 2 \(8, 14, 20, ...\), got {depth}"):
        ResNet(depth, (16, 16, 32, 64), classes=10)


def test_published_student_fits(shared):
    path = shared("checkpoints/resnet20_cifar100_topkd.pth")
    network = MODELS["resnet20"].build(100)
    before = checkpoint.hash_of(network)
    checkpoint.fill(network.network, checkpoint.load_weights(path), path.name)
    assert checkpoint.hash_of(network) != before


@pytest.mark.slow
def test_published_student_reaches_its_published_accuracy(shared):
    path, root = shared("checkpoints/resnet20_cifar100_topkd.pth"), shared("data/cifar100")
    network = MODELS["resnet20"].build(100).eval()
    checkpoint.fill(network.network, checkpoint.load_weights(path), path.name)
    judged = evaluate.predict(network, cifar100(root=str(root)).test, torch.device("cpu"))
    assert evaluate.top_k(judged, 1) == pytest.approx(71.74, abs=0.03)
