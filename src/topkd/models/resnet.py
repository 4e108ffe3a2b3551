"""Residual networks for 32x32 images, as in the public distillation benchmark."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from topkd.models.initialization import kaiming_init_

BLOCKS_50 = (3, 4, 6, 3)
"""Blocks in each stage of :class:`ResNet50`."""


class BasicBlock(nn.Module):
    """Basic block: two 3x3 convolutions with a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()  # a module, so that a tap can read its input
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = _projection(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    r"""A residual network of three stages for small images.

    A network of depth :math:`6k + 2` has :math:`k` blocks of two convolutions in each stage. Its
    state-dict keys match the weights published by RepDistiller, mdistiller and TopKD.

    Args:
        depth: Number of layers with weights, 6k + 2.
        widths: Channels of the stem and of the three stages.
        classes: Number of classes.

    Raises:
        ValueError: If the depth is not of this form.

    References:
        Deep Residual Learning for Image Recognition (He et al., CVPR 2016)
        https://arxiv.org/abs/1512.03385

    Examples:
        >>> import torch
        >>> network = ResNet(20, (16, 16, 32, 64), classes=100)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 100])
        >>> sum(weight.numel() for weight in network.parameters())
        278324
    """

    def __init__(self, depth: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        blocks = _blocks(depth)
        stem, first, second, third = widths
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = _stage(stem, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, classes)
        kaiming_init_(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


class Bottleneck(nn.Module):
    """Bottleneck block: 1x1, 3x3 and 1x1 convolutions with a shortcut."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()  # a module, so that a tap can read its input
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != 4 * width:
            self.shortcut = _projection(channels_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet50(nn.Module):
    """ResNet-50 with a stem for small images.

    The stem is one 3x3 convolution of stride 1, without pooling. State-dict keys match the weights
    published by RepDistiller and mdistiller.

    Args:
        classes: Number of classes.

    References:
        Deep Residual Learning for Image Recognition (He et al., CVPR 2016)
        https://arxiv.org/abs/1512.03385

    Examples:
        >>> import torch
        >>> network = ResNet50(classes=100)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 100])
        >>> sum(weight.numel() for weight in network.parameters())
        23705252
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        first, second, third, fourth = BLOCKS_50
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _bottlenecks(64, 64, first, stride=1)
        self.layer2 = _bottlenecks(256, 128, second, stride=2)
        self.layer3 = _bottlenecks(512, 256, third, stride=2)
        self.layer4 = _bottlenecks(1024, 512, fourth, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(2048, classes)
        kaiming_init_(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.avgpool(x).flatten(1))


def taps(depth: int) -> dict[str, Any]:
    """Returns the taps of a :class:`ResNet` of this depth: its stem and three stages.

    Raises:
        ValueError: If the depth is not of this form.

    Examples:
        >>> taps(20)["preactivations"]
        ('relu:in', 'layer1.2.relu:in', 'layer2.2.relu:in', 'layer3.2.relu:in')
    """
    return _taps([_blocks(depth)] * 3, head="fc")


def taps_50() -> dict[str, Any]:
    """Returns the taps of a :class:`ResNet50`: its stem and four stages."""
    return _taps(BLOCKS_50, head="linear")


def _taps(blocks: Sequence[int], head: str) -> dict[str, Any]:
    stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
    last = [f"{stage}.{n - 1}.relu:in" for stage, n in zip(stages, blocks, strict=True)]
    return {
        "maps": ("relu", *stages),
        "preactivations": ("relu:in", *last),
        "head": head,
    }


def _blocks(depth: int) -> int:
    """Returns the number of blocks per stage."""
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise ValueError(f"the depth of a ResNet is 6k + 2 (8, 14, 20, ...), got {depth}")
    return blocks


def _projection(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    """Builds the projection of a shortcut between different sizes."""
    convolution = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _bottlenecks(channels_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(channels_in, width, stride)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))
