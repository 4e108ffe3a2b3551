"""MobileNets: version 2 for 32x32 images, as in the public benchmark, and version 1 for 224x224."""

from typing import Any

from torch import Tensor, nn

from topkd.models.initialization import kaiming_init_

STAGES_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks and stride; in the paper the stage of 24 channels has stride 2."""

TAPS_V2: dict[str, Any] = {
    "maps": ("conv1", "blocks.1", "blocks.2", "blocks.4", "blocks.6"),
    "preactivations": ("conv1.1", "blocks.1", "blocks.2", "blocks.4", "blocks.6"),
    "head": "classifier.0",
}
"""No ReLU follows a block, so maps and pre-activations are the same except for the stem. The map
whose averages the classifier reads is at the tap ``conv2``."""

BLOCKS_V1 = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)
"""Channels and stride."""

TAPS_V1: dict[str, Any] = {
    "maps": ("model.0", "model.3", "model.5", "model.11", "model.13"),
    "preactivations": ("model.0.1", "model.3.4", "model.5.4", "model.11.4", "model.13.4"),
    "head": "fc",
}
"""The stem and the last block of each resolution; pre-activations are batch normalizations."""


class InvertedResidual(nn.Module):
    """Inverted residual block: expansion, depthwise convolution and linear projection.

    It has a shortcut if input and output have the same shape.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * channels_in
        self.conv = nn.Sequential(
            *_convolution(channels_in, wide, side=1),
            *_convolution(wide, wide, stride=stride, groups=wide),
            *_convolution(wide, channels, side=1)[:-1],
        )
        self.has_shortcut = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    r"""MobileNetV2 for small images.

    The stem halves the resolution; the second stage does not. The first block has a 1x1
    convolution like all others, although its expansion is 1. Channels are
    :math:`\lfloor cw \rfloor` without rounding to multiples of 8; the last convolution has 1280,
    and more only above width 1. State-dict keys match the weights published by RepDistiller,
    mdistiller and TopKD.

    Args:
        width: Width multiplier; the public benchmark uses 0.5.
        classes: Number of classes.

    References:
        MobileNetV2: Inverted Residuals and Linear Bottlenecks (Sandler et al., CVPR 2018)
        https://arxiv.org/abs/1801.04381

    Examples:
        >>> import torch
        >>> network = MobileNetV2(0.5, classes=100)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 100])
        >>> sum(weight.numel() for weight in network.parameters())
        812836
    """

    def __init__(self, width: float, classes: int) -> None:
        super().__init__()
        channels, last = int(32 * width), int(1280 * max(1.0, width))
        self.conv1 = nn.Sequential(*_convolution(3, channels, stride=2))
        self.blocks = nn.ModuleList()
        for expansion, full, blocks, first in STAGES_V2:
            stage = nn.Sequential()
            for stride in (first, *[1] * (blocks - 1)):
                stage.append(InvertedResidual(channels, int(full * width), stride, expansion))
                channels = int(full * width)
            self.blocks.append(stage)
        self.conv2 = nn.Sequential(*_convolution(channels, last, side=1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        head = nn.Linear(last, classes)
        self.classifier = nn.Sequential(head)
        kaiming_init_(self)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        for stage in self.blocks:
            x = stage(x)
        return self.classifier(self.avgpool(self.conv2(x)).flatten(1))


class MobileNetV1(nn.Module):
    """MobileNetV1 for 224x224 images: the student of the public benchmark on ImageNet-1K.

    Initialization is PyTorch's default. State-dict keys match mdistiller's weights.

    Args:
        classes: Number of classes.

    References:
        MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications (Howard
        et al., 2017)
        https://arxiv.org/abs/1704.04861

    Examples:
        >>> import torch
        >>> network = MobileNetV1(classes=1000)
        >>> network(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 1000])
        >>> sum(weight.numel() for weight in network.parameters())
        4231976
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        channels = 32
        self.model = nn.Sequential(nn.Sequential(*_convolution(3, channels, stride=2)))
        for wider, stride in BLOCKS_V1:
            depthwise = _convolution(channels, channels, stride=stride, groups=channels)
            self.model.append(nn.Sequential(*depthwise, *_convolution(channels, wider, side=1)))
            channels = wider
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.model(images)).flatten(1))


def _convolution(
    channels_in: int, channels: int, *, side: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Builds a convolution with batch normalization and ReLU; the stride divides the resolution."""
    padding = side // 2
    convolution = nn.Conv2d(channels_in, channels, side, stride, padding, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
