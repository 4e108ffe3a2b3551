"""The places in a network that losses read mean what the papers say, or are refused."""

import pytest
import torch
import torch.nn.functional as F
from reference import map_loops as loops
from torch import nn

import topkd
from topkd.config import recipe
from topkd.features import FeatureExtractor, Teacher
from topkd.losses import AB, CATKD, CE, FSP, OFD, SRRL, SimKD
from topkd.models import MODELS, factory
from topkd.models.places import pooled_map, precede_relu
from topkd.models.reused import reuse
from topkd.training.trial import try_losses

TARGET = torch.arange(4)
# Foreign networks, the size of their images, and whether the classifier reads averages of a map.
POOLED = {
    "torchvision:mobilenet_v2": (64, True),
    "torchvision:swin_t": (64, True),
    "timm:test_efficientnet": (64, True),
    "timm:resnet10t": (64, True),
    "torchvision:densenet121": (64, False),  # a function applies its last ReLU
    "torchvision:alexnet": (64, False),  # three layers behind the last map
    "timm:convnext_atto": (64, False),  # normalizes the averages
    "timm:deit_tiny_patch16_224": (224, False),  # class token
    "torchvision:vit_b_32": (64, False),  # the same, and a new classifier is zero
}


def images(size=32, n=4):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def built(name, size=32, seed=0):
    """A network whose normalizations are not the identity."""
    torch.manual_seed(seed)
    network = factory.build(name, 10, size)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, mean=1.0, std=0.3)
            nn.init.normal_(module.bias, std=0.5)
    return network.eval()


def bound(student, teacher, loss, seen, /, **taps):
    """Binds a loss to two networks; returns it with the features of both."""
    term = loss.term(taps=taps) if taps else loss.term()
    distiller = topkd.Distiller(student, teacher, [term]).setup(seen)
    return distiller.student.eval()(seen), distiller.teacher(seen)


def class_averages(features, network):
    return features.logits - network.classifier.bias


# --- The map that the classifier averages --------------------------------------------------------


@pytest.mark.parametrize("name", ["wrn_16_2", "vgg8", "mobilenetv2", "shufflev1", "shufflev2"])
def test_class_maps_averaged_are_the_logits_without_the_bias(name):
    student, teacher, seen = built("resnet8"), built(name, seed=1), images()
    loss = CATKD(resolution=1)  # one position: its maps are the averages
    made, asked = bound(student, teacher, loss, seen)
    expected = F.mse_loss(class_averages(made, student), class_averages(asked, teacher))
    torch.testing.assert_close(loss(made, asked, None), expected)


def test_class_maps_of_a_wide_resnet_are_behind_the_last_relu():
    student, teacher, seen = built("wrn_16_1"), built("wrn_16_2", seed=1), images()
    maps = []
    for network in (student, teacher):
        body = network.network
        x = body.block3(body.block2(body.block1(body.conv1(seen))))
        last = body.bn1(x).relu()
        weight = network.classifier.weight[:, :, None, None]
        maps.append([loops.averaged(m, 2) for m in F.conv2d(last, weight).tolist()])
    loss = CATKD()
    found = loss(*bound(student, teacher, loss, seen), None)
    assert found.item() == pytest.approx(loops.mean_square(*maps), rel=1e-5)


@pytest.mark.parametrize("name", POOLED)
def test_foreign_networks_have_class_maps_or_are_refused(name):
    size, is_pooled = POOLED[name]
    student, teacher, seen = built("resnet8"), built(name, size), images(size)
    if not is_pooled:
        message = (
            r"^losses.cat: the averages of the teacher's last map differ from the input of its "
            r"classifier by \d+% \(\w+\); no module computes a map whose averages are this input"
        )
        if name == "torchvision:alexnet":
            message = "^losses.cat: the averages .* are 256 numbers, and the input of its classifie"
        with pytest.raises(ValueError, match=message):
            bound(student, teacher, CATKD(), seen)
        return
    loss = CATKD(resolution=1)
    made, asked = bound(student, teacher, loss, seen)
    expected = F.mse_loss(class_averages(made, student), class_averages(asked, teacher))
    torch.testing.assert_close(loss(made, asked, None), expected)


