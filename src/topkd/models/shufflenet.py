"""ShuffleNet V1 and V2 for 32x32 images, as in the public distillation benchmark."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = (4, 8, 4)
"""Blocks in each stage, of both versions."""

TAPS: dict[str, Any] = {
    "maps": ("relu", "layer1", "layer2", "layer3"),
    "preactivations": ("relu:in", "layer1.3.relu:in", "layer2.7.relu:in", "layer3.3.relu:in"),
    "head": "linear",
}
"""Taps of both versions. The last map before pooling is at the tap ``layer3`` in version 1, and at
``relu2`` in version 2, which has one more convolution."""

GROUPS = 3
"""Groups of the 1x1 convolutions of version 1."""


class GroupedBlock(nn.Module):
    """Block of version 1: a depthwise convolution between grouped 1x1 convolutions.

    With stride 2, the average-pooled input is concatenated to the output; otherwise, the input is
    added.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        computed = channels - channels_in if stride == 2 else channels
        middle = computed // 4
        # The stem has too few channels for groups.
        self.groups = GROUPS if channels_in > 24 else 1
        self.conv1 = nn.Conv2d(channels_in, middle, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, computed, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(computed)
        self.relu = nn.ReLU()  # a module, so that a tap can read its input

    def forward(self, x: Tensor) -> Tensor:
        made = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        made = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(made)))))
        if self.stride == 2:
            return self.relu(torch.cat([made, F.avg_pool2d(x, 3, stride=2, padding=1)], 1))
        return self.relu(made + x)


class ShuffleNetV1(nn.Module):
    """ShuffleNet with three groups, for small images.

    The stem is one 1x1 convolution and keeps the size; the three stages have 240, 480 and 960
    channels. As in the public benchmark, and unlike in the paper, a ReLU
    follows the depthwise convolution. Initialization is PyTorch's default. State-dict keys match
    the weights published by RepDistiller, mdistiller and TopKD.

    Args:
        classes: Number of classes.

    References:
        ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices (Zhang
        et al., CVPR 2018)
        https://arxiv.org/abs/1707.01083

    Examples:
        >>> network = ShuffleNetV1(classes=100)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 100])
        >>> sum(weight.numel() for weight in network.parameters())
        949258
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        self.layer1 = _grouped_stage(24, 240, BLOCKS[0])
        self.layer2 = _grouped_stage(240, 480, BLOCKS[1])
        self.layer3 = _grouped_stage(480, 960, BLOCKS[2])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(960, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


class SplitBlock(nn.Module):
    """Block of version 2: half of the channels are an identity branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU()  # a module, so that a tap can read its input

    def forward(self, x: Tensor) -> Tensor:
        passed, made = x.chunk(2, 1)
        made = F.relu(self.bn1(self.conv1(made)))
        made = self.bn3(self.conv3(self.bn2(self.conv2(made))))
        # The identity branch is not negative, so the ReLU over both halves does not change it.
        return self.relu(shuffle(torch.cat([passed, made], 1), 2))


class HalvingBlock(nn.Module):
    """Strided block of version 2, with convolutions in both branches."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(channels_in, channels_in, 3, 2, 1, groups=channels_in, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv2 = nn.Conv2d(channels_in, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(channels_in, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        short = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        long = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return F.relu(shuffle(torch.cat([short, self.bn5(self.conv5(long))], 1), 2))


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 for small images.

    The stem is one 1x1 convolution and keeps the size. Initialization is PyTorch's default.
    State-dict keys match the weights published by RepDistiller, mdistiller and TopKD.

    Args:
        widths: Channels of the three stages and of the last convolution. The paper's network has
            116, 232, 464 and 1024; the one of 1.5 times the width has 176, 352, 704 and 1024.
        classes: Number of classes.

    Raises:
        ValueError: If a stage cannot be divided into two halves.

    References:
        ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design (Ma et al., ECCV
        2018)
        https://arxiv.org/abs/1807.11164

    Examples:
        >>> network = ShuffleNetV2((116, 232, 464, 1024), classes=100)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 100])
        >>> sum(weight.numel() for weight in network.parameters())
        1355528
    """

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        first, second, third, last = widths
        if first % 2 or second % 2 or third % 2:
            raise ValueError(f"the stages of ShuffleNetV2 have even widths, got {widths}")
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        self.layer1 = _split_stage(24, first, BLOCKS[0])
        self.layer2 = _split_stage(first, second, BLOCKS[1])
        self.layer3 = _split_stage(second, third, BLOCKS[2])
        self.conv2 = nn.Conv2d(third, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(self.avgpool(x).flatten(1))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Shuffles channels across groups: the first of each, then the second of each, ...

    Args:
        x: (n, channels, h, w), the groups one after another.
        groups: A divisor of the number of channels.

    Returns:
        (n, channels, h, w)

    Examples:
        >>> shuffle(torch.arange(6).view(1, 6, 1, 1), 3).flatten().tolist()
        [0, 2, 4, 1, 3, 5]
    """
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def _grouped_stage(channels_in: int, channels: int, blocks: int) -> nn.Sequential:
    first = GroupedBlock(channels_in, channels, 2)
    return nn.Sequential(first, *(GroupedBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _split_stage(channels_in: int, channels: int, blocks: int) -> nn.Sequential:
    first = HalvingBlock(channels_in, channels)
    return nn.Sequential(first, *(SplitBlock(channels) for _ in range(blocks - 1)))
