"""Batched augmentation as a pure function of (seed, epoch, index).

The augmentation of an image does not depend on its place in a batch, on threads or on earlier
random numbers, so runs can be replayed and resumed exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from topkd.topology.compiled import compiled


def draws(seed: int, epoch: int, index: Tensor, count: int) -> Tensor:
    """Draws uniform random numbers for images: :func:`integer_draws` / 2^53.

    Args:
        seed: Seed of the run.
        epoch: Number of the epoch.
        index: Indices of the images, (n,).
        count: Numbers per image.

    Returns:
        Numbers in [0, 1), (n, count), float64.

    Examples:
        >>> some, more = torch.tensor([7]), torch.tensor([3, 7])
        >>> bool((draws(0, 1, some, 2) == draws(0, 1, more, 2)[1]).all())
        True
    """
    return integer_draws(seed, epoch, index, count).double() * 2.0**-53


def integer_draws(seed: int | Tensor, epoch: int, index: Tensor, count: int) -> Tensor:
    """Draws integers below 2^53, (n, count), int64, with the arguments of :func:`draws`.

    They are a hash of (seed, epoch, index, position).

    References:
        SplitMix64: Fast Splittable Pseudorandom Number Generators (Steele et al., OOPSLA 2014)
        https://doi.org/10.1145/2660193.2660195
    """
    state = _mix(_mix(torch.as_tensor(seed, device=index.device)) + epoch)
    image = _mix(state + index)
    return _shifted(_mix(image[:, None] + torch.arange(count, device=index.device)), 11)


def _mix(x: Tensor) -> Tensor:
    """Applies one step of SplitMix64."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifts int64 right as if it were uint64, which torch does not support."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """Reinterprets a uint64 as int64."""
    return number - (1 << 64) if number >> 63 else number


def crop_and_flip(pixels: Tensor, uniform: Tensor, *, padding: int, flip: bool) -> Tensor:
    """Crops every image at random from a black border and flips half of them horizontally.

    Args:
        pixels: Bytes of the images, (n, h, w, c).
        uniform: Three numbers in [0, 1) per image, (n, 3): vertical, horizontal, flip.
        padding: Width of the border.
        flip: Whether to flip images.

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
        mean: Channel means, for values in [0, 1].
        std: Channel standard deviations.

    Returns:
        Floats (n, 3, h, w), contiguous. :class:`~topkd.features.FeatureExtractor` chooses the
        memory format.
    """
    byte = torch.arange(256, dtype=torch.float64)[:, None] / 255
    table = ((byte - torch.tensor(mean)) / torch.tensor(std)).float()  # value of every byte
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
