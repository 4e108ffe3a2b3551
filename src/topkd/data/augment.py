"""Augmentation of a whole batch at a time, as a pure function of (seed, epoch, index).

What happens to an image does not depend on its place in a batch, on threads or on what was drawn
before: runs can be replayed, and resumed exactly.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def draws(seed: int, epoch: int, index: Tensor, count: int) -> Tensor:
    """Draws uniform numbers for images: a hash of (seed, epoch, index, which of them).

    Args:
        seed: Of the run.
        epoch: Of the run.
        index: Which images, (n,).
        count: How many numbers an image needs.

    Returns:
        Numbers in [0, 1), (n, count), float64.

    References:
        SplitMix64: Fast Splittable Pseudorandom Number Generators (Steele et al., OOPSLA 2014)
        https://doi.org/10.1145/2660193.2660195

    Examples:
        >>> some, more = torch.tensor([7]), torch.tensor([3, 7])
        >>> bool((draws(0, 1, some, 2) == draws(0, 1, more, 2)[1]).all())
        True
    """
    state = _mix(_mix(np.uint64(seed)) + np.uint64(epoch))
    image = _mix(state + index.numpy().astype(np.uint64))
    number = _mix(image[:, None] + np.arange(count, dtype=np.uint64))
    return torch.from_numpy((number >> np.uint64(11)) * 2.0**-53)


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """One step of SplitMix64: neighbouring inputs have unrelated outputs."""
    with np.errstate(over="ignore"):
        x = np.asarray(x) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def crop_and_flip(pixels: Tensor, uniform: Tensor, *, padding: int, flip: bool) -> Tensor:
    """Crops every image at its own place from a black border around it, and mirrors half of them.

    Args:
        pixels: Images, (n, h, w, c).
        uniform: Three numbers in [0, 1) for each image, (n, 3): vertical, horizontal, mirror.
        padding: Width of the border.
        flip: Whether images may be mirrored.

    Returns:
        Images of the same shape.
    """
    n, height, width, channels = pixels.shape
    padded = pixels.new_zeros(n, height + 2 * padding, width + 2 * padding, channels)
    padded[:, padding : padding + height, padding : padding + width] = pixels
    top, left = (uniform[:, :2] * (2 * padding + 1)).long().unbind(1)
    columns = torch.arange(width).expand(n, -1)
    if flip:
        columns = torch.where(uniform[:, 2:] < 0.5, columns.flip(1), columns)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + columns
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turns bytes (n, h, w, 3) into floats (n, 3, h, w) of about zero mean and unit variance.

    The result is channels-last in memory.
    """
    scale, shift = 1 / (255 * std), -mean / std
    return torch.addcmul(shift, pixels.float(), scale).permute(0, 3, 1, 2)
