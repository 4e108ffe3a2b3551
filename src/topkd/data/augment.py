"""Augmentation of a whole batch at a time, as a pure function of (seed, epoch, index).

What happens to an image does not depend on its place in a batch, on threads or on what was drawn
before: runs can be replayed, and resumed exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from topkd.topology.compiled import compiled


def draws(seed: int, epoch: int, index: Tensor, count: int) -> Tensor:
    """Draws uniform numbers for images: :func:`whole_draws` / 2^53.

    Args:
        seed: Of the run.
        epoch: Of the run.
        index: Which images, (n,).
        count: How many numbers an image needs.

    Returns:
        Numbers in [0, 1), (n, count), float64.

    Examples:
        >>> some, more = torch.tensor([7]), torch.tensor([3, 7])
        >>> bool((draws(0, 1, some, 2) == draws(0, 1, more, 2)[1]).all())
        True
    """
    return whole_draws(seed, epoch, index, count).double() * 2.0**-53


def whole_draws(seed: int | Tensor, epoch: int, index: Tensor, count: int) -> Tensor:
    """Draws whole numbers below 2^53, (n, count), int64, for what :func:`draws` takes.

    They are a hash of (seed, epoch, index, which of them).

    References:
        SplitMix64: Fast Splittable Pseudorandom Number Generators (Steele et al., OOPSLA 2014)
        https://doi.org/10.1145/2660193.2660195
    """
    state = _mix(_mix(torch.as_tensor(seed, device=index.device)) + epoch)
    image = _mix(state + index)
    return _shifted(_mix(image[:, None] + torch.arange(count, device=index.device)), 11)


def _mix(x: Tensor) -> Tensor:
    """One step of SplitMix64: neighboring inputs have unrelated outputs."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Moves the bits of int64 to the right as those of uint64, on which torch has no arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 of the bits of a uint64."""
    return number - (1 << 64) if number >> 63 else number


def crop_and_flip(pixels: Tensor, uniform: Tensor, *, padding: int, flip: bool) -> Tensor:
    """Crops every image at its own place from a black border around it, and mirrors half of them.

    Args:
        pixels: Bytes of the images, (n, h, w, c).
        uniform: Three numbers in [0, 1) for each image, (n, 3): vertical, horizontal, mirror.
        padding: Width of the border.
        flip: Whether images may be mirrored.

    Returns:
        Images of the same shape.
    """
    corner = (uniform[:, :2] * (2 * padding + 1)).long() - padding
    mirrored = (uniform[:, 2] < 0.5) & flip
    cropped = np.zeros(pixels.shape, np.uint8)
    _crop_and_flip(pixels.contiguous().numpy(), corner.numpy(), mirrored.numpy(), cropped)
    return torch.from_numpy(cropped)


@compiled()
def _crop_and_flip(
    pixels: np.ndarray, corner: np.ndarray, mirrored: np.ndarray, cropped: np.ndarray
) -> None:
    n, height, width, channels = pixels.shape
    for i in range(n):
        top, left = corner[i]
        for y in range(max(0, -top), min(height, height - top)):
            for x in range(max(0, -left), min(width, width - left)):
                to = width - 1 - x if mirrored[i] else x
                for c in range(channels):
                    cropped[i, y, to, c] = pixels[i, y + top, x + left, c]


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    r"""Computes :math:`(x / 255 - \mathrm{mean}) / \mathrm{std}` of every channel.

    Args:
        pixels: Bytes of the images, (n, h, w, 3).
        mean: Of each channel, in [0, 1].
        std: Of each channel.

    Returns:
        Floats (n, 3, h, w), contiguous; :class:`~topkd.features.FeatureExtractor` lays them out as
        is best for its network.
    """
    byte = torch.arange(256, dtype=torch.float64)[:, None] / 255
    table = ((byte - torch.tensor(mean)) / torch.tensor(std)).float()  # what a byte becomes
    n, height, width, _ = pixels.shape
    images = np.empty((n, 3, height, width), np.float32)
    _look_up(pixels.contiguous().numpy(), table.numpy(), images)
    return torch.from_numpy(images)


@compiled()
def _look_up(pixels: np.ndarray, table: np.ndarray, images: np.ndarray) -> None:
    n, height, width, _ = pixels.shape
    for i in range(n):
        for c in range(3):
            for y in range(height):
                for x in range(width):
                    images[i, c, y, x] = table[pixels[i, y, x, c], c]
