"""Networks of torchvision, timm and the user: their taps, and recipes that use them."""

import copy
import sys

import pytest
import torch
from torch import nn

from topkd._io.progress import Progress
from topkd._runtime.memory_format import formatted
from topkd.config import recipe
from topkd.config.validation import RecipeError
from topkd.data import Data, InMemory
from topkd.features import FeatureExtractor, Features, Teacher
from topkd.models import MODELS, checkpoint, factory
from topkd.models.feature_info import fold_tokens, taps_of
from topkd.training.evaluate import evaluate_file
from topkd.training.experiment import Experiment

QUIET = Progress(quiet=True)
CLASSES = 7
slow = pytest.mark.slow
# Channels of the stem and the stages, sides of their maps for images of 64 px, and the width of
# the embedding, all as the papers have them.
HALVED = (32, 16, 8, 4, 2)
PATCHED = (16, 16, 8, 4, 2)
MOBILE_V2 = ((16, 24, 32, 96, 1280), HALVED, 1280)
MOBILE_V3_SMALL = ((16, 16, 24, 48, 576), HALVED, 1024)
EFFICIENT = ((16, 24, 40, 112, 1280), HALVED, 1280)
BASIC = ((64, 64, 128, 256, 512), HALVED, 512)
BOTTLENECKS = ((64, 256, 512, 1024, 2048), HALVED, 2048)
REGNET_Y_400 = ((32, 48, 104, 208, 440), HALVED, 440)
DENSE = ((64, 256, 512, 1024, 1024), HALVED, 1024)
PLAIN = ((64, 128, 256, 512, 512), (64, 32, 16, 8, 4), 4096)
PYRAMID = ((96, 96, 192, 384, 768), PATCHED, 768)  # of ConvNeXt and Swin


def tokens(width, side=4):
    return ((width,) * 5, (side,) * 5, width)


