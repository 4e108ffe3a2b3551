"""The networks of this package, by the name that recipes use."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from topkd.features import FeatureExtractor
from topkd.models import mobilenet, resnet, shufflenet, vgg, wide_resnet


@dataclass(frozen=True)
class Model:
    """A model: its constructor and its taps."""

    network: Callable[..., nn.Module]  # takes the number of classes
    taps: Mapping[str, Any]  # maps, preactivations and head, arguments of FeatureExtractor
    about: str = ""

    def build(self, classes: int) -> FeatureExtractor:
        """Builds an untrained network with its taps."""
        return FeatureExtractor(self.network(classes=classes), **self.taps)

    def create(self, classes: int) -> nn.Module:
        """Builds an untrained network that carries its taps as an attribute, for ``wrap``."""
        network = self.network(classes=classes)
        network.taps = dict(self.taps)  # type: ignore[assignment]  # no parameter, no module
        return network


def _resnet(depth: int, *widths: int) -> Model:
    """Describes a CIFAR ResNet by the widths of its stem and three stages."""
    about = f"CIFAR ResNet with {depth} layers, {widths[-1]}-dimensional embedding"
    return Model(partial(resnet.ResNet, depth, widths), resnet.taps(depth), about)


def _wide_resnet(depth: int, width: int) -> Model:
    about = f"wide ResNet with {depth} layers, {64 * width}-dimensional embedding"
    return Model(partial(wide_resnet.WideResNet, depth, width), wide_resnet.TAPS, about)


def _vgg(depth: int) -> Model:
    about = f"VGG of depth {depth} with batch normalization, 512-dimensional embedding"
    return Model(partial(vgg.VGG, depth), vgg.TAPS, about)


def _mobilenetv2(width: float) -> Model:
    about = f"MobileNetV2 of width {width} for 32x32 images, 1280-dimensional embedding"
    return Model(partial(mobilenet.MobileNetV2, width), mobilenet.TAPS_V2, about)


def _shufflev2(times: str, *widths: int) -> Model:
    about = f"ShuffleNetV2 {times} for 32x32 images, {widths[-1]}-dimensional embedding"
    return Model(partial(shufflenet.ShuffleNetV2, widths), shufflenet.TAPS, about)


MODELS: Mapping[str, Model] = {
    "resnet8x0.25": _resnet(8, 4, 4, 8, 16),
    "resnet8": _resnet(8, 16, 16, 32, 64),
    "resnet14": _resnet(14, 16, 16, 32, 64),
    "resnet20": _resnet(20, 16, 16, 32, 64),
    "resnet32": _resnet(32, 16, 16, 32, 64),
    "resnet44": _resnet(44, 16, 16, 32, 64),
    "resnet56": _resnet(56, 16, 16, 32, 64),
    "resnet110": _resnet(110, 16, 16, 32, 64),
    "resnet8x4": _resnet(8, 32, 64, 128, 256),
    "resnet32x4": _resnet(32, 32, 64, 128, 256),
    "resnet50": Model(
        resnet.ResNet50, resnet.taps_50(), "ResNet-50 for 32x32 images, 2048-dimensional embedding"
    ),
    "wrn_16_1": _wide_resnet(16, 1),
    "wrn_16_2": _wide_resnet(16, 2),
    "wrn_40_1": _wide_resnet(40, 1),
    "wrn_40_2": _wide_resnet(40, 2),
    "vgg8": _vgg(8),
    "vgg11": _vgg(11),
    "vgg13": _vgg(13),
    "vgg16": _vgg(16),
    "vgg19": _vgg(19),
    "mobilenetv2": _mobilenetv2(0.5),
    "mobilenetv2_1_0": _mobilenetv2(1.0),
    "shufflev1": Model(
        shufflenet.ShuffleNetV1,
        shufflenet.TAPS,
        "ShuffleNet with 3 groups for 32x32 images, 960-dimensional embedding",
    ),
    "shufflev2": _shufflev2("x1", 116, 232, 464, 1024),
    "shufflev2_1_5": _shufflev2("x1.5", 176, 352, 704, 1024),
    "mobilenetv1": Model(
        mobilenet.MobileNetV1,
        mobilenet.TAPS_V1,
        "MobileNetV1 for ImageNet, 1024-dimensional embedding",
    ),
}
"""Name -> model.

Every network has a module ``avgpool``; the tap ``avgpool:in`` reads the last feature map before
pooling.
"""
