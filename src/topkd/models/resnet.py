"""Residual networks for 32x32 images, as in the public distillation benchmark."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

TAPS = {"maps": ("relu", "layer1", "layer2", "layer3"), "head": "fc"}
"""Modules whose outputs are the feature maps, shallow to deep, and the classifier."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    r"""A residual network of three stages for small images.

    A network of depth :math:`6k + 2` has :math:`k` blocks of two convolutions in each stage. Its
    state dict has the keys of the weights that RepDistiller, mdistiller and TopKD publish.

    Args:
        depth: Number of layers with weights, 6k + 2.
        widths: Channels of the stem and of the three stages.
        classes: Width of the logits.

    Raises:
        ValueError: If no whole number of blocks gives this depth.

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
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"the depth of a ResNet is 6k + 2 (8, 14, 20, ...), got {depth}")
        stem, first, second, third = widths
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = _stage(stem, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.fc = nn.Linear(third, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))
