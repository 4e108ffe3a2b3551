"""Weight initialization."""

from torch import nn


def kaiming_init_(network: nn.Module) -> None:
    r"""Initializes all convolutions of a network in place by the method of He et al.

    Weights of a k x k kernel with :math:`c` output channels are normal with variance
    :math:`2 / (k^2 c)`; biases are 0.

    Args:
        network: The network to initialize.

    References:
        Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet Classification
        (He et al., ICCV 2015)
        https://arxiv.org/abs/1502.01852

    Examples:
        >>> layer = nn.Conv2d(50, 400, 3)
        >>> kaiming_init_(layer)
        >>> round(layer.weight.var().item() * 9 * 400, 1), layer.bias.norm().item()
        (2.0, 0.0)
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
