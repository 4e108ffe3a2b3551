"""VGG networks for 32x32 images, as in the public distillation benchmark."""

from typing import Any

from torch import Tensor, nn

from topkd.models.initialization import kaiming_init_

CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Depth in the name, two more than the number of layers -> convolutions in each block."""

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of the five blocks."""

TAPS: dict[str, Any] = {
    "maps": ("relu0", "relu1", "relu2", "relu3", "relu4"),
    "preactivations": ("block0", "block1", "block2", "block3", "block4"),
    "head": "classifier",
}
"""A block ends with a normalization; the ReLU after it is a separate module."""


class VGG(nn.Module):
    r"""A plain network of 3x3 convolutions with batch normalization, for small images.

    The resolution is halved after each of the first three blocks, and after the fourth for images
    of 64x64 and more. The last map is average-pooled, and one linear layer computes the logits.
    State-dict keys match the weights published by RepDistiller, mdistiller and TopKD.

    Args:
        depth: The depth in the name: 8, 11, 13, 16 or 19.
        classes: Number of classes.

    Raises:
        ValueError: If there is no VGG of this depth.

    References:
        Very Deep Convolutional Networks for Large-Scale Image Recognition (Simonyan and Zisserman,
        ICLR 2015)
        https://arxiv.org/abs/1409.1556

    Examples:
        >>> import torch
        >>> network = VGG(8, classes=100)
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 100])
        >>> sum(weight.numel() for weight in network.parameters())
        3965028
    """

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        if depth not in CONVOLUTIONS:
            depths = ", ".join(map(str, CONVOLUTIONS))
            raise ValueError(f"the depth of a VGG is one of {depths}, got {depth}")
        counts = CONVOLUTIONS[depth]
        self.block0 = _block(3, WIDTHS[0], counts[0])
        self.block1 = _block(WIDTHS[0], WIDTHS[1], counts[1])
        self.block2 = _block(WIDTHS[1], WIDTHS[2], counts[2])
        self.block3 = _block(WIDTHS[2], WIDTHS[3], counts[3])
        self.block4 = _block(WIDTHS[3], WIDTHS[4], counts[4])
        self.relu0, self.relu1, self.relu2 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.relu3, self.relu4 = nn.ReLU(), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(WIDTHS[4], classes)
        kaiming_init_(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.relu0(self.block0(images)))
        x = self.pool(self.relu1(self.block1(x)))
        x = self.pool(self.relu2(self.block2(x)))
        x = self.relu3(self.block3(x))
        if images.shape[2] >= 64:
            x = self.pool(x)
        x = self.relu4(self.block4(x))
        return self.classifier(self.avgpool(x).flatten(1))


def _block(channels_in: int, channels: int, convolutions: int) -> nn.Sequential:
    """Builds convolutions with batch normalization and ReLU, without the last ReLU."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers.append(nn.Conv2d(channels_in, channels, 3, padding=1))
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        channels_in = channels
    return nn.Sequential(*layers[:-1])
