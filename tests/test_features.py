"""Any network read through its modules, and teachers that stay as they are."""

import copy

import pytest
import torch
from torch import nn

from topkd.features import Batch, FeatureExtractor, Features, Teacher
from topkd.models import MODELS, checkpoint

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OTHER = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


@pytest.fixture(scope="module")
def resnet18():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return FeatureExtractor(
        resnet18(weights=None, num_classes=10), ["layer1", "layer4"], "fc"
    ).eval()


def images(n=2, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, side, side, generator=generator)


def small():
    return MODELS["resnet8x0.25"].build(10)


# --- FeatureExtractor ----------------------------------------------------------------------------


def test_a_network_of_torchvision_is_read_unchanged(resnet18):
    shown = images().to(memory_format=torch.channels_last)
    with torch.no_grad():
        made = resnet18(shown)
        assert torch.equal(made.logits, resnet18.network(shown))
    assert made.embedding.shape == (2, 512)
    assert [tuple(m.shape) for m in made.maps] == [(2, 64, 8, 8), (2, 512, 1, 1)]


def test_head_of_the_embedding_is_the_logits(resnet18):
    with torch.no_grad():
        made = resnet18(images())
        torch.testing.assert_close(resnet18.head(made.embedding), made.logits)


def test_head_is_not_noticed_by_the_taps(resnet18):
    with torch.no_grad():
        before = resnet18(images())
        resnet18.head(torch.zeros(7, 512))
        after = resnet18(images())
    assert torch.equal(before.embedding, after.embedding)


def test_weights_keep_their_names(resnet18):
    from torchvision.models import resnet18 as plain

    expected = plain(weights=None, num_classes=10).state_dict()
    assert resnet18.network.state_dict().keys() == expected.keys()
    assert len(list(resnet18.parameters())) == len(list(resnet18.network.parameters()))


@pytest.mark.parametrize("directly", [False, True])
def test_nothing_is_kept_of_a_batch(directly):
    network = small()
    (network.network if directly else network)(images())
    copy.deepcopy(network)  # which tensors in a graph would not allow
    assert not network._records


def test_nothing_is_kept_of_a_batch_that_failed():
    network = small()
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 5, 8, 8))
    copy.deepcopy(network)
    assert not network._records


class Moody(nn.Module):
    """Uses its first layer if told, and overwrites what it made of it if told."""

    def __init__(self, *, is_used=True, overwrites=False):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 10)
        self.is_used, self.overwrites = is_used, overwrites

    def forward(self, shown):
        made = self.first(shown) if self.is_used else shown[:, [0, 1, 2, 0]]
        made = made.relu_() if self.overwrites else made.relu()
        return self.head(made.mean((2, 3)))


def test_a_tap_that_was_not_used_is_told_whoever_used_it_before():
    network = FeatureExtractor(Moody(), ["first"], "head")
    network(images())
    network.network(images())
    network.network.is_used = False
    with pytest.raises(ValueError, match="did not use the module 'first' that a tap names"):
        network(images())


def test_a_tap_that_was_overwritten_is_told():
    network = FeatureExtractor(Moody(overwrites=True), ["first"], "head")
    with pytest.raises(ValueError, match="the tap 'first' read was overwritten later by an in-pl"):
        network(images())


def test_what_enters_a_relu_in_place_is_read():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Flatten(1), nn.Linear(4096, 5)
    )
    shown = images().to(memory_format=torch.channels_last)
    before, logits = network[0](shown), network(shown)
    made = FeatureExtractor(network, ["1"], "3", ["1:in"])(shown)
    assert torch.equal(made.preactivations[0], before)
    assert torch.equal(made.maps[0], before.relu())
    assert torch.equal(made.logits, logits)


def test_a_copy_is_read_elsewhere_and_leaves_layers_out():
    network = small().eval()
    network.also(["avgpool"])
    before = network(images())
    other = network.retapped(["layer2"], ["relu:in"], without=["layer3", "fc"])
    made = other(images())
    assert torch.equal(made.maps[0], before.maps[2])
    assert torch.equal(made.preactivations[0], before.preactivations[0])
    assert torch.equal(made.embedding, before.maps[2].mean((2, 3)))
    assert torch.equal(made.logits, made.embedding)
    assert made.others == {}
    for weight in other.parameters():
        weight.data.zero_()
    for seen, again in zip(before.tensors(), network(images()).tensors(), strict=True):
        assert torch.equal(seen, again)


def test_gradients_pass_through_what_is_tapped():
    network = small()
    made = network(images(4))
    (made.embedding.square().sum() + sum(m.square().sum() for m in made.maps)).backward()
    reached = {name for name, w in network.network.named_parameters() if w.grad is not None}
    assert reached == {name for name, _ in network.network.named_parameters()} - {
        "fc.weight",
        "fc.bias",
    }


