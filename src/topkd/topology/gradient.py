"""Gradients that are bounded where a value does not see scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL = 1e-3  # sizes of what networks make are 0.01 and more; below this, relations are noise


def scaled_gradient(value: Tensor, factor: Tensor | float) -> Tensor:
    """Passes a value on as it is, and its gradient back multiplied by a factor.

    Examples:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> scaled_gradient(x, -0.5).square().backward()
        >>> x.grad
        tensor(-3.)
    """
    factor = torch.as_tensor(factor, dtype=value.dtype, device=value.device)
    scaled: Tensor = _Scaled.apply(value, factor.detach())
    return scaled


def in_units(values: Tensor, unit: Tensor, small: float = SMALL) -> Tensor:
    r"""Divides by a size, with a gradient that stays bounded however small that is.

    The result does not see scale, so that its slope is one over the size: it would throw a student
    far off whose embeddings nearly coincide. Where the size is below ``small``, the gradient is
    multiplied by :math:`\mathrm{size} / \mathrm{small}`; the value stays as it is.

    Args:
        values: What to divide.
        unit: The size, not negative, of a shape that goes with that of the values; 0 counts as 1.
        small: Up to which size the gradient is left as it is.

    Examples:
        >>> length = torch.tensor([2.0, 2e-6], requires_grad=True)
        >>> told = in_units(length, torch.tensor([2.0, 2e-6]))
        >>> told.sum().backward()
        >>> told.tolist(), [round(slope, 1) for slope in length.grad.tolist()]
        ([1.0, 1.0], [0.5, 1000.0])
    """
    unit = unit.where(unit > 0, 1)
    return scaled_gradient(values / unit, (unit.detach() / small).clamp(max=1))


class _Scaled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, factor: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor, None
