"""Networks of no known family: called as they can be, and read as they are found to compute."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel

from topkd._io.progress import Progress
from topkd.config import recipe
from topkd.features import FeatureExtractor
from topkd.models import checkpoint, factory
from topkd.models.found import taps_by_running
from topkd.training.experiment import Experiment

# As the public repositories for CIFAR have it, with shortcuts of option A and classes told by none.
RESNET = """
import torch.nn as nn
import torch.nn.functional as F


class LambdaLayer(nn.Module):
    def __init__(self, lambd):
        super().__init__()
        self.lambd = lambd

    def forward(self, x):
        return self.lambd(x)


class BasicBlock(nn.Module):
    def __init__(self, in_planes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            pad = (0, 0, 0, 0, planes // 4, planes // 4)
            self.shortcut = LambdaLayer(lambda x: F.pad(x[:, :, ::2, ::2], pad, "constant", 0))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self, block, num_blocks, num_classes=10):
        super().__init__()
        self.in_planes = 16
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._make_layer(block, 16, num_blocks[0], 1)
        self.layer2 = self._make_layer(block, 32, num_blocks[1], 2)
        self.layer3 = self._make_layer(block, 64, num_blocks[2], 2)
        self.linear = nn.Linear(64, num_classes)

    def _make_layer(self, block, planes, num_blocks, stride):
        layers = []
        for stride in [stride] + [1] * (num_blocks - 1):
            layers.append(block(self.in_planes, planes, stride))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


def resnet20():
    return ResNet(BasicBlock, [3, 3, 3])


def resnet8(num_classes=100):
    return ResNet(BasicBlock, [1, 1, 1], num_classes)


def resnet14(**kwargs):
    return ResNet(BasicBlock, [2, 2, 2], **kwargs)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with a module that is on no path."""
    (tmp_path / "cifar_resnet.py").write_text(RESNET, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    sys.modules.pop("cifar_resnet", None)


def wrapped(network):
    """The network as a part of another, so that its family is not seen."""

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network

        def forward(self, images):
            return self.net(images)

    return Mine()


def images(side, n=2):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


# --- What is found -------------------------------------------------------------------------------


def test_a_network_from_the_current_folder_is_found_and_read(here):
    network = factory.build("cifar_resnet:resnet20", 10, 32).eval()
    assert network.maps == ("layer1", "layer2", "layer3")
    assert network.found == (
        "taps of cifar_resnet:resnet20 were detected by running it: "
        "head linear, maps layer1, layer2, layer3"
    )
    made = network(images(32))
    assert [tuple(m.shape[1:]) for m in made.maps] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    torch.testing.assert_close(made.maps[-1].mean((2, 3)), made.embedding)
    torch.testing.assert_close(network.head(made.embedding), made.logits)
    assert factory.build("cifar_resnet:resnet8", 7, 32)(images(32)).logits.shape == (2, 7)
    assert factory.build("cifar_resnet:resnet14", 7, 32)(images(32)).logits.shape == (2, 7)
    assert str(here) == sys.path[-1]  # no file here is taken for a package that comes later


def test_what_one_gives_overrules_what_is_found(here):
    network = factory.build("cifar_resnet:resnet20", 10, 32, maps=["layer2"])
    assert network.maps == ("layer2",)
    network = factory.build("cifar_resnet:resnet20", 10, 32, maps=["layer2"], head="linear")
    assert network.found == ""


FAMILIES = {
    "resnet18": (64, 5, [(64, 32), (64, 16), (128, 8), (256, 4), (512, 2)]),
    "vgg11_bn": (32, 5, [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)]),
    "mobilenet_v2": (64, 5, [(16, 32), (24, 16), (32, 8), (96, 4), (1280, 2)]),
    "mobilenet_v3_small": (64, 5, [(16, 32), (16, 16), (24, 8), (48, 4), (576, 2)]),
    "densenet121": (64, 5, None),
    "vit_b_16": (32, 1, [(768, 2)]),
    "resnet50": (64, 5, [(64, 32), (256, 16), (512, 8), (1024, 4), (2048, 2)]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_found_is_what_the_family_has(name):
    from torchvision import models

    side, stages, shapes = FAMILIES[name]
    options = {"image_size": side} if name == "vit_b_16" else {}
    plain = models.get_model(name, num_classes=7, **options).eval()
    found = taps_by_running(wrapped(plain), (3, side, side))
    known = factory.build(f"torchvision:{name}", 7, side)
    assert f"net.{known._embedding}" == f"{found['head']}:in"
    network = FeatureExtractor(wrapped(plain), **found).eval()
    with torch.no_grad():
        made = network(images(side))
        torch.testing.assert_close(made.logits, plain(images(side)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(network.head(made.embedding), made.logits)
    if name in ("resnet18", "resnet50", "vgg11_bn"):
        assert tuple(f"net.{tap}" for tap in known.preactivations) == found["preactivations"]
    assert len(made.maps) == stages
    sides = [m.shape[-1] for m in made.maps]
    assert sides == sorted(set(sides), reverse=True)
    if shapes is not None:
        assert [tuple(m.shape[1:3]) for m in made.maps] == shapes


@pytest.mark.parametrize("name", ["seresnet18", "efficientnet_b0", "regnetx_002", "convnext_atto"])
def test_what_is_found_of_timm_is_its_head_and_its_last_map(name):
    timm = pytest.importorskip("timm")
    plain = timm.create_model(name, num_classes=7).eval()
    found = taps_by_running(wrapped(plain), (3, 64, 64))
    known = factory.build(f"timm:{name}", 7, 64).eval()
    assert f"net.{known._embedding}" == f"{found['head']}:in"
    made = FeatureExtractor(wrapped(plain), **found).eval()(images(64))
    sides = [m.shape[-1] for m in made.maps]
    assert sides == sorted(set(sides), reverse=True)
    assert sides[-1] == known(images(64)).maps[-1].shape[-1]


def layers(*end):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(inplace=True), *end)


POOLED = nn.AdaptiveAvgPool2d(1), nn.Flatten()
ENDS = {
    "a linear layer": ((*POOLED, nn.Linear(4, 7)), "4"),
    "a log-softmax": ((*POOLED, nn.Linear(4, 7), nn.LogSoftmax(1)), "4"),
    "a convolution": ((nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 7, 1), nn.Flatten()), "3"),
    "two linear layers": ((*POOLED, nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 7)), "6"),
    "layers of another kind": ((*POOLED, nn.LayerNorm(4)), "4"),
    "a softmax": ((*POOLED, nn.Linear(4, 7), nn.Softmax(1)), None),
    "a pool": ((nn.Conv2d(4, 7, 1), *POOLED), None),
}


@pytest.mark.parametrize(("end", "head"), ENDS.values(), ids=ENDS)
def test_the_head_is_what_the_network_answers_with(end, head):
    assert taps_by_running(layers(*end), (3, 8, 8)).get("head") == head


def test_a_trial_changes_nothing():
    torch.manual_seed(3)
    network = layers(nn.BatchNorm2d(4), nn.Dropout(), *POOLED, nn.Linear(4, 7)).train()
    network[2].eval()  # a layer that the user has frozen
    before = checkpoint.hash_of(network)
    state = torch.get_rng_state()
    taps_by_running(network, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert checkpoint.hash_of(network) == before
    assert [m.training for m in network] == [True, True, False, True, True, True, True]
    assert not any(module._forward_hooks for module in network.modules())


def test_what_is_overwritten_is_no_map():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
            self.head = nn.Linear(4, 7)

        def forward(self, shown):
            shown = torch.relu_(self.first(shown))
            return self.head(torch.relu(self.second(shown)).mean((2, 3)))

    assert taps_by_running(Overwriting(), (3, 16, 16)) == {
        "maps": ("second",),
        "preactivations": (),
        "head": "head",
    }


# --- Commands ------------------------------------------------------------------------------------


def pictures(folder, classes):
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in range(classes):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            for number in range(2):
                pixels = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")


def test_a_public_network_is_evaluated_by_its_name_alone(here, call):
    network = factory.build("cifar_resnet:resnet20", 10, 32).network
    torch.save({"state_dict": nn.DataParallel(network).state_dict()}, here / "resnet20.th")
    torch.save(AveragedModel(network).state_dict(), here / "swa.pth")
    pictures(here / "ten", 10)
    words = ("--model", "cifar_resnet:resnet20", "--data", "folder", "--root", "ten", "--json")
    status, out, err = call("evaluate", "resnet20.th", *words)
    assert status == 0, err
    assert "detected by running it: head linear, maps layer1, layer2, layer3" in err
    assert json.loads(out)["images"] == 20
    assert json.loads(call("evaluate", "swa.pth", *words)[1]) == json.loads(out)
    pictures(here / "three", 3)
    status, _, err = call("evaluate", "resnet20.th", *words[:-2], "three")
    message = "topkd: cifar_resnet:resnet20 returns 10 logits, folder three has 3 classes\n"
    assert (status, err) == (2, message)


def test_a_head_that_is_not_found_is_given(here, call):
    (here / "cifar_resnet.py").write_text(
        RESNET + "\n\ndef soft():\n    return nn.Sequential(resnet20(), nn.Softmax(1))\n",
        encoding="utf-8",
    )
    network = factory.build("cifar_resnet:soft", 10, 8, head="0.linear").network
    torch.save({"model_state_dict": network.state_dict()}, here / "soft.pth")
    words = ("evaluate", "soft.pth", "--model", "cifar_resnet:soft", "--data", "digits")
    status, _, err = call(*words)
    assert status == 2
    assert "no layer of cifar_resnet:soft returns its logits: give its head" in err
    status, out, err = call(*words, "--head", "0.linear")
    assert status == 0, err
    assert out.startswith("cifar_resnet:soft on the 540 test images of digits")


def test_a_size_that_a_network_cannot_take_is_told_with_the_network(here, call):
    (here / "cifar_resnet.py").write_text(
        RESNET + "\n\ndef flat():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n",
        encoding="utf-8",
    )
    (here / "own.yaml").write_text(
        yaml.safe_dump(TREE | {"student": {"model": "cifar_resnet:flat"}}), encoding="utf-8"
    )
    data = ("data.name=folder", "data.root=.", "data.size=64", "data.limit=null")
    status, _, err = call("check", "own.yaml", *data, "losses=[{name: ce}]", "controls={}")
    assert status == 2
    assert err.startswith("topkd: student: does not accept images of 64 px: mat1 and mat2 shapes")


TREE = {
    "name": "own",
    "data": {"name": "digits", "limit": 64},
    "student": {"model": "cifar_resnet:resnet8"},
    "losses": [{"name": "ce"}, {"name": "at"}, {"name": "fitnet"}, {"name": "vid"}],
    "controls": {"kd": [{"name": "ce"}, {"name": "kd"}]},
    "epochs": 1,
    "batch_size": 32,
}


def test_networks_of_ones_own_learn_by_their_maps(here, call):
    teacher = factory.build("cifar_resnet:resnet20", 10, 8).network
    torch.save({"net": teacher.state_dict(), "acc": torch.tensor([71.0, 90.0])}, here / "t.pth")
    tree = TREE | {"teacher": {"model": "cifar_resnet:resnet20", "checkpoint": "t.pth"}}
    (here / "own.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    status, out, err = call("check", "own.yaml")
    assert status == 0, err
    found = "head linear, maps layer1, layer2, layer3"
    assert f"resnet8 were detected by running it: {found}; student.head and" in out
    assert f"resnet20 were detected by running it: {found}; teacher.head and" in out
    status, out, err = call("student", "own.yaml")
    assert status == 0, err
    assert f"resnet8 were detected by running it: {found}; student.head and" in err
    status, _, err = call("evaluate", "runs/own/at+fitnet+vid/seed0", "--trust")
    assert status == 0, err


def test_a_student_gets_the_classifier_of_a_network_of_ones_own(here):
    teacher = factory.build("cifar_resnet:resnet20", 10, 8).network
    torch.save(teacher.state_dict(), here / "t.pth")
    tree = TREE | {
        "teacher": {"model": "cifar_resnet:resnet20", "checkpoint": "t.pth"},
        "student": {"model": "resnet8x0.25", "classifier": "teacher"},
        "losses": [{"name": "simkd"}],
        "controls": {},
    }
    student = Experiment(recipe.parse(tree), here, Progress(quiet=True)).new_student()
    assert torch.equal(student.classifier.weight.cpu(), teacher.linear.weight)


def test_data_sets_are_found_in_the_current_folder_too(here):
    from topkd.data import DATA

    (here / "my_pictures.py").write_text(
        "import torch\n\n\ndef few():\n"
        "    return [(torch.zeros(3, 8, 8), label) for label in (0, 1)]\n",
        encoding="utf-8",
    )
    data = DATA["dataset"](train="my_pictures:few", test="my_pictures:few", size=8)
    assert data.classes == ["0", "1"]
    sys.modules.pop("my_pictures")