def test_a_selected_map_that_the_classifier_does_not_average_is_refused():
    message = (
        r"^losses.cat: the averages of the teacher's last map differ from the input of its "
        r"classifier by \d+% \(WideResNet\); select avgpool:in with the term's "
        r"taps.teacher.maps, or none$"
    )
    for tap, is_right in (("block3", False), ("avgpool:in", True), ("relu", True)):
        student, teacher, loss = built("resnet8"), built("wrn_16_1", seed=1), CATKD()
        if not is_right:
            with pytest.raises(ValueError, match=message):
                bound(student, teacher, loss, images(), teacher={"maps": (tap,)})
            continue
        bound(student, teacher, loss, images(), teacher={"maps": (tap,)})


def test_a_recipe_is_refused_before_its_teacher_is_trained():
    cat = {"name": "cat", "taps": {"teacher": {"maps": ["block3"]}}}
    tree = {
        "data": {"name": "cifar100"},
        "teacher": {"model": "wrn_16_1", "checkpoint": "not read here"},
        "student": {"model": "resnet8"},
        "losses": [{"name": "ce"}, cat],
    }
    with pytest.raises(ValueError, match=r"^losses\[1\]: the averages of the teacher's last map"):
        try_losses(recipe.parse(tree))
    tree["losses"][1] = {"name": "cat"}
    try_losses(recipe.parse(tree))


def test_a_search_leaves_the_network_as_it_was():
    network = built("wrn_16_1").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    assert pooled_map(network, images()) == ("avgpool:in", (8, 8))
    assert all(precede_relu(network, images(), lambda made: made.preactivations))
    assert network.network.training
    assert network.network.bn1.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    hooks = [hook for module in network.modules() for hook in module._forward_hooks.values()]
    assert {type(hook).__name__ for hook in hooks} == {"_Tap"}


# --- The teacher's classifier --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_2", "vgg8", "mobilenetv2", "shufflev2"])
def test_simkd_compares_with_the_map_that_the_teachers_classifier_averages(name):
    teacher, seen = Teacher(built(name)), images()
    student = reuse(built("resnet8", seed=1), teacher, seen)
    loss = SimKD()
    made, asked = bound(student, teacher, loss, seen)
    teacher.network.also(["avgpool:in"])
    last = teacher(seen).others["avgpool:in"]
    torch.testing.assert_close(teacher.network.head(last.mean((2, 3))), asked.logits)
    projected = made.maps[-1]
    pooled = F.adaptive_avg_pool2d(last, projected.shape[2])
    torch.testing.assert_close(loss(made, asked, None), F.mse_loss(projected, pooled))


def test_a_larger_map_of_the_student_is_pooled_before_the_projector():
    """As in the authors' code; the projector's ReLUs make the order matter."""
    teacher, seen = Teacher(built("vgg8")), images()
    student = reuse(built("resnet8", seed=1), teacher, seen).eval()
    last = built("resnet8", seed=1)(seen).maps[-1]
    assert (last.shape[2], teacher(seen).maps[-1].shape[2]) == (8, 4)
    project = student.network.projector
    made = student(seen).maps[-1]
    torch.testing.assert_close(made, project(F.adaptive_avg_pool2d(last, 4)))
    assert not torch.allclose(made, F.adaptive_avg_pool2d(project(last), 4), rtol=0.1)


def test_simkd_refuses_the_classifier_of_another_teacher():
    seen, first, second = images(), Teacher(built("resnet8")), Teacher(built("resnet8", seed=1))
    student = reuse(built("resnet8x0.25"), first, seen)
    message = r"^losses.simkd: the student's classifier is not that of this teacher: .* by \d+%"
    with pytest.raises(ValueError, match=message):
        bound(student, second, SimKD(), seen)


