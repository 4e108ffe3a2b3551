"""Networks of this package, of torchvision, of timm and of the user, by name or as modules."""

from __future__ import annotations

import builtins

from torch import nn

from topkd.models.factory import ExternalModel, find, wrap
from topkd.models.registry import MODELS, Model

__all__ = ["MODELS", "Model", "create", "list", "wrap"]


def create(
    name: str, *, classes: int, size: int | None = None, pretrained: bool = False
) -> nn.Module:
    """Creates a classifier.

    Args:
        name: A name from :func:`list`; ``torchvision:NAME`` or ``timm:NAME``, optionally followed
            by a dot and the name of the weights; or ``module:callable`` for your own code.
        classes: Number of classes.
        size: Height and width of the images, for networks built for one size.
        pretrained: Whether to download the weights that torchvision or timm publish.

    Returns:
        A module that takes normalized images (n, 3, size, size) and returns logits (n, classes).

    Raises:
        ValueError: If there is no such network, or it has no published weights.
        OSError: If weights cannot be downloaded.

    Examples:
        >>> import torch
        >>> create("resnet20", classes=10)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    model = find(name)
    if isinstance(model, ExternalModel):
        network: nn.Module = model.network(classes, size, pretrained)
        return network
    if pretrained:
        raise ValueError(f"{name!r} has no published weights; models of torchvision and timm have")
    return model.create(classes)


def list() -> builtins.list[str]:
    """Lists the names of this package's own networks.

    Examples:
        >>> "resnet20" in list()
        True
    """
    return [*MODELS]