NETWORKS = {
    "torchvision:resnet18": BASIC,
    "torchvision:resnet34": BASIC,
    "torchvision:resnet50": BOTTLENECKS,
    "torchvision:resnext50_32x4d": BOTTLENECKS,
    "torchvision:wide_resnet50_2": BOTTLENECKS,
    "torchvision:mobilenet_v2": MOBILE_V2,
    "torchvision:mobilenet_v3_small": MOBILE_V3_SMALL,
    "torchvision:mobilenet_v3_large": ((16, 24, 40, 112, 960), HALVED, 1280),
    "torchvision:mnasnet0_5": ((8, 16, 24, 48, 1280), HALVED, 1280),
    "torchvision:efficientnet_b0": EFFICIENT,
    "torchvision:efficientnet_v2_s": ((24, 48, 64, 160, 1280), HALVED, 1280),
    "torchvision:regnet_y_400mf": REGNET_Y_400,
    "torchvision:regnet_x_400mf": ((32, 32, 64, 160, 400), HALVED, 400),
    "torchvision:convnext_tiny": PYRAMID,
    "torchvision:densenet121": DENSE,
    "torchvision:shufflenet_v2_x0_5": ((24, 48, 96, 1024), (32, 8, 4, 2), 1024),
    "torchvision:googlenet": ((64, 192, 480, 832, 1024), HALVED, 1024),
    "torchvision:alexnet": ((64, 192, 256), (15, 7, 3), 4096),
    "torchvision:vgg11": PLAIN,
    "torchvision:vgg11_bn": PLAIN,
    "torchvision:vgg16_bn": PLAIN,
    "torchvision:swin_t": PYRAMID,
    "torchvision:swin_v2_t": PYRAMID,
    "torchvision:vit_b_16": tokens(768),
    "torchvision:vit_b_32": tokens(768, side=2),
    "timm:resnet18": BASIC,
    "timm:resnet50": BOTTLENECKS,
    "timm:seresnet18": BASIC,
    "timm:resnetv2_18": BASIC,
    "timm:mobilenetv2_100": MOBILE_V2,
    "timm:mobilenetv3_small_100": MOBILE_V3_SMALL,
    "timm:mobilenetv4_conv_small": ((32, 32, 64, 96, 960), HALVED, 1280),
    "timm:efficientnet_b0": EFFICIENT,
    "timm:tf_efficientnetv2_b0": ((16, 32, 48, 112, 1280), HALVED, 1280),
    "timm:regnety_004": REGNET_Y_400,
    "timm:regnetx_002": ((32, 24, 56, 152, 368), HALVED, 368),
    "timm:convnext_atto": ((40, 40, 80, 160, 320), PATCHED, 320),
    "timm:convnextv2_atto": ((40, 40, 80, 160, 320), PATCHED, 320),
    "timm:convnext_tiny": PYRAMID,
    "timm:densenet121": DENSE,
    "timm:vgg11_bn": PLAIN,
    "timm:dla46_c": ((16, 32, 64, 64, 128, 256), (64, 32, 16, 8, 4, 2), 256),
    "timm:vit_tiny_patch16_224": tokens(192),
    "timm:vit_small_patch16_224": tokens(384),
    "timm:vit_small_patch14_reg4_dinov2": tokens(384),
    "timm:vit_small_patch16_dinov3": tokens(384),
    "timm:deit_tiny_patch16_224": tokens(192),
    "timm:deit3_small_patch16_224": tokens(384),
    "timm:deit_tiny_distilled_patch16_224": tokens(192),
    "timm:cait_xxs24_224": tokens(192),
    "timm:gmlp_ti16_224": tokens(128),
    "timm:swin_tiny_patch4_window7_224": PYRAMID,
    "timm:swinv2_tiny_window8_256": PYRAMID,
    "timm:levit_128s": ((128, 128, 256, 384), (4, 4, 2, 1), 384),
    "timm:repvit_m0_9": ((48, 48, 96, 192, 384), PATCHED, 384),
}
QUICK = {  # one of each family
    "torchvision:resnet18",
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small",
    "torchvision:mnasnet0_5",
    "torchvision:efficientnet_b0",
    "torchvision:regnet_y_400mf",
    "torchvision:convnext_tiny",
    "torchvision:densenet121",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:vgg11_bn",
    "torchvision:swin_t",
    "timm:resnet18",
    "timm:resnetv2_18",
    "timm:mobilenetv2_100",
    "timm:mobilenetv3_small_100",
    "timm:efficientnet_b0",
    "timm:regnetx_002",
    "timm:convnext_atto",
    "timm:densenet121",
    "timm:dla46_c",
    "timm:vit_tiny_patch16_224",
    "timm:deit_tiny_patch16_224",
    "timm:deit_tiny_distilled_patch16_224",
    "timm:cait_xxs24_224",
    "timm:gmlp_ti16_224",
    "timm:swin_tiny_patch4_window7_224",
    "timm:levit_128s",
}
# The last map, pooled, is what their classifier reads.
POOLED = ("resne", "regnet", "mobilenet_v2", "mobilenetv2", "mnasnet", "efficientnet", "shufflenet")
RECTIFIED = ("resne", "regnet", "vgg", "alexnet")


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=[] if n in QUICK else slow) for n in NETWORKS]
)
def built(request):
    """A network, what it makes of two images, and the same with nothing done in place."""
    torch.manual_seed(0)
    network = factory.build(request.param, CLASSES, 64).eval()
    other = copy.deepcopy(network)
    for module in other.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    with torch.no_grad():
        plain = other(images())
    return request.param, network, network(images()), plain


def images(n=2, side=64):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def of(name, families):
    return any(family in name.split(":")[1] for family in families)


def test_stages_are_those_of_the_paper(built):
    name, _, made, _ = built
    channels, sides, width = NETWORKS[name]
    assert [tuple(m.shape) for m in made.maps] == [
        (2, c, side, side) for c, side in zip(channels, sides, strict=True)
    ]
    assert made.embedding.shape == (2, width)
    assert made.logits.shape == (2, CLASSES)