@pytest.mark.parametrize("name", ["timm:convnext_atto", "torchvision:densenet121"])
def test_a_teacher_whose_classifier_reads_no_averages_lends_it_to_no_student(name):
    with pytest.raises(ValueError, match="does not read the averages of any map of (Conv|Dense)"):
        reuse(built("resnet8"), Teacher(built(name, 64)), images(64))


def test_srrl_refuses_logits_that_are_not_those_of_the_classifier():
    network = nn.Sequential(*body(), nn.Linear(8, 10), nn.LogSoftmax(1))
    message = (
        r"^losses.srrl: the logits that the teacher's classifier computes from its embedding are "
        r"wrong by \d+% \(Sequential\); the embedding must be the input of the classifier"
    )
    with pytest.raises(ValueError, match=message):
        bound(built("resnet8"), network, SRRL(), images())
    bound(built("resnet8"), network[:-1], SRRL(), images())
    teacher, view = built("resnet8", seed=1), {"embedding": "layer3"}
    bound(built("resnet8"), teacher, SRRL(), images(), teacher=view)
    with pytest.raises(ValueError, match="from its embedding do not exist: it expects another"):
        bound(built("resnet8"), teacher, SRRL(), images(), teacher=view | {"embedding": "layer1"})


def body():
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), *pool


# --- Pre-activations -----------------------------------------------------------------------------


