"""Labeled images, splits and data sets."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from topkd.data.augment import crop_and_flip, draws, normalize


class ReadGroups(NamedTuple):
    """Groups of images that storage reads together, such as the row groups of a file."""

    of: np.ndarray  # (images,), the group of each image
    buffer: int  # number of images that a shuffle mixes


class Images(Protocol):
    """Labeled images that can be read by index."""

    @property
    def target(self) -> Tensor:
        """(images,)."""

    @property
    def blocks(self) -> ReadGroups | None:
        """Read groups, or None if images can be read in any order at the same cost."""

    def read_bytes(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads bytes (n, h, w, 3); ``augmented`` is (seed, epoch), None for plain."""

    def read(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads normalized images (n, 3, h, w); ``augmented`` is (seed, epoch), None for plain."""


@dataclass(frozen=True)
class InMemory:
    """Images of one size in memory, stored as bytes and augmented per batch.

    Raises:
        ValueError: If the pixels are not bytes of that shape, or not as many as the labels.

    Examples:
        >>> images = InMemory(torch.zeros(10, 8, 8, 3, dtype=torch.uint8), torch.zeros(10).long(),
        ...                   mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), padding=1, flip=False)
        >>> images.read(torch.arange(4), augmented=(0, 1)).shape
        torch.Size([4, 3, 8, 8])
    """

    pixels: Tensor  # (images, h, w, 3), uint8
    target: Tensor  # (images,)
    mean: Sequence[float]
    std: Sequence[float]
    padding: int  # border of the random crop
    flip: bool

    def __post_init__(self) -> None:
        pixels = self.pixels
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            got = f"{pixels.dtype} {tuple(pixels.shape)}"
            raise ValueError(f"pixels must be bytes (images, h, w, 3), got {got}")
        if self.target.shape != pixels.shape[:1]:
            raise ValueError(f"{len(pixels)} images need as many labels, got {len(self.target)}")

    @property
    def blocks(self) -> None:
        """None, since memory can be read in any order."""

    def read_bytes(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads bytes (n, h, w, 3); ``augmented`` is (seed, epoch), None for plain."""
        pixels = self.pixels[index]
        if augmented is None:
            return pixels
        uniform = draws(*augmented, index, 3)
        return crop_and_flip(pixels, uniform, padding=self.padding, flip=self.flip)

    def read(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads normalized images (n, 3, h, w); ``augmented`` is (seed, epoch), None for plain."""
        return normalize(self.read_bytes(index, augmented), self.mean, self.std)


@dataclass(frozen=True)
class WrappedImages:
    """Base of sets that change the pixels of another set."""

    images: Images

    @property
    def target(self) -> Tensor:
        """(images,)."""
        return self.images.target

    @property
    def blocks(self) -> ReadGroups | None:
        """Read groups of the images."""
        return self.images.blocks


@dataclass(frozen=True)
class Subset:
    """A subset of another set of images, with its own index."""

    images: Images
    index: Tensor  # (images,), indices in the other set

    @property
    def target(self) -> Tensor:
        """(images,)."""
        return self.images.target[self.index]

    @property
    def blocks(self) -> ReadGroups | None:
        """Read groups of the other set, restricted to the subset."""
        blocks = self.images.blocks
        return None if blocks is None else blocks._replace(of=blocks.of[self.index.numpy()])

    def read_bytes(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads bytes (n, h, w, 3); ``augmented`` is (seed, epoch), None for plain."""
        return self.images.read_bytes(self.index[index], augmented)

    def read(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads normalized images (n, 3, h, w); ``augmented`` is (seed, epoch), None for plain."""
        return self.images.read(self.index[index], augmented)


@dataclass
class DataIssues:
    """Record of unreadable, skipped or missing samples.

    Examples:
        >>> faults = DataIssues(left_out=["train/cat/notes.txt"])
        >>> faults.lines()
        ['1 file that is not a picture was left out: train/cat/notes.txt']
    """

    unreadable: dict[str, str] = field(default_factory=dict)  # name of a picture -> reason
    left_out: list[str] = field(default_factory=list)  # files without a picture or a label
    empty: list[str] = field(default_factory=list)  # classes without a training picture

    def lines(self) -> list[str]:
        """Summarizes each kind of issue in one line: the count and the first ten names."""
        lines = []
        if self.left_out:
            what = "file that is not a picture was" if len(self.left_out) == 1 else _MANY_LEFT_OUT
            lines.append(f"{len(self.left_out)} {what} left out: {_first(self.left_out)}")
        if self.unreadable:
            what = "picture" if len(self.unreadable) == 1 else "pictures"
            named = _first(list(self.unreadable.values()))
            replaced = "replaced by the next of the same class"
            lines.append(f"{len(self.unreadable)} unreadable {what} {replaced}: {named}")
        if self.empty:
            what = "class has" if len(self.empty) == 1 else "classes have"
            lines.append(f"{len(self.empty)} {what} no training picture: {_first(self.empty)}")
        return lines

    def facts(self) -> dict[str, Any]:
        """Returns the counts and the first ten names of each kind, for ``result.json``."""
        kinds = {"unreadable": list(self.unreadable), "left_out": self.left_out}
        kinds["classes_without_training_picture"] = self.empty
        return {
            kind: {"count": len(names), "first": names[:10]}
            for kind, names in kinds.items()
            if names
        }


_MANY_LEFT_OUT = "files that are not pictures were"


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


@dataclass(frozen=True)
class Data:
    """A data set with a training split and an evaluation split."""

    name: str
    train: Images
    test: Images  # the validation split if one is configured
    classes: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    eval_split: str = "test"
    faults: DataIssues = field(default_factory=DataIssues)

    def __post_init__(self) -> None:
        for part, images in (("training", self.train), ("test", self.test)):
            wrong = (images.target < 0) | (images.target >= len(self.classes))
            if wrong.any():
                where = int(wrong.nonzero()[0])
                raise ValueError(
                    f"{self.name}: {part} image {where} has label {int(images.target[where])}, "
                    f"but there are {len(self.classes)} classes (0 to {len(self.classes) - 1})"
                )

    def with_validation(self, share: float) -> Data:
        """Evaluates on a stratified share of the training images instead of the test set.

        The split depends only on the labels, so it is the same for every seed and method.

        Raises:
            ValueError: If a class has no image in one of the two parts.
        """
        kept, chosen = stratified_split(
            self.train.target, share, f"{self.name}: a validation share"
        )
        # An unreadable training image may be replaced; an evaluation image may not.
        train: Any = self.train
        strict = replace(train, on_error="stop") if hasattr(train, "on_error") else train
        remaining, held_out = Subset(self.train, kept), Subset(strict, chosen)
        return replace(self, train=remaining, test=held_out, eval_split="validation")

    def with_limit(self, images: int) -> Data:
        """Limits training to a number of images, in :func:`stratified_order`.

        A smaller number is a subset of a larger one. Classes left without an image are recorded in
        :attr:`faults`.
        """
        target = self.train.target
        chosen = stratified_order(target)[:images].sort().values
        lost = sorted(set(target.tolist()) - set(target[chosen].tolist()))
        self.faults.empty += [self.classes[label] for label in lost]
        return replace(self, train=Subset(self.train, chosen))

    def with_fraction(self, fraction: float) -> Data:
        """Limits training to a stratified fraction of the images, in :func:`stratified_order`.

        A smaller fraction is a subset of a larger one. Every class keeps at least one image.
        """
        target = self.train.target
        count = max(round(fraction * len(target)), len(target.unique()))
        chosen = stratified_order(target)[:count].sort().values
        return replace(self, train=Subset(self.train, chosen))

    def with_test_limit(self, images: int) -> Data:
        """Limits evaluation to a number of images, in :func:`stratified_order`.

        A smaller number is a subset of a larger one. With fewer images than classes, only the
        largest classes keep an image.
        """
        chosen = stratified_order(self.test.target)[:images].sort().values
        return replace(self, test=Subset(self.test, chosen))


def stratified_order(target: Tensor) -> Tensor:
    """Orders images so that the first n are stratified for every n. Depends only on the labels.

    First comes one image of every class, the largest class first. Each following image is of the
    class with the largest quotient count / (2 * placed + 1), which is Sainte-Laguë's method of
    apportionment. Within a class, the order is random but always the same.

    Args:
        target: Labels of the images, (n,).

    Returns:
        A permutation of the indices, (n,).

    Examples:
        >>> target = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> target[stratified_order(target)].tolist()
        [0, 1, 0, 0, 1, 0]
    """
    labels = target.numpy()
    quantile, is_first = np.zeros(len(labels)), np.zeros(len(labels), bool)
    for images in _permuted(target):
        quantile[images] = (np.arange(len(images)) + 0.5) / len(images)
        is_first[images[0]] = True
    return torch.from_numpy(np.lexsort((labels, quantile, ~is_first)))


def stratified_split(target: Tensor, share: float, what: str) -> tuple[Tensor, Tensor]:
    """Splits images into two stratified parts. The split depends only on the labels.

    Args:
        target: Labels of the images, (n,).
        share: Share of the second part.
        what: Name of the share, for the message.

    Returns:
        The indices of both parts.

    Raises:
        ValueError: If the share leaves a class without an image in either part.
    """
    chosen = _by_class(target, share)
    kept = np.setdiff1d(np.arange(len(target)), chosen)
    for part in (chosen, kept):
        if len(set(target[part].tolist())) < len(set(target.tolist())):
            raise ValueError(f"{what} of {share} leaves a class without images")
    return torch.from_numpy(kept), torch.from_numpy(chosen)


def _by_class(target: Tensor, share: float) -> np.ndarray:
    """Selects a share of the images of every class, the same for every call."""
    chosen = [images[: round(share * len(images))] for images in _permuted(target)]
    return np.sort(np.concatenate(chosen))


def _permuted(target: Tensor) -> Iterator[np.ndarray]:
    """Yields the indices of every class in a random order, the same for every call."""
    generator = np.random.default_rng(20240721)  # arbitrary, but must never change
    labels = target.numpy()
    for label in np.unique(labels):
        yield generator.permutation(np.flatnonzero(labels == label))


def same_order(data: Sequence[str], teacher: Sequence[str], origin: str = "the teacher") -> None:
    """Checks that the teacher and the data set have the same classes in the same order.

    If either side has only numbers as names ("0", "1", ...), only the class count is compared.

    Args:
        data: Class names of the data set, in order.
        teacher: Class names that the teacher was trained on.
        origin: Origin of the teacher's names, for the message.

    Raises:
        ValueError: If they differ; the message names the first difference.

    Examples:
        >>> same_order(["cat", "dog"], ["dog", "cat"])
        Traceback (most recent call last):
        ValueError: class 0 is 'cat' in the data and 'dog' for the teacher: the same names in ...
    """
    if len(data) != len(teacher):
        raise ValueError(f"the data have {len(data)} classes, but {origin} has {len(teacher)}")
    numbers = [str(number) for number in range(len(data))]
    if numbers in (list(data), list(teacher)):
        return
    for number, (here, there) in enumerate(zip(data, teacher, strict=True)):
        if here != there:
            hint = ": the same names in another order" if set(data) == set(teacher) else ""
            raise ValueError(
                f"class {number} is {here!r} in the data and {there!r} for {origin}{hint}"
            )


def refuse_clashes(classes: Sequence[str], where: str) -> None:
    """Checks that class names differ in more than case and Unicode normalization.

    Raises:
        ValueError: If two do not; the message names the first two.
    """
    seen: dict[str, str] = {}
    for name in classes:
        plain = unicodedata.normalize("NFC", name).casefold()
        if plain in seen:
            raise ValueError(
                f"{where}: the classes {seen[plain]!r} and {name!r} differ only in "
                "case or in the encoding of accents; give them one name"
            )
        seen[plain] = name
