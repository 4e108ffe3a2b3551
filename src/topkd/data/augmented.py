"""Stronger augmentation: RandAugment, mixup, CutMix and two views of each image.

Every random number is a hash of (seed, epoch, index). Torch's generator is not used, because the
networks draw from it for dropout at the same time, in another thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from topkd.data.augment import draws, normalize
from topkd.data.base import Data, DataIssues, WrappedImages
from topkd.data.pictures import cores, stacked
from topkd.features import Batch

if TYPE_CHECKING:
    from PIL import Image

_BEFORE = 5  # random numbers used by crop and flip
STRONG = (2, 10)  # operations and magnitude of the second view, as in FixMatch


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images after the random crop and flip.

    Raises:
        ValueError: If a number is out of range.
    """

    randaugment: tuple[int, int] | None = None  # operations per image; magnitude, 0 to 30
    mixup: float = 0.0  # alpha of the Beta distribution; 0 for none
    cutmix: float = 0.0
    views: int = 1

    def __post_init__(self) -> None:
        if self.randaugment is not None:
            operations, magnitude = self.randaugment
            if operations < 1 or not 0 <= magnitude <= 30:
                raise ValueError(
                    "randaugment needs one operation or more and a magnitude from 0 to 30, "
                    f"got {operations} and {magnitude}"
                )
        if self.mixup < 0 or self.cutmix < 0 or self.views not in (1, 2):
            raise ValueError(
                "mixup and cutmix must be 0 or more and views 1 or 2, "
                f"got {self.mixup}, {self.cutmix} and {self.views}"
            )