def test_the_embedding_is_what_the_classifier_reads(built):
    _, network, made, _ = built
    if made.distilled is None:
        expected = made.logits
    else:  # the logits are the mean of those of two heads
        expected = 2 * made.logits - made.distilled
    torch.testing.assert_close(network.head(made.embedding), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        shown = formatted(images(), network.memory_format)
        torch.testing.assert_close(network.network(shown), made.logits)


def test_the_last_map_is_what_is_pooled(built):
    name, _, made, _ = built
    if not of(name, POOLED) or "resnetv2" in name:
        pytest.skip("it computes more between its last stage and its classifier")
    torch.testing.assert_close(made.maps[-1].mean((2, 3)), made.embedding)


def test_preactivations_are_maps_before_their_relu(built):
    name, _, made, _ = built
    if not of(name, RECTIFIED) or "resnetv2" in name:
        assert made.preactivations == []
        return
    assert (made.preactivations[0] < 0).any()
    for seen, before in zip(made.maps, made.preactivations, strict=True):
        torch.testing.assert_close(seen, before.relu())


def test_maps_are_the_same_when_nothing_is_done_in_place(built):
    _, _, made, expected = built
    for seen, again in zip(made.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(seen, again)


def test_every_weight_is_reached_through_maps_and_logits(built):
    _, network, made, _ = built
    total = made.logits.square().sum() + sum(m.square().mean() for m in made.maps)
    weights = dict(network.named_parameters())
    grads = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    unreached = [name for name, grad in zip(weights, grads, strict=True) if grad is None]
    # Masks for hidden patches in timm's Eva, which are for its pre-training alone.
    assert [name for name in unreached if "mask_token" not in name] == []


# --- layout of maps ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("vit_tiny_patch16_224", [2, 5, 8, 11]),
        ("deit_tiny_distilled_patch16_224", [2, 5, 8, 11]),
        ("test_vit4", [0, 1, 2, 3, 4, 5]),
        ("swin_tiny_patch4_window7_224", [0, 1, 2, 3]),
        ("convnext_atto", [0, 1, 2, 3]),
    ],
)
def test_maps_are_those_that_timm_itself_lays_out(name, stages):
    network = factory.build(f"timm:{name}", CLASSES, 64).eval()
    assert len(network.maps) == 5 or name == "test_vit4"
    blocks = [tap for tap in network.maps if not tap.startswith(("patch_embed", "stem"))]
    with torch.no_grad():
        expected = network.network.forward_intermediates(
            images(), indices=stages, output_fmt="NCHW", intermediates_only=True
        )
        made = network(images())
    assert len(blocks) in (4, len(stages))
    for seen, known in zip(made.maps[-len(blocks) :], expected[-len(blocks) :], strict=True):
        torch.testing.assert_close(seen, known)


def test_tokens_are_laid_out_row_by_row():
    network = factory.build("timm:vit_tiny_patch16_224", CLASSES, 64).eval().network
    patches = network.patch_embed.proj(images())
    embedded = network.patch_embed(images())  # the same as a sequence
    torch.testing.assert_close(fold_tokens(embedded, prefix=1), patches)
    with_others = torch.cat([torch.zeros(2, 5, 192), embedded], dim=1)
    torch.testing.assert_close(fold_tokens(with_others, prefix=5), patches)


def test_tokens_that_make_no_square_are_refused():
    message = "18 tokens, of which 1 come before the image's, do not form a square map"
    with pytest.raises(ValueError, match=message):
        fold_tokens(torch.zeros(2, 18, 4), prefix=1)


def test_terms_get_maps_from_taps_of_their_own():
    network = factory.build("timm:vit_tiny_patch16_224", CLASSES, 64).eval()
    network.also(["blocks.0", "norm"])
    made = network(images())
    assert [tuple(made.others[tap].shape) for tap in ("blocks.0", "norm")] == [(2, 192, 4, 4)] * 2


