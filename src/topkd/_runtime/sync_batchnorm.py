"""Synchronized batch normalization on any device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from topkd._runtime import processes

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d)


def synchronize(network: nn.Module) -> None:
    r"""Makes batch normalization use the batch statistics of all processes.

    With P processes of n images each, training then equals that of one process with P n images.
    Module names, parameters and hooks do not change. ``torch.nn.SyncBatchNorm`` does the same, but
    only on GPUs.

    Args:
        network: The network, whose layers are changed in place.

    Raises:
        ValueError: If a layer is another kind of batch normalization.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> synchronize(network)
        >>> network(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 4, 6, 6])
    """
    for name, module in network.named_modules():
        if type(module) in _PLAIN:
            module.__class__ = _SyncBatchNorm
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(
            module, _SyncBatchNorm
        ):
            raise ValueError(
                f"sync_batchnorm: the module {name!r} is a {type(module).__name__}; only "
                "BatchNorm1d and BatchNorm2d can be synchronized, not their subclasses"
            )


class _SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d or BatchNorm2d with statistics over all processes in training mode."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or processes.count() == 1:
            return super().forward(input)
        x = input.float() if input.dtype.itemsize < 4 else input
        dims = [dim for dim in range(x.ndim) if dim != 1]
        count = x.new_tensor(x.numel() / x.shape[1])
        sums = processes.total(torch.cat([x.sum(dims), count[None]]))
        mean, number = sums[:-1] / sums[-1], sums[-1].detach()
        centered = x - _across(mean, x)
        variance = processes.total(centered.square().sum(dims)) / number
        self._follow(mean.detach(), variance.detach() * number / (number - 1))
        normalized = centered * _across((variance + self.eps).rsqrt(), x)
        if self.affine:
            normalized = normalized * _across(self.weight, x) + _across(self.bias, x)
        return normalized.to(input.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Updates the running statistics as torch does."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # cumulative mean over batches
            momentum = 1 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def _across(values: Tensor, x: Tensor) -> Tensor:
    """Reshapes per-channel values (c,) to broadcast with a batch (n, c, ...)."""
    return values.view(1, -1, *[1] * (x.ndim - 2))
