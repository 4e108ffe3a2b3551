"""Any tree of pictures with a folder for each class, as ImageNet comes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from topkd.data.base import Data, DataIssues, refuse_clashes, stratified_split
from topkd.data.pictures import (
    EXTENSIONS,
    FORMATS,
    MEAN,
    STD,
    CropConfig,
    Names,
    OnError,
    is_hidden,
    picture_data,
)

if TYPE_CHECKING:
    from PIL import Image


JUDGED = ("val", "test")  # the first that there is is evaluated on


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
        return Image.open(path, formats=FORMATS)


def folder(
    *,
    root: str,
    split: float | None = None,
    size: int = 224,
    padding: int | None = None,
    crop: float | None = None,
    flip: bool = True,
    mean: tuple[float, float, float] = MEAN,
    std: tuple[float, float, float] = STD,
    on_error: OnError = "stop",
) -> Data:
    """Loads pictures from ``train/<class>/*`` and ``val/<class>/*`` (or ``test/<class>/*``).

    Hidden files and folders, and links that lead back into a class, are left out and reported.

    In training a random part of each picture, 8 to 100 % of its area at a side ratio of 3/4 to
    4/3, is scaled to the square and mirrored half of the time. Otherwise it is the middle square
    of ``crop``. With ``padding``, pictures are scaled to the square as a whole.

    Args:
        root: Folder with the two trees.
        split: For ``<class>/*`` without the two trees: the share of each class to evaluate on. It
            is always the same pictures, as long as none is added or removed.
        size: Pixels on a side of what networks see.
        padding: Width of the black border that training crops are cut from, for small pictures.
        crop: Share of the shorter side of the middle square that is evaluated on. If not told, 7/8,
            but as many pixels as networks see where a picture has them.
        flip: Whether pictures may be mirrored in training.
        mean: By which each channel is normalized, of values in [0, 1].
        std: By which each channel is normalized.
        on_error: Whether a training picture that cannot be read stops the work or is replaced by
            the next of its class. A picture to judge by always stops it.

    Raises:
        FileNotFoundError: If a tree is missing, or a class holds no picture.
        ValueError: If the classes of the two trees differ, two have the same name but for upper
            and lower case or are one folder, or a split leaves one without pictures.

    References:
        Going Deeper with Convolutions (Szegedy et al., CVPR 2015), for the random part
        https://arxiv.org/abs/1409.4842
    """
    frame = CropConfig(size, padding, flip, mean, std, crop)
    top, faults = Path(root).expanduser(), DataIssues()
    if split is None:
        trees = _trees(top)
        classes, judged = (_classes(tree, faults) for tree in trees)
        if classes != judged:
            odd = ", ".join(sorted(set(classes) ^ set(judged)))
            raise ValueError(f"{root}: train/ and {trees[1].name}/ differ in the classes {odd}")
        files = [_pictures(tree, classes, faults) for tree in trees]
    else:
        tree = _unsplit(top, split)
        classes = _classes(tree, faults)
        paths, target = _pictures(tree, classes, faults)
        parts = stratified_split(target, split, f"{root}: a split")
        files = [([paths[place] for place in part.tolist()], target[part]) for part in parts]
    stored = [Files(Names(paths)) for paths, _ in files]
    labels = [target for _, target in files]
    return picture_data(f"folder {top.name}", stored, labels, classes, frame, on_error, faults)


def _trees(top: Path) -> list[Path]:
    """Finds the folder to train on and the one to evaluate on."""
    judge = next((name for name in JUDGED if (top / name).is_dir()), JUDGED[0])
    trees = [top / "train", top / judge]
    for tree in trees:
        if not tree.is_dir():
            raise FileNotFoundError(
                f"{tree} is missing: data.root needs train/ and val/ or test/; data.split=0.2 "
                f"evaluates on a share of the pictures in {_whole(top)}/<class>/ instead"
            )
    return trees


def _unsplit(top: Path, share: float) -> Path:
    """Finds the folder of all classes, of which a share is to be evaluated on."""
    if not 0 < share < 1:
        raise ValueError(f"split must be between 0 and 1, got {share}")
    judge = next((name for name in JUDGED if (top / name).is_dir()), None)
    if judge is not None and (top / "train").is_dir():
        raise ValueError(f"{top} has train/ and {judge}/ already; leave out data.split")
    if not top.is_dir():
        raise FileNotFoundError(f"{top} is missing, which data.root names")
    return _whole(top)


def _whole(top: Path) -> Path:
    """The folder of the classes where there is no split: ``train/`` if there is nothing else."""
    folders = [path.name for path in top.glob("*") if path.is_dir() and not is_hidden(path.name)]
    return top / "train" if folders == ["train"] else top


def _classes(tree: Path, faults: DataIssues) -> list[str]:
    folders, others = _inside(str(tree), faults)
    faults.left_out += [os.path.join(tree, name) for name in others]
    if not folders:
        raise FileNotFoundError(f"{tree} holds no folder; it needs one for each class")
    classes = [os.path.basename(path) for path in folders]
    refuse_clashes(classes, str(tree))
    return classes


def _pictures(tree: Path, classes: list[str], faults: DataIssues) -> tuple[list[str], torch.Tensor]:
    paths: list[str] = []
    target: list[int] = []
    places: dict[str, str] = {}
    for name in classes:
        real = os.path.realpath(tree / name)
        if real in places:
            raise ValueError(f"{tree}: the classes {places[real]!r} and {name!r} are one folder")
        places[real] = name
    for label, name in enumerate(classes):
        for place, files in _walk(str(tree / name), list(places), faults):
            for file in files:
                known = file.lower().endswith(EXTENSIONS)
                (paths if known else faults.left_out).append(os.path.join(place, file))
        if len(paths) == len(target):
            raise FileNotFoundError(
                f"{tree / name} holds no picture; files that end in {', '.join(EXTENSIONS)} are"
            )
        target += [label] * (len(paths) - len(target))
    return paths, torch.tensor(target)


def _walk(top: str, classes: Sequence[str], faults: DataIssues) -> list[tuple[str, list[str]]]:
    """Lists the files of every folder in a class; links lead out of the classes, not back.

    Args:
        top: The folder of the class.
        classes: The real paths of all classes.
        faults: Told of what is left out.
    """
    found, left, seen = [], [top], set(classes)
    while left:
        place = left.pop()
        folders, files = _inside(place, faults)
        found.append((place, files))
        for path in folders:
            real = os.path.realpath(path)
            back = os.path.islink(path) and any(_overlap(real, known) for known in classes)
            if back or real in seen:
                faults.left_out.append(path)
            else:
                seen.add(real)
                left.append(path)
    return sorted(found)


def _overlap(one: str, other: str) -> bool:
    return Path(one).is_relative_to(other) or Path(other).is_relative_to(one)


def _inside(place: str, faults: DataIssues) -> tuple[list[str], list[str]]:
    """Lists the paths of the folders in a folder, and the names of the files."""
    folders, files = [], []
    for name in sorted(entry.name for entry in os.scandir(place)):
        path = os.path.join(place, name)
        if is_hidden(name):
            faults.left_out.append(path)
        elif os.path.isdir(path):
            folders.append(path)
        else:
            files.append(name)
    return folders, files
