"""Wide residual networks for 32x32 images, as in the public distillation benchmark."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from topkd.models.initialization import kaiming_init_

TAPS: dict[str, Any] = {
    "maps": ("conv1", "block1", "block2", "block3"),
    "preactivations": ("block1.layer.0.bn1", "block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"),
    "head": "fc",
}
"""The maps are sums before batch normalization and ReLU, with which the next stage begins; the
pre-activations are the outputs of this normalization. The tap ``relu`` reads the last map after
normalization and ReLU, whose averages the classifier reads."""


class PreactivationBlock(nn.Module):
    """Pre-activation block: two 3x3 convolutions after batch normalization and ReLU, a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut: nn.Module | None = None  # spelled as in published weights
        if channels_in != channels:
            self.convShortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))


class Stage(nn.Module):
    """A sequence of blocks; the first may change the number of channels and the resolution."""

    def __init__(self, channels_in: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = PreactivationBlock(channels_in, channels, stride)
        others = (PreactivationBlock(channels, channels, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    r"""A wide residual network of three stages for small images.

    A network of depth :math:`6k + 4` and width :math:`w` has :math:`k` blocks of two convolutions
    in each stage, with :math:`16w`, :math:`32w` and :math:`64w` channels. Its state-dict keys
    match the weights published by RepDistiller, mdistiller and TopKD.

    Args:
        depth: Number of layers with weights, 6k + 4.
        width: Width multiplier.
        classes: Number of classes.

    Raises:
        ValueError: If the depth is not of this form.

    References:
        Wide Residual Networks (Zagoruyko and Komodakis, BMVC 2016)
        https://arxiv.org/abs/1605.07146

    Examples:
        >>> import torch
        >>> network = WideResNet(16, 2, classes=100)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 100])
        >>> sum(weight.numel() for weight in network.parameters())
        703284
    """

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if blocks < 1 or rest:
            raise ValueError(f"the depth of a wide ResNet is 6k + 4 (10, 16, ...), got {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = Stage(16, 16 * width, blocks, stride=1)
        self.block2 = Stage(16 * width, 32 * width, blocks, stride=2)
        self.block3 = Stage(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, classes)
        kaiming_init_(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.avgpool(self.relu(self.bn1(x))).flatten(1))
