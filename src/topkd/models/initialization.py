"""How the weights of convolutions begin."""

from torch import nn


def begin_as_he(network: nn.Module) -> None:
    r"""Draws the weights of all convolutions anew, as networks with rectified units begin.

    The weights of a kernel of k x k and :math:`c` channels out are normal with variance
    :math:`2 / (k^2 c)`; biases are 0.

    Args:
        network: It is changed.

    References:
        Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet Classification
        (He et al., ICCV 2015)
        https://arxiv.org/abs/1502.01852

    Examples:
        >>> layer = nn.Conv2d(50, 400, 3)
        >>> begin_as_he(layer)
        >>> round(layer.weight.var().item() * 9 * 400, 1), layer.bias.norm().item()
        (2.0, 0.0)
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
