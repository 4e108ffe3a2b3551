"""Optimizer and learning rate schedule of a recipe."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from topkd.config.sections import Optimizer


def build(settings: Optimizer, weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Builds the optimizer of a recipe, with the same weight decay for all parameters.

    References:
        Decoupled Weight Decay Regularization (Loshchilov & Hutter, ICLR 2019), for AdamW
        https://arxiv.org/abs/1711.05101

    Examples:
        >>> adam = build(Optimizer(name="adamw", momentum=0.8), nn.Linear(2, 1).parameters())
        >>> adam.defaults["betas"]
        (0.8, 0.999)
    """
    rate, decay = settings.lr, settings.weight_decay
    if settings.name == "adamw":
        betas = (settings.momentum, 0.999)
        return torch.optim.AdamW(weights, lr=rate, betas=betas, weight_decay=decay)
    return torch.optim.SGD(
        weights,
        lr=rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=decay,
    )


def learning_rate(optimizer: Optimizer, done: float, epochs: int) -> float:
    r"""Computes the learning rate after ``done`` epochs, which may be fractional.

    ``milestones`` multiplies the rate by ``factor`` at each milestone; ``cosine`` decreases it as
    :math:`\frac{1}{2}(1 + \cos \pi t)`; ``one-cycle`` increases it linearly over the fraction
    ``rise`` and then decreases it as a cosine.

    References:
        SGDR (Loshchilov & Hutter, ICLR 2017) https://arxiv.org/abs/1608.03983
        Super-Convergence (Smith & Topin, 2018) https://arxiv.org/abs/1708.07120

    Examples:
        >>> learning_rate(Optimizer(lr=1.0, milestones=(2,)), 2.0, epochs=4)
        0.1
        >>> learning_rate(Optimizer(lr=1.0, schedule="one-cycle", rise=0.5), 1.0, epochs=4)
        0.5
    """
    if optimizer.schedule == "milestones":
        passed = sum(done >= milestone for milestone in optimizer.milestones)
        return optimizer.lr * optimizer.factor**passed
    share, rise = done / epochs, 0.0 if optimizer.schedule == "cosine" else optimizer.rise
    if share < rise:
        return optimizer.lr * share / rise
    return optimizer.lr * 0.5 * (1 + math.cos(math.pi * (share - rise) / (1 - rise)))
