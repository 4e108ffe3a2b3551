"""Any tree of pictures with a folder for each class, as ImageNet comes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from topkd.data.base import Data, Faults, refuse_clashes
from topkd.data.pictures import EXTENSIONS, MEAN, STD, Frame, Names, OnError, picture_data

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Files:
    """Pictures in files of their own."""

    paths: Names

    @property
    def blocks(self) -> None:
        """None: files can be read in any order."""

    def name(self, index: int) -> str:
        """The path."""
        path: str = self.paths[index]
        return path

    def open(self, index: int) -> Image.Image:
        """Opens a picture, of any mode."""
        from PIL import Image

        path = self.paths[index]
        if not os.path.getsize(path):
            raise OSError("it is empty")
        return Image.open(path)


def folder(
    *,
    root: str,
    size: int = 224,
    padding: int | None = None,
    flip: bool = True,
    mean: tuple[float, float, float] = MEAN,
    std: tuple[float, float, float] = STD,
    on_error: OnError = "stop",
) -> Data:
    """Loads pictures from ``train/<class>/*`` and ``val/<class>/*`` (or ``test/<class>/*``).

    In training a random part of each picture, 8 to 100 % of its area at a side ratio of 3/4 to
    4/3, is scaled to the square and mirrored half of the time. Otherwise it is the middle square,
    7/8 of the shorter side. With ``padding``, pictures are scaled to the square as a whole.

    Args:
        root: Folder with the two trees.
        size: Pixels on a side of what networks see.
        padding: Width of the black border that training crops are cut from, for small pictures.
        flip: Whether pictures may be mirrored in training.
        mean: By which each channel is normalised, of values in [0, 1].
        std: By which each channel is normalised.
        on_error: Whether a training picture that cannot be read stops the work or is replaced by
            the next of its class. A picture to judge by always stops it.

    Raises:
        FileNotFoundError: If a tree is missing, or a class holds no picture.
        ValueError: If the classes of the two trees differ, or two have the same name but for upper
            and lower case.

    References:
        Going Deeper with Convolutions (Szegedy et al., CVPR 2015), for the random part
        https://arxiv.org/abs/1409.4842
    """
    frame = Frame(size, padding, flip, mean, std)
    top, faults = Path(root).expanduser(), Faults()
    judge = next((name for name in ("val", "test") if (top / name).is_dir()), "val")
    trees = [top / "train", top / judge]
    for tree in trees:
        if not tree.is_dir():
            raise FileNotFoundError(f"{tree} is missing: data.root needs train/ and val/ or test/")
    classes, judged = (_classes(tree, faults) for tree in trees)
    if classes != judged:
        odd = sorted(set(classes) ^ set(judged))
        raise ValueError(f"{root}: train/ and {judge}/ differ in the classes {', '.join(odd)}")
    files, target = zip(*(_pictures(tree, classes, faults) for tree in trees), strict=True)
    return picture_data(f"folder {top.name}", files, target, classes, frame, on_error, faults)


def _classes(tree: Path, faults: Faults) -> list[str]:
    inside = sorted(os.scandir(tree), key=lambda entry: entry.name)
    faults.left_out += [entry.path for entry in inside if not entry.is_dir()]
    classes = [entry.name for entry in inside if entry.is_dir()]
    if not classes:
        raise FileNotFoundError(f"{tree} holds no folder; it needs one for each class")
    refuse_clashes(classes, str(tree))
    return classes


def _pictures(tree: Path, classes: list[str], faults: Faults) -> tuple[Files, torch.Tensor]:
    paths: list[str] = []
    target: list[int] = []
    for label, name in enumerate(classes):
        for place, _, files in sorted(os.walk(tree / name, followlinks=True)):
            for file in sorted(files):
                known = file.lower().endswith(EXTENSIONS)
                (paths if known else faults.left_out).append(os.path.join(place, file))
        if len(paths) == len(target):
            raise FileNotFoundError(
                f"{tree / name} holds no picture; files that end in {', '.join(EXTENSIONS)} are"
            )
        target += [label] * (len(paths) - len(target))
    return Files(Names(paths)), torch.tensor(target)