def test_unknown_module_names_those_that_are_near(resnet18):
    with pytest.raises(ValueError, match=r"ResNet has no module 'layer5'; it has .*layer4"):
        FeatureExtractor(resnet18.network, ["layer5"], "fc")


def test_unknown_module_names_what_there_is(resnet18):
    message = "ResNet has no module 'zzz'; it has conv1, bn1, relu, maxpool, layer1, .* avgpool, fc"
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(resnet18.network, [], "zzz")


def test_embeddings_are_flat():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 10, 1), nn.Flatten()
    )
    made = FeatureExtractor(network, [], "2")(images())
    assert made.embedding.shape == (2, 4)
    assert made.maps == []


def test_a_copy_reads_itself():
    network = small().eval()
    other = copy.deepcopy(network)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
        expected, made = network(images()), other(images())
        again = network(images())
    assert all(torch.equal(a, b) for a, b in zip(expected.tensors(), again.tensors(), strict=True))
    assert all((t == 0).all() for t in made.tensors())


def test_features_apply_to_every_tensor():
    made = Features(
        torch.ones(2, 3), torch.ones(2, 4), [torch.ones(2, 1, 1, 1), torch.ones(2, 2, 1, 1)]
    )
    doubled = made.apply(lambda t: 2 * t)
    assert [tuple(t.shape) for t in doubled.tensors()] == [
        (2, 3),
        (2, 4),
        (2, 1, 1, 1),
        (2, 2, 1, 1),
    ]
    assert all((t == 2).all() for t in doubled.tensors())
    assert all((t == 1).all() for t in made.tensors())


def test_batches_cannot_be_changed():
    batch = Batch(images(), torch.zeros(2).long(), torch.arange(2))
    with pytest.raises(AttributeError):
        batch.target = torch.ones(2)


# --- Teacher -------------------------------------------------------------------------------------


def test_teacher_cannot_be_trained():
    network = small()
    before = checkpoint.hash_of(network)
    teacher = Teacher(network, *OTHER)
    holder = nn.ModuleDict({"teacher": teacher, "student": nn.Linear(2, 2)})
    holder.train()
    teacher.train()
    made = teacher(images(8, seed=1).requires_grad_())
    assert not any(module.training for module in teacher.network.modules())
    assert checkpoint.hash_of(network) == before  # running statistics and all
    assert not any(t.requires_grad for t in made.tensors())
    assert not any(w.requires_grad for w in network.parameters())


def test_teacher_is_in_no_checkpoint_and_no_optimizer():
    holder = nn.ModuleDict({"teacher": Teacher(small(), *OTHER), "student": nn.Linear(2, 2)})
    assert list(holder.state_dict()) == ["student.weight", "student.bias"]
    assert [name for name, _ in holder.named_parameters()] == ["student.weight", "student.bias"]


def test_teacher_answers_as_its_network_does():
    network = small().eval()
    with torch.no_grad():
        expected = network(images())
    made = Teacher(network, *OTHER)(images())
    assert all(torch.equal(a, b) for a, b in zip(made.tensors(), expected.tensors(), strict=True))


@pytest.mark.parametrize(("own", "seen"), [(IMAGENET, OTHER), (OTHER, IMAGENET)])
def test_teacher_sees_images_normalized_its_own_way(own, seen):
    network, pixels = small().double().eval(), torch.rand(2, 3, 32, 32).double()

    def normalized(mean, std):
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    teacher = Teacher(network, *own, *seen).double()
    with torch.no_grad():
        expected = network(normalized(*own))
    found = teacher(normalized(*seen))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(network(normalized(*seen)).logits, expected.logits, atol=1e-3)


def test_teacher_leaves_the_images_as_they_are():
    shown = images()
    before = shown.clone()
    Teacher(small(), *OTHER, *IMAGENET)(shown)
    assert torch.equal(shown, before)


def test_change_of_type_reaches_the_teacher():
    holder = nn.ModuleDict({"teacher": Teacher(small(), *OTHER, *IMAGENET)}).double()
    made = holder["teacher"](images().double())
    assert all(t.dtype == torch.float64 for t in made.tensors())


def test_change_of_layout_reaches_the_teacher():
    teacher = Teacher(small(), *OTHER, *IMAGENET).to(memory_format=torch.channels_last)
    expected = Teacher(teacher.network, *OTHER, *IMAGENET)(images())
    torch.testing.assert_close(teacher(images()).logits, expected.logits)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "shufflev2"])
def test_taps_are_compiled_in_one_graph(name):
    network = MODELS[name].build(10).eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for found, expected in zip(
            compiled(images).tensors(), network(images).tensors(), strict=True
        ):
            torch.testing.assert_close(found, expected)


def test_taps_are_read_in_inference_mode():
    with torch.inference_mode():
        assert MODELS["resnet8"].build(10).eval()(torch.zeros(1, 3, 8, 8)).logits.shape == (1, 10)
