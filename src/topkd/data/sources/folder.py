"""Picture folders with one subfolder per class, like ImageNet."""

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
    CropConfig,
    CropOptions,
    Names,
    OnError,
    is_hidden,
    picture_data,
    with_crop_options,
)

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Unpack


EVALUATION = ("val", "test")  # the first existing folder is used


@dataclass(frozen=True)
class Files:
    """Pictures in individual files."""

    paths: Names

    @property
    def blocks(self) -> None:
        """None, since files can be read in any order."""

    def name(self, index: int) -> str:
        """Returns the path."""
        path: str = self.paths[index]
        return path

    def open(self, index: int) -> Image.Image:
        """Opens a picture, of any mode."""
        from PIL import Image

        path = self.paths[index]
        if not os.path.getsize(path):
            raise OSError("it is empty")
        return Image.open(path, formats=FORMATS)


@with_crop_options
def folder(
    *,
    root: str,
    split: float | None = None,
    on_error: OnError = "stop",
    **pictures: Unpack[CropOptions],
) -> Data:
    """Loads pictures from ``train/<class>/*`` and ``val/<class>/*`` (or ``test/<class>/*``).

    Hidden files and folders, and links that lead back into a class, are skipped and reported.

    Args:
        root: Folder with the two trees.
        split: For ``<class>/*`` without the two trees: the share of each class for evaluation. The
            split is fixed as long as no picture is added or removed.
        on_error: Whether an unreadable training picture raises an error or is replaced by the next
            picture of its class. An unreadable evaluation picture always raises an error.
        **pictures: Cropping and normalization: see :class:`topkd.data.pictures.CropConfig`.

    Raises:
        FileNotFoundError: If a tree is missing, or a class holds no picture.
        ValueError: If the classes of the two trees differ, two class names differ only in case,
            two classes are the same folder, or a split leaves a class without pictures.
    """
    frame = CropConfig(**pictures)
    top, faults = Path(root).expanduser(), DataIssues()
    if split is None:
        trees = _trees(top)
        classes, others = (_classes(tree, faults) for tree in trees)
        if classes != others:
            odd = ", ".join(sorted(set(classes) ^ set(others)))
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
    """Finds the training folder and the evaluation folder."""
    evaluation = next((name for name in EVALUATION if (top / name).is_dir()), EVALUATION[0])
    trees = [top / "train", top / evaluation]
    for tree in trees:
        if not tree.is_dir():
            raise FileNotFoundError(
                f"{tree} is missing: data.root needs train/ and val/ or test/; data.split=0.2 "
                f"evaluates on a share of the pictures in {_class_root(top)}/<class>/ instead"
            )
    return trees


def _unsplit(top: Path, share: float) -> Path:
    """Finds the folder of the classes for a random split."""
    if not 0 < share < 1:
        raise ValueError(f"split must be between 0 and 1, got {share}")
    evaluation = next((name for name in EVALUATION if (top / name).is_dir()), None)
    if evaluation is not None and (top / "train").is_dir():
        raise ValueError(f"{top} has train/ and {evaluation}/ already; leave out data.split")
    if not top.is_dir():
        raise FileNotFoundError(f"{top} is missing; data.root names it")
    return _class_root(top)


def _class_root(top: Path) -> Path:
    """Returns the folder of the classes without a split: ``train/`` if it is the only folder."""
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
            raise ValueError(
                f"{tree}: the classes {places[real]!r} and {name!r} are the same folder"
            )
        places[real] = name
    for label, name in enumerate(classes):
        for place, files in _walk(str(tree / name), list(places), faults):
            for file in files:
                known = file.lower().endswith(EXTENSIONS)
                (paths if known else faults.left_out).append(os.path.join(place, file))
        if len(paths) == len(target):
            raise FileNotFoundError(
                f"{tree / name} contains no picture; the extensions are {', '.join(EXTENSIONS)}"
            )
        target += [label] * (len(paths) - len(target))
    return paths, torch.tensor(target)


def _walk(top: str, classes: Sequence[str], faults: DataIssues) -> list[tuple[str, list[str]]]:
    """Lists the files of every folder in a class, without links that lead back into a class.

    Args:
        top: The folder of the class.
        classes: The real paths of all classes.
        faults: Records what is skipped.
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
