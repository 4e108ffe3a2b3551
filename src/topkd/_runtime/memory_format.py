"""Choice of the memory format for the convolutions of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

BLOCK = 16  # channels per block with AVX512; 8 with AVX2


def memory_format(network: nn.Module) -> torch.memory_format:
    """Chooses the fastest memory format that is safe for a network and its inputs.

    Channels-last is faster on every processor. It is unsafe for a network with a dense, strided
    1x1 convolution that has fewer input channels than a block of the processor's instruction set:
    oneDNN's weight gradient then writes past the end of a buffer, and the process crashes, hangs or
    continues with wrong gradients. Such a network needs both contiguous weights and contiguous
    images, since either one in channels-last makes the convolution channels-last. For all other
    networks, channels-last images are sufficient.

    The choice depends only on the network, so that a run is defined identically on every machine.

    Args:
        network: Any module. A 1x1 kernel outside of torch's convolutions has an unknown stride and
            counts as strided.

    Returns:
        ``torch.channels_last``, or ``torch.contiguous_format`` if channels-last is unsafe.

    References:
        oneDNN, issue 6035 https://github.com/uxlfoundation/oneDNN/issues/6035

    Examples:
        >>> memory_format(nn.Conv2d(4, 8, 1, stride=2))
        torch.contiguous_format
        >>> memory_format(nn.Conv2d(16, 8, 1, stride=2)), memory_format(nn.Conv2d(4, 8, 1))
        (torch.channels_last, torch.channels_last)
    """
    unsafe = any(_is_unsafe(module) for module in network.modules())
    return torch.contiguous_format if unsafe else torch.channels_last


def formatted(images: Tensor, to: torch.memory_format) -> Tensor:
    """Converts images or feature maps (n, c, h, w) to a memory format; returns others unchanged."""
    return images.contiguous(memory_format=to) if images.ndim == 4 else images


def _is_unsafe(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d) and (set(module.stride) == {1} or module.groups > 1):
        return False
    return any(is_lazy(p) or _is_narrow(p) for p in module.parameters(recurse=False))


def _is_narrow(kernel: Tensor) -> bool:
    return kernel.ndim == 4 and kernel.shape[2:] == (1, 1) and kernel.shape[1] < BLOCK