@dataclass(frozen=True)
class Augmented(WrappedImages):
    """Images with RandAugment, mixup, CutMix or a second, strongly augmented view.

    With one view, RandAugment is applied to each image. With two, a batch holds every image twice:
    first after crop and flip only, then also after RandAugment (by default 2 operations of
    magnitude 10) and with a square erased.
    """

    augmentation: Augmentation
    classes: int
    mean: Sequence[float]
    std: Sequence[float]
    workers: int = 0  # number of worker processes; 0 for threads
    faults: DataIssues = field(default_factory=DataIssues)

    def read_bytes(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads bytes (n, h, w, 3) before the stronger augmentation."""
        return self.images.read_bytes(index, augmented)

    def read(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads normalized images; ``augmented`` is (seed, epoch), None for plain."""
        if augmented is None:
            return self.images.read(index, None)
        return self.batch(index, augmented).images

    def batch(self, index: Tensor, augmented: tuple[int, int]) -> Batch:
        """Reads images (views n, 3, h, w), which depend only on (seed, epoch) and ``index``."""
        settings = self.augmentation
        pixels = self.images.read_bytes(index, augmented)
        operations, magnitude = settings.randaugment or STRONG
        uniform = draws(*augmented, index, _BEFORE + 2 + 2 * operations)[:, _BEFORE:]
        if settings.views == 2:
            strong = _randaugmented(pixels, uniform[:, 2:], magnitude)
            images = normalize(torch.cat([pixels, strong]), self.mean, self.std)
            erase(images[len(index) :], uniform[:, :2])
        else:
            if settings.randaugment is not None:
                pixels = _randaugmented(pixels, uniform[:, 2:], magnitude)
            images = normalize(pixels, self.mean, self.std)
        target = self.target[index].repeat(settings.views)
        soft = None
        if settings.mixup or settings.cutmix:
            generator = np.random.default_rng((*augmented, *index.tolist()))
            images, soft = self._mixed(images, target, generator)
        return Batch(images, target, index.repeat(settings.views), soft)

    def _mixed(
        self, images: Tensor, target: Tensor, generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mixes each image with the previous one of its view, with one method per batch."""
        mixup, cutmix = self.augmentation.mixup, self.augmentation.cutmix
        cut = cutmix > 0 and (mixup == 0 or generator.random() < 0.5)
        alpha = cutmix if cut else mixup
        share = float(generator.beta(alpha, alpha))
        place = tuple(generator.random(2).tolist())
        height, width = images.shape[2:]
        own = cut_box(height, width, share, place) if cut else torch.tensor(max(share, 1 - share))
        partner = torch.arange(len(images)).view(self.augmentation.views, -1).roll(1, 1).flatten()
        mixed = images * own + images[partner] * (1 - own)
        labels, counts = F.one_hot(target, self.classes).float(), own.mean()
        soft = labels * counts + labels[partner] * (1 - counts)
        return mixed, soft


def with_augmentation(data: Data, augmentation: Augmentation, workers: int | None = None) -> Data:
    """Augments the training images of a data set.

    Args:
        data: The data set.
        augmentation: The augmentation. The default does nothing.
        workers: Number of worker processes, 0 for threads, None to choose automatically.
    """
    by_python = augmentation.randaugment is not None or augmentation.views == 2
    if workers is None:
        # RandAugment holds the GIL between many small steps, so threads do not scale. With fewer
        # than four cores, a worker process slows down training.
        workers = min(8, cores() - 1) if by_python and cores() >= 4 else 0
    if augmentation == Augmentation() and not workers:
        return data
    about = (len(data.classes), data.mean, data.std)
    return replace(data, train=Augmented(data.train, augmentation, *about, workers, data.faults))


def _randaugmented(pixels: Tensor, uniform: Tensor, magnitude: int) -> Tensor:
    """Applies RandAugment to every image of a batch (n, h, w, 3)."""
    from PIL import Image

    def one(image: np.ndarray, numbers: list[float]) -> np.ndarray:
        return np.asarray(randaugment(Image.fromarray(image), numbers, magnitude=magnitude))

    return stacked(pixels.shape[1], one, pixels.numpy(), uniform.tolist())


def randaugment(picture: Image.Image, uniform: Sequence[float], *, magnitude: int) -> Image.Image:
    """Applies randomly chosen operations of one magnitude to a picture.

    Operations and magnitudes are those of torchvision, with 31 bins and black fill.

    Args:
        picture: An RGB picture.
        uniform: Two numbers in [0, 1) per operation: its choice and its direction.
        magnitude: 0 to 30.

    References:
        RandAugment: Practical automated data augmentation with a reduced search space
        (Cubuk et al., NeurIPS 2020) https://arxiv.org/abs/1909.13719

    Examples:
        >>> from PIL import Image
        >>> picture = Image.new("RGB", (8, 8), "red")
        >>> randaugment(picture, [0.0, 0.9], magnitude=10) == picture  # the first is the identity
        True
    """
    for choice, direction in zip(uniform[::2], uniform[1::2], strict=True):
        operation = OPERATIONS[int(choice * len(OPERATIONS))]
        picture = _changed(picture, operation, magnitude, 1 if direction > 0.5 else -1)
    return picture


OPERATIONS = (
    "identity", "shear x", "shear y", "translate x", "translate y", "rotate", "brightness",
    "color", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip


def _changed(picture: Image.Image, operation: str, magnitude: int, sign: int) -> Image.Image:
    """Applies one operation."""
    from torchvision.transforms.v2 import functional

    strength = magnitude / 30
    slant = math.degrees(math.atan(sign * 0.3 * strength))
    shift = sign * 150 / 331 * strength
    factor = 1 + sign * 0.9 * strength
    match operation:
        case "shear x":
            return functional.affine(picture, 0, [0, 0], 1, [slant, 0], center=[0, 0])
        case "shear y":
            return functional.affine(picture, 0, [0, 0], 1, [0, slant], center=[0, 0])
        case "translate x":
            return functional.affine(picture, 0, [int(shift * picture.width), 0], 1, [0, 0])
        case "translate y":
            return functional.affine(picture, 0, [0, int(shift * picture.height)], 1, [0, 0])
        case "rotate":
            return functional.rotate(picture, sign * 30 * strength)
        case "brightness":
            return functional.adjust_brightness(picture, factor)
        case "color":
            return functional.adjust_saturation(picture, factor)
        case "contrast":
            return functional.adjust_contrast(picture, factor)
        case "sharpness":
            return functional.adjust_sharpness(picture, factor)
        case "posterize":
            return functional.posterize(picture, 8 - round(4 * strength))
        case "solarize":
            # Rounded like torchvision, which decides whether a color at the bound changes.
            bound = torch.linspace(1.0, 0.0, 31)[magnitude].item()
            return functional.solarize(picture, 255 * bound)
        case "autocontrast":
            return functional.autocontrast(picture)
        case "equalize":
            return functional.equalize(picture)
    return picture


def erase(images: Tensor, uniform: Tensor) -> None:
    """Sets a square of each image to the mean color, in place.

    The square is half as high as the image. Its center is uniform over the image, so part of it
    may be outside.

    Args:
        images: Normalized images, (n, 3, h, w).
        uniform: Two numbers in [0, 1) per image, (n, 2): vertical and horizontal center.

    References:
        Improved Regularization of Convolutional Neural Networks with Cutout (DeVries & Taylor,
        2017) https://arxiv.org/abs/1708.04552
        FixMatch (Sohn et al., NeurIPS 2020), for the size https://arxiv.org/abs/2001.07685
    """
    height, width = images.shape[2:]
    half = height // 4
    middle = (uniform * torch.tensor([height, width])).long()
    down, across = (
        (torch.arange(side) >= place - half) & (torch.arange(side) < place + half)
        for side, place in zip((height, width), middle.split(1, dim=1), strict=True)
    )
    images.masked_fill_((down[:, :, None] & across[:, None, :])[:, None], 0.0)


def cut_box(height: int, width: int, share: float, place: Sequence[float]) -> Tensor:
    """Computes the mask of CutMix: the pixels that an image keeps, at least half of them.

    If the pasted box covers more than half of the image, the two images swap roles, so that the
    dominant label is always that of the image itself. The mixed images are those of the paper.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        share: Share of the area outside the box, before clipping at the border.
        place: Vertical and horizontal center of the box, each in [0, 1).

    Returns:
        1 where the image keeps its pixels and 0 elsewhere, (h, w).

    References:
        CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features
        (Yun et al., ICCV 2019) https://arxiv.org/abs/1905.04899
        mixup: Beyond Empirical Risk Minimization (Zhang et al., ICLR 2018)
        https://arxiv.org/abs/1710.09412

    Examples:
        >>> cut_box(4, 4, 0.75, (0.5, 0.5)).mean().item()  # a box of 2 x 2 in the middle
        0.75
    """
    own = torch.ones(height, width)
    extent = 0.5 * math.sqrt(1 - share)
    rows, columns = (
        slice(max(0, int(p * side) - int(extent * side)), int(p * side) + int(extent * side))
        for p, side in zip(place, (height, width), strict=True)
    )
    own[rows, columns] = 0
    return own if own.mean() >= 0.5 else 1 - own
