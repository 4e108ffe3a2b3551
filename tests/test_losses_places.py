"""The places in a network that losses read mean what the papers say, or are refused."""

import pytest
import torch
import torch.nn.functional as F
from reference import map_loops as loops
from torch import nn

import topkd
from topkd.config import recipe
from topkd.losses import CATKD
from topkd.models import factory
from topkd.models.places import pooled_map
from topkd.training.trial import try_losses

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
    assert network.network.training
    assert network.network.bn1.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    hooks = [hook for module in network.modules() for hook in module._forward_hooks.values()]
    assert {type(hook).__name__ for hook in hooks} == {"_Tap"}
