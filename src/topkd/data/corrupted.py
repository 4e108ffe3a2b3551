"""Images with a corruption, to measure the robustness of a network."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from topkd.data.augment import normalize
from topkd.data.base import WrappedImages

SMALL = 64  # pixels; larger images are corrupted as those of ImageNet-C
_SEED = 1903  # arbitrary, but must never change


@dataclass(frozen=True)
class Corrupted(WrappedImages):
    """Images with noise, blur, low contrast or JPEG artifacts, the same in every run.

    The corruption is applied after cropping and resizing, before normalization. Its strength is
    severity 3 of 5 in CIFAR-10-C for images of up to 64 pixels, and in ImageNet-C for larger ones.

    References:
        Benchmarking Neural Network Robustness to Common Corruptions and Perturbations
        (Hendrycks & Dietterich, ICLR 2019) https://arxiv.org/abs/1903.12261
    """

    corruption: str  # a key of CORRUPTIONS
    mean: Sequence[float]
    std: Sequence[float]

    def read_bytes(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads corrupted bytes (n, h, w, 3); ``augmented`` is (seed, epoch), None for plain."""
        pixels = self.images.read_bytes(index, augmented)
        corruption = CORRUPTIONS[self.corruption]
        strength = corruption.small if pixels.shape[2] <= SMALL else corruption.large
        return corruption.apply(pixels, strength, index)

    def read(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads normalized images (n, 3, h, w); ``augmented`` is (seed, epoch), None for plain."""
        return normalize(self.read_bytes(index, augmented), self.mean, self.std)


def _noise(pixels: Tensor, deviation: float, index: Tensor) -> Tensor:
    """Adds Gaussian noise that depends only on the index of an image."""
    shape = pixels.shape[1:]
    drawn = [
        np.random.default_rng((_SEED, number)).standard_normal(shape, np.float32)
        for number in index.tolist()
    ]
    return _bytes(pixels + 255 * deviation * torch.from_numpy(np.stack(drawn)))


def _blur(pixels: Tensor, deviation: float, index: Tensor) -> Tensor:
    from scipy.ndimage import gaussian_filter

    values, deviations = pixels.float().numpy(), (0, deviation, deviation, 0)
    return _bytes(torch.from_numpy(gaussian_filter(values, deviations, mode="nearest")))


def _contrast(pixels: Tensor, factor: float, index: Tensor) -> Tensor:
    mean = pixels.float().mean((1, 2), keepdim=True)
    return _bytes(mean + factor * (pixels - mean))


def _jpeg(pixels: Tensor, quality: float, index: Tensor) -> Tensor:
    from PIL import Image

    decoded = []
    for picture in pixels.numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=int(quality))
        decoded.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(decoded))


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Corruption:
    """A corruption of bytes (n, h, w, 3), and its strength for small and for large images."""

    apply: Callable[[Tensor, float, Tensor], Tensor]  # pixels, strength, indices -> pixels
    small: float
    large: float


CORRUPTIONS: Mapping[str, Corruption] = {
    "noise": Corruption(_noise, 0.08, 0.18),  # standard deviation, for values in [0, 1]
    "blur": Corruption(_blur, 0.7, 3.0),  # standard deviation, in pixels
    "contrast": Corruption(_contrast, 0.4, 0.2),  # factor
    "jpeg": Corruption(_jpeg, 58, 15),  # quality
}
"""Name -> corruption."""
