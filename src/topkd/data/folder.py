"""Any tree of pictures with a folder for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from topkd.data.augment import draws, normalise
from topkd.data.base import Data

if TYPE_CHECKING:
    from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as pretrained networks use


@dataclass(frozen=True)
class Files:
    """Pictures that are read from disk when they are needed, several at a time."""

    paths: Sequence[str]
    target: Tensor  # (images,)
    size: int  # of the square that networks see

    def read(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads normalised images (n, 3, h, w); ``augmented`` is (seed, epoch), None for plain."""
        plain = [None] * len(index)
        uniform = plain if augmented is None else draws(*augmented, index, 5).tolist()
        with ThreadPoolExecutor(os.cpu_count()) as readers:
            pixels = list(readers.map(self._read_one, index.tolist(), uniform))
        images = torch.from_numpy(np.stack(pixels))
        return normalise(images, MEAN, STD)

    def _read_one(self, index: int, uniform: list[float] | None) -> np.ndarray:
        from PIL import Image, ImageOps

        path = self.paths[index]
        try:
            with Image.open(path) as opened:
                picture = _in_color(opened)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: not a readable image: {error}") from error
        box = _center(picture.size) if uniform is None else _random_box(picture.size, uniform)
        picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box)
        if uniform is not None and uniform[4] < 0.5:
            picture = ImageOps.mirror(picture)
        return np.asarray(picture)


def folder(*, root: str, size: int = 224) -> Data:
    """Loads pictures from ``train/<class>/*`` and ``val/<class>/*`` (or ``test/<class>/*``).

    In training a random part of each picture, 8 to 100 % of its area at a side ratio of 3/4 to
    4/3, is scaled to the square and mirrored half of the time. Otherwise it is the middle square,
    7/8 of the shorter side.

    Args:
        root: Folder with the two trees.
        size: Pixels on a side of what networks see.

    Raises:
        FileNotFoundError: If a tree is missing or holds no picture.
        ValueError: If the classes of the two trees differ.

    References:
        Going Deeper with Convolutions (Szegedy et al., CVPR 2015), for the random part
        https://arxiv.org/abs/1409.4842
    """
    from torchvision.datasets import folder as torchvision_folder

    top = Path(root).expanduser()
    judge = next((name for name in ("val", "test") if (top / name).is_dir()), "val")
    parts, names = [], []
    for part in ("train", judge):
        tree = top / part
        if not tree.is_dir():
            raise FileNotFoundError(f"{tree} is missing: data.root needs train/ and val/ or test/")
        classes, number = torchvision_folder.find_classes(str(tree))
        found = torchvision_folder.make_dataset(
            str(tree), number, torchvision_folder.IMG_EXTENSIONS, None, False
        )
        paths, labels = zip(*found, strict=True)
        parts.append(Files(paths, torch.tensor(labels), size))
        names.append(classes)
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]))
        raise ValueError(f"{root}: train/ and {judge}/ differ in the classes {', '.join(odd)}")
    return Data(f"folder {top.name}", parts[0], parts[1], names[0], MEAN, STD)


def _in_color(picture: Image.Image) -> Image.Image:
    """Converts a picture of any kind to red, green and blue, of eight bits each."""
    from PIL import Image

    if picture.mode.startswith("I"):  # gray of 16 bits, which PIL would clip
        return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "P":  # a palette, perhaps with a transparent color
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _center(size: tuple[int, int]) -> tuple[float, float, float, float]:
    width, height = size
    side = min(size) * 7 / 8
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(size: tuple[int, int], uniform: list[float]) -> tuple[float, float, float, float]:
    """Chooses a part of a picture by area, side ratio and place; it never leaves the picture."""
    width, height = size
    area = (0.08 + 0.92 * uniform[0]) * width * height
    ratio = (3 / 4) * (16 / 9) ** uniform[1]  # log-uniform from 3/4 to 4/3
    box_width = min(width, (area * ratio) ** 0.5)
    box_height = min(height, (area / ratio) ** 0.5)
    left, top = uniform[2] * (width - box_width), uniform[3] * (height - box_height)
    return left, top, left + box_width, top + box_height
