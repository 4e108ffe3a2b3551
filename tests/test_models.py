"""The networks: sizes and keys of the public benchmark, taps, and how weights begin."""

import argparse
import math
import re

import pytest
import torch
from reference import networks
from reference.networks import FAMILIES, NETWORKS, family
from torch import nn

from topkd.data.sources.cifar import cifar100
from topkd.evaluation import metrics
from topkd.features import FeatureExtractor
from topkd.models import MODELS, checkpoint
from topkd.models.mobilenet import InvertedResidual
from topkd.models.resnet import ResNet
from topkd.models.shufflenet import HalvingBlock, ShuffleNetV2, SplitBlock
from topkd.models.vgg import VGG
from topkd.models.wide_resnet import WideResNet

HE = ("resnet", "resnet50", "wrn", "vgg", "mobilenetv2")  # the others begin as PyTorch's layers
PUBLISHED = [name for name, (count, *_) in NETWORKS.items() if count is not None]


def parameters(network):
    return sum(w.numel() for w in network.parameters())


def shake(network):
    """Gives the normalizations something to do."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.3)
            nn.init.normal_(layer.bias, std=0.3)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return network


@pytest.fixture(scope="module", params=NETWORKS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def network(name):
    torch.manual_seed(0)
    return shake(MODELS[name].build(10)).double().eval()


def images(name, side=16):
    return torch.randn(2, 3, *[64 if name == "mobilenetv1" else side] * 2).double()


# --- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters_is_that_of_the_benchmark(name):
    classes = 1000 if name == "mobilenetv1" else 100
    assert parameters(MODELS[name].build(classes)) == NETWORKS[name][0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet8x0.25", networks.resnet_parameters(8, (4, 4, 8, 16), 7)),
        ("resnet8", networks.resnet_parameters(8, (16, 16, 32, 64), 7)),
        ("resnet32x4", networks.resnet_parameters(32, (32, 64, 128, 256), 7)),
        ("mobilenetv2", networks.mobilenetv2_parameters(0.5, 7)),
        ("mobilenetv2_1_0", networks.mobilenetv2_parameters(1.0, 7)),
        ("shufflev2", networks.shufflev2_parameters((116, 232, 464, 1024), 7)),
        ("shufflev2_1_5", networks.shufflev2_parameters((176, 352, 704, 1024), 7)),
    ],
)
def test_number_of_parameters_is_the_sum_over_the_layers(name, expected):
    assert parameters(MODELS[name].build(7)) == expected


def test_taps_have_the_shapes_of_the_benchmark(name, network):
    _, maps, width = NETWORKS[name]
    side = 224 if name == "mobilenetv1" else 32
    with torch.no_grad():
        made = network(torch.randn(1, 3, side, side).double())
    expected = [(1, channels, size, size) for channels, size in maps]
    assert [tuple(m.shape) for m in made.maps] == expected
    assert [tuple(m.shape) for m in made.preactivations] == expected
    assert made.embedding.shape == (1, width)
    assert made.logits.shape == (1, 10)


def test_vgg_halves_larger_images_once_more():
    sides = {}
    for side in (32, 64):
        made = MODELS["vgg8"].build(10).eval()(torch.zeros(1, 3, side, side))
        sides[side] = [m.shape[-1] for m in made.maps]
    assert sides == {32: [32, 16, 8, 4, 4], 64: [64, 32, 16, 8, 4]}


@pytest.mark.parametrize(
    ("depth", "build", "message"),
    [(d, ResNet, r"ResNet is 6k \+ 2 \(8, 14, 20, ...\)") for d in (2, 9, 10, 19, 21, -4)]
    + [(d, WideResNet, r"wide ResNet is 6k \+ 4 \(10, 16, ...\)") for d in (4, 8, 20, 41, -2)]
    + [(d, VGG, "VGG is one of 8, 11, 13, 16, 19") for d in (0, 9, 12, 20)],
)
def test_impossible_depths_are_refused(depth, build, message):
    sizes = {ResNet: [(16, 16, 32, 64)], WideResNet: [2], VGG: []}[build]
    with pytest.raises(ValueError, match=f"^the depth of a {message}, got {depth}$"):
        build(depth, *sizes, classes=10)


def test_stages_without_halves_are_refused():
    with pytest.raises(ValueError, match=r"have even widths, got \(116, 231, 464, 1024\)"):
        ShuffleNetV2((116, 231, 464, 1024), classes=10)


# --- What they compute ---------------------------------------------------------------------------


def test_networks_compute_what_their_definitions_say(name, network):
    shown = images(name)
    plain = networks.COMPUTED[family(name)](networks.Weights(network.network.state_dict()), shown)
    with torch.no_grad():
        made = network(shown)
        again = network.head(made.embedding)
    torch.testing.assert_close((made.maps, made.embedding, made.logits), plain)
    torch.testing.assert_close(again, made.logits)
    assert isinstance(network.classifier, nn.Linear)  # losses read its weights


def test_preactivations_stand_before_the_relu(name, network):
    with torch.no_grad():
        made = network(images(name))
    pairs = list(zip(made.maps, made.preactivations, strict=True))
    if family(name) == "wrn":
        state = networks.Weights(network.network.state_dict())
        norms = ["block1.layer.0.bn1", "block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]
        for norm, (read, before) in zip(norms, pairs, strict=True):
            torch.testing.assert_close(before, state.norm(norm, read))
            assert (read < 0).any()
        torch.testing.assert_close(made.embedding, before.relu().mean((2, 3)))
    else:
        linear = pairs[1:] if family(name) == "mobilenetv2" else []
        for read, before in pairs[: len(pairs) - len(linear)]:
            assert torch.equal(read, before.relu())
            assert (before < 0).any()
        for read, before in linear:
            assert torch.equal(read, before)
            assert (read < 0).any()


def test_one_tap_reads_what_is_averaged_in_every_network(name, network):
    head = MODELS[name].taps["head"]
    last = {"wrn": "relu", "mobilenetv2": "conv2", "shufflev2": "relu2"}.get(family(name))
    maps = ["avgpool:in", last or MODELS[name].taps["maps"][-1]]
    with torch.no_grad():
        made = FeatureExtractor(network.network, maps, head)(images(name))
    torch.testing.assert_close(made.embedding, made.maps[0].mean((2, 3)))
    assert torch.equal(made.maps[0], made.maps[1])
    assert (made.maps[0] >= 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_is_reached_by_the_gradient(name):
    network = shake(MODELS[name].build(10)).double().eval()
    shown = images(name)
    (network(shown).logits * torch.randn(2, 10)).sum().backward()
    assert all(w.grad is not None and w.grad.norm() > 0 for w in network.parameters())


# --- The same of torchvision ---------------------------------------------------------------------


def renamed(state, *changes):
    """A state dict with other names; every change is a pattern and what stands for it."""
    for pattern, new in changes:
        state = {re.sub(pattern, new, key): tensor for key, tensor in state.items()}
    return state


def same_outputs(ours, theirs, channels, *changes):
    """Fills theirs with the weights of ours and compares what they compute."""
    ours = shake(ours).double().eval()
    theirs = theirs.double().eval()
    theirs.load_state_dict(renamed(ours.state_dict(), *changes))
    shown = torch.randn(2, channels, 16, 16).double().relu()
    torch.testing.assert_close(ours(shown), theirs(shown))


def test_resnets_are_those_of_torchvision_but_for_the_stem():
    from torchvision.models.resnet import BasicBlock, Bottleneck
    from torchvision.models.resnet import ResNet as Theirs

    theirs = Theirs(Bottleneck, [3, 4, 6, 3], num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    ours = MODELS["resnet50"].network(classes=10)
    same_outputs(ours, theirs, 3, ("shortcut", "downsample"), ("linear", "fc"))
    for block in MODELS["resnet8x4"].network(classes=10).layer2:
        down = nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))
        same_outputs(block, BasicBlock(64, 128, 2, down), 64)


@pytest.mark.parametrize("depth", [8, 11, 13, 16, 19])
def test_vggs_are_those_of_torchvision_but_for_the_last_pools(depth):
    from torchvision.models.vgg import cfgs, make_layers

    letter = {11: "A", 13: "B", 16: "D", 19: "E"}.get(depth)
    plan = cfgs[letter] if letter else [64, "M", 128, "M", 256, "M", 512, "M", 512, "M"]
    fourth = [place for place, layer in enumerate(plan) if layer == "M"][3]
    theirs = make_layers([*plan[:fourth], *plan[fourth + 1 : -1]], batch_norm=True)
    network = shake(MODELS[f"vgg{depth}"].build(10)).eval()
    weights = [w for key, w in network.network.state_dict().items() if "classifier" not in key]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), weights, strict=True)))
    shown = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(shown).maps[-1], theirs.eval()(shown))


@pytest.mark.parametrize(("channels", "stride"), [(12, 1), (12, 2), (16, 1)])
def test_inverted_residuals_are_those_of_torchvision(channels, stride):
    from torchvision.models.mobilenetv2 import InvertedResidual as Theirs

    ours, theirs = InvertedResidual(12, channels, stride, 6), Theirs(12, channels, stride, 6)
    places = [("0", "0.0"), ("1", "0.1"), ("3", "1.0"), ("4", "1.1"), ("6", "2"), ("7", "3")]
    changes = [(rf"^conv\.{old}\.", f"CONV.{new}.") for old, new in places]
    same_outputs(ours, theirs, 12, *changes, ("CONV", "conv"))


def test_blocks_of_shufflenetv2_are_those_of_torchvision():
    from torchvision.models.shufflenetv2 import InvertedResidual as Theirs

    branch = {1: "2.0", 2: "2.3", 3: "2.5"}
    split = [(rf"^(conv|bn){old}", rf"\g<1>branch{new}") for old, new in branch.items()]
    branch = {1: "1.0", 2: "1.2", 3: "2.0", 4: "2.3", 5: "2.5"}
    halving = [(rf"^(conv|bn){old}", rf"\g<1>branch{new}") for old, new in branch.items()]
    after = [  # a normalization stands one place behind its convolution
        (r"^bn(branch\d)\.(\d)", lambda found: f"{found[1]}.{int(found[2]) + 1}"),
        ("^conv", ""),
    ]
    same_outputs(SplitBlock(20), Theirs(20, 20, 1), 20, *split, *after)
    same_outputs(HalvingBlock(12, 20), Theirs(12, 20, 2), 12, *halving, *after)


# --- Names of weights, and weights of others -----------------------------------------------------


def test_keys_are_those_of_published_weights(name, network):
    pattern = rf"({networks.MODULES[family(name)]})\.{networks.TENSORS}"
    found = network.network.state_dict()
    assert [key for key in found if not re.fullmatch(pattern, key)] == []
    if name in networks.KEYS:
        assert found.keys() == networks.KEYS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_published_files_fill_networks(tmp_path, name):
    weights = shake(MODELS[name].network(classes=10)).state_dict()
    for key in [key for key in weights if "num_batches" in key]:
        del weights[key]
    options = argparse.Namespace(model=name, lr_decay_epochs=[150, 180, 210])
    path = tmp_path / "last.pth"
    wrapped = {f"module.{key}": tensor for key, tensor in weights.items()}
    torch.save({"opt": options, "model": wrapped, "optimizer": {"state": {}}}, path)
    network = MODELS[name].network(classes=10)
    checkpoint.fill(network, checkpoint.load_weights(path), path.name)
    assert all(torch.equal(network.state_dict()[key], w) for key, w in weights.items())


@pytest.mark.parametrize(
    ("saved", "built"),
    [("resnet8", "resnet14"), ("resnet14", "resnet8"), ("wrn_16_1", "wrn_40_1")]
    + [("vgg8", "vgg11"), ("resnet8", "resnet8x4"), ("wrn_16_1", "resnet14")]
    + [("shufflev1", "shufflev2"), ("mobilenetv2", "mobilenetv2_1_0")],
)
def test_weights_of_another_network_are_refused(saved, built):
    weights = MODELS[saved].network(classes=10).state_dict()
    network = MODELS[built].network(classes=10)
    with pytest.raises(ValueError, match=r"^teacher\.pth does not fit this network:\n  "):
        checkpoint.fill(network, weights, "teacher.pth")


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
    judged = metrics.predict(network, cifar100(root=str(root)).test, torch.device("cpu"))
    assert metrics.top_k(judged, 1) == pytest.approx(71.74, abs=0.03)


# --- How weights begin ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_convolutions_begin_as_in_the_benchmark(name):
    for layer in MODELS[name].network(classes=10).modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        weight, side = layer.weight.detach(), layer.kernel_size[0]
        spread = 6 * math.sqrt(2 / weight.numel())  # six standard errors of a normal's variance
        if family(name) in HE:
            expected = 2 / (side**2 * layer.out_channels)
        else:  # uniform, up to one over the root of what a channel reads
            expected = 1 / (3 * weight[0].numel())
            assert weight.abs().max() ** 2 <= 3 * expected * (1 + 1e-6)
        assert weight.var().item() == pytest.approx(expected, rel=spread)
        assert (layer.bias is not None) == (family(name) == "vgg")
        assert layer.bias is None or (layer.bias == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_classifiers_begin_as_in_the_benchmark(name):
    head = MODELS[name].build(100).classifier
    uniform = 1 / math.sqrt(3 * head.in_features)  # PyTorch's
    expected = 0.01 if family(name) in ("vgg", "mobilenetv2") else uniform
    assert head.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert (head.bias == 0).all() == (family(name) in ("vgg", "mobilenetv2", "wrn"))


@pytest.mark.parametrize("name", FAMILIES)
def test_normalizations_begin_as_the_identity(name):
    layers = MODELS[name].network(classes=10).modules()
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    assert norms
    assert all((layer.weight == 1).all() and (layer.bias == 0).all() for layer in norms)


def test_a_seed_fixes_the_weights():
    built = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        built.append(checkpoint.hash_of(MODELS["resnet8"].build(10)))
    assert built[0] == built[1] != built[2]


# --- The catalog -------------------------------------------------------------------------------


def test_the_catalog_has_every_network_and_tells_what_it_is():
    assert NETWORKS.keys() <= MODELS.keys()
    assert all(name == name.lower() for name in NETWORKS)
    told = [MODELS[name].about for name in NETWORKS]
    assert all(told)
    assert len(set(told)) == len(told)