def test_a_network_of_no_family_says_how_its_tokens_lie():
    class Patches(nn.Module):
        num_prefix_tokens = 2

        def __init__(self):
            super().__init__()
            self.patches, self.block = nn.Conv2d(3, 6, 16, 16), nn.Linear(6, 6)
            self.head = nn.Linear(6, CLASSES)

        def forward(self, shown):
            sequence = self.patches(shown).flatten(2).mT
            sequence = self.block(torch.cat([sequence[:, :2], sequence], dim=1))
            return self.head(sequence[:, 0])

    network = Patches()
    made = FeatureExtractor(network, ["block"], "head", **taps_of(network))(images())
    expected = network.block(network.patches(images()).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(made.maps[0], expected)


# --- two heads -----------------------------------------------------------------------------------


def test_in_training_the_heads_answer_one_by_one():
    network = factory.build("timm:deit_tiny_distilled_patch16_224", CLASSES, 32)
    plain = network.network
    with torch.no_grad():
        trained, judged = network.train()(images(2, 32)), network.eval()(images(2, 32))
        sequence = plain.forward_features(images(2, 32))
    of_class, of_teacher = plain.head(sequence[:, 0]), plain.head_dist(sequence[:, 1])
    torch.testing.assert_close(trained.logits, of_class)
    torch.testing.assert_close(trained.distilled, of_teacher)
    torch.testing.assert_close(judged.logits, (of_class + of_teacher) / 2)
    torch.testing.assert_close(judged.distilled, of_teacher)


def test_a_pair_is_read_as_two_heads():
    class Pair(nn.Linear):
        def forward(self, shown):
            return super().forward(shown), shown

    network = FeatureExtractor(nn.Sequential(nn.Flatten(), Pair(12, 5)), [], "1")
    made = network(images(2, 2))
    torch.testing.assert_close(made.distilled, images(2, 2).flatten(1))
    assert made.apply(lambda t: 2 * t).distilled.equal(2 * made.distilled)
    assert made.tensors()[-1] is made.distilled


def test_what_is_no_logits_is_refused():
    class Many(nn.Linear):
        def forward(self, shown):
            return super().forward(shown), shown, None

    network = FeatureExtractor(nn.Sequential(nn.Flatten(), Many(12, 5)), [], "0")
    with pytest.raises(ValueError, match=r"Sequential returns 3 values \(Tensor, Tensor, No"):
        network(images(2, 2))


def test_a_tap_that_reads_no_tensor_is_refused():
    network = FeatureExtractor(nn.Sequential(nn.LSTM(4, 5)), ["0"], "0")
    with pytest.raises(ValueError, match="the tap '0' reads 2 values .* where a tensor is needed"):
        network(torch.zeros(3, 2, 4))


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "torchvision:vit_b_32"])
def test_images_of_another_size_than_a_transformer_is_built_for_are_told(name):
    network = factory.build(name, CLASSES, 64).eval()
    with pytest.raises(
        ValueError, match=r"^VisionTransformer does not accept images of 3 x 32 x 32: .*64"
    ):
        network(images(2, 32))


# --- names ---------------------------------------------------------------------------------------


def test_our_own_names_come_first():
    assert factory.find("resnet20") is MODELS["resnet20"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet9", "there is no 'resnet9'; did you mean resnet.*torchvision:NAME, timm:NAME or"),
        ("torchvision:resnet35", "no 'torchvision:resnet35'; did you mean .*resnet34,"),
        ("torchvision:resnet50.V1", "resnet50 has no weights 'V1'; it has IMAGENET1K_V1, IMAGENET"),
        (
            "timm:vit_tiny_patch16_225",
            "no 'timm:vit_tiny_patch16_225'; did you mean vit_tiny_patch",
        ),
        ("timm:resnet18.b1", "timm:resnet18 has no weights 'b1'; it has .*a1_in1k"),
        (
            "absent_package:build",
            "there is no module 'absent_package'; is it installed, in the current folder",
        ),
        (
            "broken_module:build",
            "broken_module cannot be imported: No module named 'absent_needed'",
        ),
        ("own_module:built", "own_module has no callable 'built'; did you mean build"),
        ("own_module:number", "own_module has no callable 'number'"),
        ("own_module:needs_more", "own_module:needs_more needs block, depth, but is called with"),
        ("wrong_module:build", "wrong_module:build: wrong_module cannot be imported: .*line 1"),
    ],
)
def test_names_that_are_wrong_are_told(own_module, name, message):
    with pytest.raises(ValueError, match=message):
        factory.find(name)