class Activated(nn.Module):
    """Two convolutions, each with a normalization and a function."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 8, 3, 2)
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(8)
        self.fc, self.function = nn.Linear(8, 10), function

    def forward(self, x):
        x = self.function(self.bn1(self.first(x)))
        return self.fc(self.function(self.bn2(self.second(x))).mean((2, 3)))


def activated(function, taps=("bn1", "bn2")):
    return FeatureExtractor(Activated(function), ["first", "second"], "fc", list(taps))


@pytest.mark.parametrize("loss", [AB, OFD])
@pytest.mark.parametrize("function", [F.relu, lambda x: x.clamp(min=0)])
def test_functions_are_relus_too(loss, function):
    bound(activated(F.gelu), activated(function), loss(skip=0), images())


@pytest.mark.parametrize("loss", [AB, OFD])
@pytest.mark.parametrize(
    ("function", "taps"),
    [(F.gelu, ("bn1", "bn2")), (F.relu6, ("bn1", "bn2")), (F.relu, ("bn1", "second"))],
)
def test_a_teacher_without_a_relu_behind_its_preactivations_is_refused(loss, function, taps):
    wrong = 1 if taps[1] == "second" else 0
    message = (
        rf"^losses.{loss.info.name}: pre-activation {wrong} of the teacher is not the input of a "
        rf"ReLU \({taps[wrong]} of Activated\); select inputs of ReLUs with the term's "
        r"taps.teacher.preactivations$"
    )
    teacher = activated(function, taps)
    with torch.no_grad():
        for name in ("bn1", "bn2"):
            teacher.network.get_submodule(name).weight.mul_(9)  # ReLU6 is a ReLU below 6
    with pytest.raises(ValueError, match=message):
        bound(activated(F.relu), teacher, loss(skip=0), images())


@pytest.mark.parametrize("loss", [AB, OFD])
def test_maps_behind_the_relu_are_refused_as_preactivations(loss):
    relus = {"preactivations": ("relu", "layer1", "layer2", "layer3")}
    for role in ("student", "teacher"):
        message = f"pre-activation 1 of the {role} has no negative values and is not the input of"
        with pytest.raises(ValueError, match=message):
            bound(built("resnet8"), built("resnet8", seed=1), loss(), images(), **{role: relus})


@pytest.mark.parametrize("loss", [AB, OFD])
def test_a_new_residual_block_that_is_the_identity_has_preactivations(loss):
    torch.manual_seed(0)
    student, teacher = (factory.build("timm:resnet10t", 10, 64) for _ in range(2))
    made = student.eval()(images(64)).preactivations
    assert (made[1] >= 0).all()  # the last normalization of each block is 0 at first
    bound(student, teacher, loss(), images(64))


# --- Pairs of maps -------------------------------------------------------------------------------


def test_maps_that_are_not_the_start_and_the_end_of_a_stage_are_refused():
    turned = {"maps": ("layer3", "layer2")}
    student, teacher = built("resnet8"), built("resnet14")
    message = "^losses.fsp: map 1 of the student is larger than the one before it, 16 x 16 after 8 "
    with pytest.raises(ValueError, match=message):
        bound(student, teacher, FSP(), images(), student=turned, teacher=turned)


def test_products_of_maps_of_another_size_are_refused():
    teacher = Teacher(built("resnet14"), size=64)
    message = "^losses.fsp: map 1 has 32 x 32 positions in the student and 64 x 64 in the teacher"
    with pytest.raises(ValueError, match=message):
        bound(built("resnet8"), teacher, FSP(), images())


# --- The pairs of the public benchmark -----------------------------------------------------------

PAIRS = [
    name
    for name in recipe.names()
    if name.startswith("cifar100/") and recipe.load(name).epochs == 240 and "teachers" not in name
]
LOSSES = {"cat": CATKD, "simkd": SimKD, "srrl": SRRL, "ofd": OFD, "ab": AB, "fsp": FSP}
CHANNELS = "fsp needs as many channels in the student as in the teacher, but map "
REFUSED = {
    ("cifar100/resnet32x4-shufflev1", "fsp"): CHANNELS + "0 has 24 and 32, map 1 has 240 and 64",
    ("cifar100/resnet32x4-shufflev2", "fsp"): CHANNELS + "0 has 24 and 32, map 1 has 116 and 64",
    ("cifar100/resnet50-mobilenetv2", "fsp"): CHANNELS + "0 has 16 and 64, map 1 has 12 and 256",
    ("cifar100/resnet50-vgg8", "fsp"): CHANNELS + "1 has 128 and 256, map 2 has 256 and 512",
    ("cifar100/vgg13-mobilenetv2", "fsp"): CHANNELS + "0 has 16 and 64, map 1 has 12 and 128",
    ("cifar100/wrn_40_2-shufflev1", "fsp"): CHANNELS + "0 has 24 and 16, map 1 has 240 and 32",
    ("cifar100/wrn_40_2-wrn_40_1", "fsp"): CHANNELS + "1 has 16 and 32, map 2 has 32 and 64",
}
"""Pairs that a loss refuses, and why; FSP matrices of other shapes have no distance."""


def test_every_refusal_is_of_a_pair_and_a_loss():
    assert len(PAIRS) == 13
    assert {pair for pair, _ in REFUSED} <= set(PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_pair_learns_by_every_loss_or_is_refused(name, loss):
    read, seen = recipe.load(name), images()
    torch.manual_seed(0)
    student, teacher = (MODELS[s.model].build(10) for s in (read.student, read.teacher))
    teacher = Teacher(teacher)
    if loss == "simkd":
        student = reuse(student, teacher, seen)
    terms = [LOSSES[loss]().term(), *([] if loss == "simkd" else [CE()])]
    distiller = topkd.Distiller(student, teacher, terms)
    if (name, loss) in REFUSED:
        with pytest.raises(ValueError, match=rf"^losses.{loss}: {REFUSED[name, loss]}"):
            distiller.setup(seen)
        return
    distiller.setup(seen).train()
    value = distiller(seen, TARGET).values[loss]
    assert value.isfinite()
    weights = [w for w in student.parameters() if w.requires_grad]
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    assert sum(g.norm() > 0 for g in gradients if g is not None) > len(weights) / 2
