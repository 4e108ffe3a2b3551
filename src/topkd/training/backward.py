"""The backward pass of a training step, in two parts: down to the features, and below them.

Losses are computed from detached copies of the student's output, so that the gradient of each term
can be measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from topkd.features import Features


def pull_back(
    total: Tensor, features: Features, student: nn.Module, losses: nn.Module
) -> list[tuple[nn.Parameter, Tensor]]:
    """Stores gradients at the features and at the weights of the losses.

    Args:
        total: The loss, computed from ``features``.
        features: Detached copies of the student's output.
        student: The student.
        losses: All losses, with their weights.

    Returns:
        Weights of the student that a loss uses directly, with their gradients. They are
        added later: data-parallel weights accept one backward pass per step.
    """
    leaves = [*features.tensors(), *losses.parameters()]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    found = torch.autograd.grad(total, [*leaves, *weights], allow_unused=True)
    for leaf, grad in zip(leaves, found, strict=False):
        leaf.grad = grad
    used = zip(weights, found[len(leaves) :], strict=True)
    return [(weight, grad) for weight, grad in used if grad is not None]


def carry_back(output: Features, features: Features) -> None:
    """Backpropagates the gradients at the detached copies through the network."""
    if features.logits.grad is None:  # data parallel needs a gradient for every weight
        features.logits.grad = torch.zeros_like(features.logits)
    reached = [
        (at, copy.grad.to(at.dtype))
        for at, copy in zip(output.tensors(), features.tensors(), strict=True)
        if copy.grad is not None
    ]
    torch.autograd.backward([at for at, _ in reached], [grad for _, grad in reached])


def share_among_processes(
    losses: nn.Module,
    direct: Sequence[tuple[nn.Parameter, Tensor]],
    reduce: Callable[[Tensor, str], Tensor],
) -> None:
    """Averages over processes the gradients that bypass the data-parallel student.

    Args:
        losses: All losses, with gradients at their weights.
        direct: What :func:`pull_back` returned.
        reduce: Averages a tensor over the processes.
    """
    for weight in losses.parameters():
        if weight.requires_grad and weight.grad is not None:  # frozen weights may be stale
            weight.grad = reduce(weight.grad, "mean")
    for weight, grad in direct:
        averaged = reduce(grad, "mean")
        weight.grad = averaged if weight.grad is None else weight.grad + averaged
