"""Shards, which hold many pictures each: their split, their labels and missing ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from topkd.data.base import DataIssues, refuse_clashes
from topkd.data.pictures import Stored, is_hidden

CLASSES = 100_000  # limit for classes without names, or the number of training pictures
EVALUATION = ("validation", "valid", "val", "test")  # the first existing split is used


def splits(root: Path, suffix: str) -> tuple[list[Path], list[Path]]:
    """Finds the training shards and the evaluation shards.

    The split is read from the name of the file (``train-00000-of-00002.parquet``) or of its folder
    (``train/0000.parquet``).

    Args:
        root: Folder to search, with its subfolders except hidden ones.
        suffix: File extension.

    Raises:
        FileNotFoundError: If there is no shard of either kind, or one is missing among them.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob(f"*{suffix}")):
        if any(map(is_hidden, path.relative_to(root).parts)):
            continue
        found.setdefault(_split(path.relative_to(root)), []).append(path)
    evaluation = next((name for name in EVALUATION if name in found), None)
    if "train" not in found or evaluation is None:
        wanted = "train" if "train" not in found else ", ".join(EVALUATION)
        raise FileNotFoundError(
            f"{root} has no shard to {'train on' if wanted == 'train' else 'evaluate on'}: "
            f"neither the name of a {suffix} file nor that of its folder contains {wanted}"
        )
    for part in ("train", evaluation):
        refuse_gaps([str(path) for path in found[part]])
    return found["train"], found[evaluation]


def _split(path: Path) -> str:
    for text in (path.stem, *reversed(path.parts[:-1])):
        said = re.search(rf"(?<![a-z])({'|'.join(('train', *EVALUATION))})(?![a-z])", text.lower())
        if said:
            return said[1]
    return ""


def refuse_gaps(paths: Sequence[str]) -> None:
    """Checks that no numbered shard is missing.

    Names with a total (``-00001-of-00008``) reveal every missing shard. Plain numbers
    (``-000001``) that start at 0 or 1 reveal gaps before the last shard.

    Raises:
        FileNotFoundError: If one is missing; the message names the first.

    Examples:
        >>> refuse_gaps(["train-0.tar", "train-2.tar"])
        Traceback (most recent call last):
        FileNotFoundError: train-1.tar is missing: there are train-0.tar to train-2.tar
    """
    groups: dict[tuple[str, str | None, str], dict[int, str]] = {}
    for path in paths:
        counted = re.match(r"(.*?)(\d+)-of-(\d+)([^/]*)$", path)
        numbered = re.match(r"(.*?)(\d+)(\D*)$", path)
        if counted:  # a hash may follow that differs from shard to shard
            groups.setdefault((counted[1], counted[3], ""), {})[int(counted[2])] = path
        elif numbered and "/" not in numbered[3]:
            groups.setdefault((numbered[1], None, numbered[3]), {})[int(numbered[2])] = path
    for (before, count, after), there in groups.items():
        first, last = min(there), max(there)
        if count is None and first > 1:  # such as a year
            continue
        wanted = range(first, last + 1) if count is None else range(int(count))
        missing = [number for number in wanted if number not in there]
        if missing:
            width = len(re.search(r"\d+", there[first][len(before) :])[0])  # type: ignore[index]
            end = after if count is None else f"-of-{count}*"
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise FileNotFoundError(
                f"{before}{missing[0]:0{width}}{end} is missing{more}: "
                f"there are {there[first]} to {there[last]}"
            )


def numbered(
    labels: Sequence[Sequence[int | str]],
    names: Sequence[str] | None,
    stored: Sequence[Stored],
    where: str,
    faults: DataIssues,
) -> tuple[list[str], list[Tensor]]:
    """Converts labels, which are numbers or names, to class numbers.

    Args:
        labels: Labels of the training and of the evaluation pictures.
        names: Class names by number, if they are known.
        stored: The pictures, which messages name.
        where: Origin of the labels, for messages.
        faults: Records classes without a training picture.

    Returns:
        The class names, and the labels as numbers.

    Raises:
        ValueError: If a number is out of range, class names clash, or a name occurs only among the
            evaluation labels.
    """
    if all(isinstance(label, int) for part in labels for label in part):
        numbers = [[int(label) for label in part] for part in labels]
        if not names:
            most, images = max(CLASSES, len(numbers[0])), len(numbers[0])
            why = f"as the classes have no names and there are {images:,} training pictures"
            _refuse_beyond(numbers[0], stored[0], most, why)
        known = names or [str(number) for number in range(max(numbers[0]) + 1)]
        why = (
            f"as there are {len(known):,} {'names of classes' if names else 'classes to train on'}"
        )
        for part, pictures in zip(numbers, stored, strict=True):
            _refuse_beyond(part, pictures, len(known), why)
    else:
        known = names or sorted({str(label) for label in labels[0]})
        place = {name: number for number, name in enumerate(known)}
        foreign = sorted({str(label) for part in labels for label in part} - place.keys())
        if foreign:
            raise ValueError(f"{where}: there are no training pictures of {', '.join(foreign)}")
        numbers = [[place[str(label)] for label in part] for part in labels]
    refuse_clashes(known, where)
    tensors = [torch.tensor(part, dtype=torch.long) for part in numbers]
    there = set(tensors[0].tolist())
    faults.empty += [name for number, name in enumerate(known) if number not in there]
    return list(known), tensors


def _refuse_beyond(labels: Sequence[int], stored: Stored, classes: int, why: str) -> None:
    """Raises an error for the first label that is not the number of a class."""
    for index, label in enumerate(labels):
        if not 0 <= label < classes:
            raise ValueError(
                f"{stored.name(index)}: expected a label from 0 to {classes - 1}, {why}; "
                f"got {label}"
            )


def listing(values: Iterable[str]) -> str:
    """Lists names for a message."""
    return ", ".join(values) or "none"