def test_a_missing_package_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm, which is not installed: pip install 'topkd\[mod"):
        factory.find("timm:resnet18")


OWN = """
import torch
from torch import nn

number = 3

class Small(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.head = nn.Linear(6, classes)

    def forward(self, images):
        return self.head(self.last(self.first(images).relu()).relu().mean((2, 3)))

def build(classes):
    return Small(classes)

def sized(classes, size=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes))

def takes_nothing():
    return Small(10)

def needs_more(block, depth, classes):
    return Small(classes)

def makes_nothing(classes):
    return classes

class Hidden(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.last = nn.Linear(12, classes)

    def forward(self, images):
        return self.last(images[:, :, :2, :2].flatten(1)).sigmoid()

def sized_alone(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 100 * 100, classes))
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "wrong_module.py").write_text("def build(:\n", encoding="utf-8")
    (tmp_path / "broken_module.py").write_text("import absent_needed\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_module", None)


def test_networks_of_ones_own_are_read_where_one_says(own_module):
    taps = {"maps": ["first", "last"], "head": "head"}
    made = factory.build("own_module:build", 5, **taps)(images(2, 8))
    assert [tuple(m.shape) for m in made.maps] == [(2, 4, 4, 4), (2, 6, 2, 2)]
    assert made.logits.shape == (2, 5)
    made = factory.build("own_module:sized", 5, 16, head="1")(images(2, 16))
    assert made.embedding.shape == (2, 3 * 16 * 16)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("own_module:Hidden", {}, "no layer of .* returns its logits: give its head, .* it has"),
        (
            "own_module:sized_alone",
            {},
            "accepts images of no common size, .* give its head and",
        ),
        (
            "own_module:makes_nothing",
            {},
            "own_module:makes_nothing returned int, not a torch.nn",
        ),
        ("own_module:build", {"head": "heat"}, "Small has no module 'heat'; it has head"),
        ("own_module:build", {"pretrained": True}, "'own_module:build' has no published weights"),
        ("resnet20", {"pretrained": True}, "'resnet20' has no published weights"),
        ("timm:test_vit", {"maps": ["blocks.9"]}, "VisionTransformer has no module 'blocks.9'; it"),
    ],
)
def test_networks_that_cannot_be_read_are_told(own_module, name, options, message):
    with pytest.raises(ValueError, match=message):
        factory.build(name, 5, **options)


def test_taps_of_ones_own_replace_those_of_the_family():
    network = factory.build("resnet20", 5, maps=["layer1"])
    assert network.maps == ("layer1",)
    assert network.preactivations == ()  # those of the family belong to other maps
    network = factory.build("torchvision:resnet18", 5, preactivations=["layer4.1.relu:in"])
    assert network.maps == ("relu", "layer1", "layer2", "layer3", "layer4")
    assert network.preactivations == ("layer4.1.relu:in",)


def test_a_subclass_is_read_as_its_family():
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    class Mine(ResNet):
        pass

    assert taps_of(Mine(BasicBlock, [1, 1, 1, 1]))["preactivations"][1] == "layer1.0.relu:in"


# --- weights of others ---------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch):
    """Stands in for the network: what would be downloaded is a state dict made here."""
    import torchvision.models._api
    from timm.models import _builder

    state, safe = {}, set()

    def load(where, **options):
        if options.get("weights_only"):
            safe.add(where)
        assert where in safe  # was read first as a file that must hold no code
        return dict(state)

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", load)
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", load)
    return state


@pytest.mark.parametrize(
    ("name", "head"),
    [("torchvision:mobilenet_v3_small", "classifier.3"), ("timm:test_vit", "head")],
)
def test_published_weights_get_a_new_head_for_other_classes(published, name, head):
    published.update(factory.build(name, 1000).network.state_dict())
    whole = factory.build(name, 1000, pretrained=True).network.state_dict()
    assert all(torch.equal(tensor, published[key]) for key, tensor in whole.items())
    other = factory.build(name, CLASSES, pretrained=True)
    assert other.classifier.out_features == CLASSES
    for key, tensor in other.network.state_dict().items():
        assert key.startswith(f"{head}.") or torch.equal(tensor, published[key]), key


@pytest.mark.slow
def test_position_embeddings_are_interpolated(published):
    published.update(factory.build("torchvision:vit_b_16", 1000).network.state_dict())
    network = factory.build("torchvision:vit_b_16", CLASSES, 64, pretrained=True).eval()
    assert network(images()).maps[-1].shape == (2, 768, 4, 4)
    found = network.network.encoder.pos_embedding
    expected = published["encoder.pos_embedding"]
    assert torch.equal(found[:, 0], expected[:, 0])  # of the class token
    as_map = expected[:, 1:].mT.unflatten(2, (14, 14))
    as_map = nn.functional.interpolate(as_map, (4, 4), mode="bicubic", align_corners=True)
    torch.testing.assert_close(found[:, 1:].mT.unflatten(2, (4, 4)), as_map)


def test_published_weights_say_what_they_were_made_with():
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    told = factory.published("torchvision:resnet50.IMAGENET1K_V1")
    assert told == factory.Published(1000, 224, *imagenet)
    assert factory.published("timm:test_vit") == factory.Published(
        1000, 160, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    )


# --- teachers of another size --------------------------------------------------------------------


def test_a_teacher_sees_images_of_its_own_size():
    seen = []

    class Watching(nn.Module):
        def forward(self, shown):
            seen.append(shown)
            return shown.mean((2, 3))

    network = FeatureExtractor(nn.Sequential(Watching(), nn.Linear(3, 5)), [], "1")
    half = (0.5,) * 3
    teacher = Teacher(network, half, half, (0.0,) * 3, (1.0,) * 3, size=4)
    # A picture of two colors, each of which fills whole pixels of the smaller one.
    shown = torch.zeros(1, 3, 8, 8)
    shown[..., 4:] = 1.0
    teacher(shown)
    assert seen[0].shape == (1, 3, 4, 4)
    torch.testing.assert_close(seen[0][..., 0], torch.full((1, 3, 4), -1.0))
    torch.testing.assert_close(seen[0][..., 3], torch.full((1, 3, 4), 1.0))
    torch.testing.assert_close(seen[0].mean(), torch.tensor(0.0))  # no pixel was left out
    teacher(shown[..., :4, :4])
    assert seen[1].shape == (1, 3, 4, 4)


# --- recipes -------------------------------------------------------------------------------------

TREE = {
    "name": "foreign",
    "data": {"name": "digits", "limit": 64},
    "losses": [{"name": "ce"}, {"name": "kd"}],
    "epochs": 1,
    "batch_size": 32,
}


def noise_of(side):
    pixels = torch.randint(0, 256, (96, side, side, 3), dtype=torch.uint8)
    statistics = ((0.5,) * 3, (0.25,) * 3)
    train, test = (
        InMemory(pixels[part], torch.arange(96)[part] % 10, *statistics, padding=1, flip=False)
        for part in (slice(64), slice(64, None))
    )
    return Data("noise", train, test, [str(c) for c in range(10)], *statistics)


def test_a_recipe_of_foreign_networks_is_carried_out(own_module, tmp_path, published):
    published.update(factory.build("timm:test_vit", 10).network.state_dict())
    weights = tmp_path / "teacher.safetensors"
    checkpoint.save_weights(weights, factory.build("timm:test_vit", 10, 32).network, {})
    tree = TREE | {
        "student": {"model": "own_module:build", "maps": ["last"], "head": "head"},
        "teacher": {"model": "timm:test_vit", "checkpoint": str(weights), "size": 32},
    }
    experiment = Experiment(recipe.parse(tree), tmp_path, QUIET)
    result = experiment.train_student(0)
    assert experiment.teacher.network.network.patch_embed.img_size == (32, 32)
    folder = tmp_path / "foreign/kd/seed0"
    about = checkpoint.read_about(folder / "student.safetensors")
    assert about["size"] == 8
    assert about["taps"] == {"maps": ["last"], "head": "head"}
    again = evaluate_file(folder, None, (), QUIET, trust=True)
    assert again["top1"] == pytest.approx(result["last"]["top1"])


def test_a_transformer_is_built_for_the_images_and_evaluated_again(tmp_path, monkeypatch):
    larger = noise_of(32)
    for module in ("experiment", "evaluate"):
        name = f"topkd.training.{module}.load_data"
        monkeypatch.setattr(name, lambda section, given=None: larger)
    tree = TREE | {"student": {"model": "timm:test_vit"}, "losses": [{"name": "ce"}]}
    experiment = Experiment(recipe.parse(tree), tmp_path, QUIET)
    result = experiment.train_student(0)
    folder = tmp_path / "foreign/ce/seed0"
    weights = checkpoint.load_weights(folder / "student.safetensors")
    assert weights["pos_embed"].shape[1] == 1 + (32 // 16) ** 2
    again = evaluate_file(folder, None, (), QUIET)
    assert again["top1"] == pytest.approx(result["last"]["top1"])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"student": {"model": "torchvision:resnet81"}},
            "student.model: there is no 'torchvision:resnet81'; did you mean",
        ),
        (
            {"student": {"model": "torchvision:resnet18", "maps": ["layer9"]}},
            "student: ResNet has no module 'layer9'; it has",
        ),
        (
            {"student": {"model": "resnet8", "pretrained": True}},
            "student: 'resnet8' has no published weights",
        ),
        (
            {"teacher": {"model": "torchvision:resnet18", "pretrained": True, "checkpoint": "a"}},
            "teacher: pretrained excludes checkpoint and recipe; set only one of them",
        ),
        ({"teacher": {"model": "torchvision:resnet18"}}, "teacher: needs a checkpoint"),
        (
            {"teacher": {"model": "resnet8", "checkpoint": "a", "size": 0}},
            "teacher.size: expected greater than 0, got 0",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused_before_any_work(tmp_path, section, message):
    tree = TREE | {"student": {"model": "resnet8"}} | section
    with pytest.raises(RecipeError, match=message):
        Experiment(recipe.parse(tree | {"losses": [{"name": "ce"}]}), tmp_path, QUIET)
    assert not list(tmp_path.iterdir())


def test_a_pretrained_teacher_must_know_the_classes_and_the_size(tmp_path, monkeypatch, published):
    teacher = {"model": "timm:test_vit", "pretrained": True}
    tree = TREE | {"student": {"model": "resnet8x0.25"}, "teacher": teacher}
    message = "timm:test_vit has 1000 classes, digits has 10; train it on them"
    with pytest.raises(RecipeError, match=f"teacher.pretrained: {message}"):
        _ = Experiment(recipe.parse(tree), tmp_path, QUIET).teacher

    half = (0.5,) * 3
    monkeypatch.setattr(factory, "published", lambda name: factory.Published(10, 160, half, half))
    message = "timm:test_vit was trained on images of 160 px, digits has 8; set teacher.size"
    with pytest.raises(RecipeError, match=f"teacher.size: {message}"):
        _ = Experiment(recipe.parse(tree), tmp_path, QUIET).teacher

    published.update(factory.build("timm:test_vit", 10).network.state_dict())
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda network, **options: None)
    tree["teacher"] = teacher | {"size": 160}
    experiment = Experiment(recipe.parse(tree | {"name": "sized"}), tmp_path, QUIET)
    shown = experiment.data.test.read(torch.arange(2), None)
    raw = shown * experiment.data.std[0] + experiment.data.mean[0]
    larger = nn.functional.interpolate((raw - 0.5) / 0.5, (160, 160), mode="bilinear")
    made = experiment.teacher(shown)
    assert isinstance(made, Features)
    torch.testing.assert_close(
        made.logits, experiment.teacher.network(larger).logits, rtol=1e-4, atol=1e-5
    )
