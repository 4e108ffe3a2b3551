"""Memory format in which a network computes convolutions, chosen for the network and its inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

BLOCK = 16  # channels in a block of AVX512; of AVX2, 8


def memory_format(network: nn.Module) -> torch.memory_format:
    """Chooses the memory format in which a network and its inputs are safe and fast.

    Channels-last is faster on every processor. It must not be used where a network holds a dense,
    strided 1x1 convolution with fewer input channels than a block of the processor's instruction
    set: there, oneDNN's gradient of the weights writes past the end of a buffer, and the process
    crashes, hangs or continues with wrong gradients. Such a network needs contiguous weights and
    contiguous images, since either of them makes a convolution channels-last. For all others,
    channels-last images are enough.

    The choice depends on the network alone, so that a run means the same on every machine.

    Args:
        network: Any module. A 1x1 kernel whose stride is not known, because no convolution of
            torch holds it, counts as strided.

    Returns:
        ``torch.channels_last``, or ``torch.contiguous_format`` for a network as described.

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
    """Lays images or feature maps (n, c, h, w) out in a format; other tensors are not changed."""
    return images.contiguous(memory_format=to) if images.ndim == 4 else images


def _is_unsafe(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d) and (set(module.stride) == {1} or module.groups > 1):
        return False
    return any(is_lazy(p) or _is_narrow(p) for p in module.parameters(recurse=False))


def _is_narrow(kernel: Tensor) -> bool:
    return kernel.ndim == 4 and kernel.shape[2:] == (1, 1) and kernel.shape[1] < BLOCK
