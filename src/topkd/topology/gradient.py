"""Gradients that stay bounded where a value does not depend on scale."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 1e-3  # feature norms and distances are 0.01 and more; smaller ones are mostly noise


def scaled_gradient(value: Tensor, factor: Tensor | float) -> Tensor:
    """Returns the value unchanged and multiplies its gradient by a factor.

    Examples:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> scaled_gradient(x, -0.5).square().backward()
        >>> x.grad
        tensor(-3.)
    """
    factor = torch.as_tensor(factor, dtype=value.dtype, device=value.device)
    return torch.lerp(value.detach(), value, factor.detach())  # both ends are equal


def bounded_divide(values: Tensor, scale: Tensor, small: float = SMALL) -> Tensor:
    r"""Divides by a scale, with a gradient that stays bounded as the scale goes to 0.

    The quotient does not depend on the size of its input, so its derivative is proportional to one
    over the scale: nearly coincident embeddings would receive huge updates. Where the scale is
    below ``small``, the gradient is multiplied by :math:`\mathrm{scale} / \mathrm{small}`. The
    value is not changed.

    Args:
        values: Dividend.
        scale: Divisor, not negative, broadcastable to the values; 0 is replaced by 1.
        small: Scale below which the gradient is reduced.

    Examples:
        >>> length = torch.tensor([2.0, 2e-6], requires_grad=True)
        >>> ratio = bounded_divide(length, torch.tensor([2.0, 2e-6]))
        >>> ratio.sum().backward()
        >>> ratio.tolist(), [round(slope, 1) for slope in length.grad.tolist()]
        ([1.0, 1.0], [0.5, 1000.0])
    """
    scale = scale.where(scale > 0, 1)
    return scaled_gradient(values / scale, (scale.detach() / small).clamp(max=1))
