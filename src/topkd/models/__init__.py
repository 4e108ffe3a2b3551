"""The networks, by the name that recipes use."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from topkd.features import Tapped
from topkd.models import resnet


@dataclass(frozen=True)
class Model:
    """How to build a network and where to read it."""

    network: Callable[..., nn.Module]  # takes the number of classes
    taps: Mapping[str, Any]  # maps and head, as Tapped takes them
    about: str = ""

    def build(self, classes: int) -> Tapped:
        """Builds the network, new, with its taps."""
        return Tapped(self.network(classes=classes), **self.taps)


def _resnet(depth: int, *widths: int) -> Model:
    """A CIFAR ResNet; the widths are those of the stem and of the three stages."""
    about = f"CIFAR ResNet of {depth} layers, {widths[-1]} wide at the end"
    return Model(partial(resnet.ResNet, depth, widths), resnet.TAPS, about)


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
}
"""Name -> how to build it and where to read it."""
