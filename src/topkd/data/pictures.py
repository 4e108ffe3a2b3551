"""Pictures that are decoded on demand: formats, cropping, resizing, error handling."""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, TypeVar, get_type_hints

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from topkd.data.augment import crop_and_flip, draws, normalize
from topkd.data.base import Data, DataIssues, Images, ReadGroups, Subset

if TYPE_CHECKING:
    from PIL import Image

MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet statistics, as pretrained networks use
# Pillow supports other formats; EPS, for example, runs a program on the content of the file.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

CROP = 7 / 8  # fraction of the shorter side, the usual central crop for ImageNet
SMALL = 128  # pixels; for smaller pictures, threads cost more time than they save

OnError = Literal["stop", "skip"]


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is hidden or written by the operating system.

    Examples:
        >>> [is_hidden(name) for name in ("._0.png", ".ipynb_checkpoints", "@eaDir", "0.png")]
        [True, True, True, False]
    """
    return name.startswith(".") or name in ("@eaDir", "__MACOSX")


class StorageError(ValueError):
    """Raised if a shard cannot be read. Unlike a single unreadable picture, it is never skipped."""


class Stored(Protocol):
    """Storage of pictures."""

    @property
    def blocks(self) -> ReadGroups | None:
        """Read groups, or None if pictures can be read in any order at the same cost."""

    def name(self, index: int) -> str:
        """Returns a name by which a user can find the picture."""

    def open(self, index: int) -> Image.Image:
        """Opens a picture in any mode."""


class Names(Sequence[str]):
    """Many strings in one buffer, which processes share.

    Examples:
        >>> list(Names(["a.png", "ä.png"]))
        ['a.png', 'ä.png']
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return os.fsdecode(self._bytes[self._ends[place] : self._ends[place + 1]])


@dataclass(frozen=True)
class CropConfig:
    """How pictures are cropped, resized and normalized.

    Without padding, training uses a random crop of 8 to 100 % of the area with an aspect ratio of
    3/4 to 4/3, and evaluation uses a central square. With padding, the full picture is resized to
    the square, and training crops it at random from a black border.

    The central square has ``crop`` times the shorter side, like timm's ``crop_pct``. The default
    is 7/8, but at least ``size`` pixels where a picture is large enough, so that pictures that
    already have the size are unchanged.

    Args:
        size: Height and width of the network's input, in pixels.
        padding: Width of the black border for random crops in training, for small pictures.
        crop: Side of the central crop for evaluation as a fraction of the shorter side.
        flip: Whether to apply random horizontal flips in training.
        mean: Channel means of the normalization, for values in [0, 1].
        std: Channel standard deviations of the normalization.

    References:
        Going Deeper with Convolutions (Szegedy et al., CVPR 2015), for the random crop
        https://arxiv.org/abs/1409.4842
    """

    size: int = 224
    padding: int | None = None
    crop: float | None = None
    flip: bool = True
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        if self.size < 1 or (self.padding or 0) < 0:
            raise ValueError(
                f"size must be 1 or more and padding 0 or more, got {self.size} and {self.padding}"
            )
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"crop must be above 0 and at most 1, got {self.crop}")
        if self.crop is not None and self.padding is not None:
            raise ValueError("padding scales the complete picture; leave out crop, or padding")

    def middle(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Computes the central square of a picture of (width, height): left, top, right, bottom."""
        width, height = size
        shorter = min(size)
        if self.crop is None:
            side = max(CROP * shorter, min(shorter, self.size))
        else:
            side = self.crop * shorter
        left, top = (width - side) / 2, (height - side) / 2
        if side == self.size:  # aligned to pixels, so that nothing is resampled
            left, top = left // 1, top // 1
        return left, top, left + side, top + side


class CropOptions(TypedDict, total=False):
    """Options of :class:`CropConfig`, as type checkers see them."""

    size: int
    padding: int | None
    crop: float | None
    flip: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


Source = TypeVar("Source", bound=Callable[..., Data])


def with_crop_options(source: Source) -> Source:
    """Lists the options of :class:`CropConfig` in the signature of a function that takes them.

    Recipes are checked against this signature.

    Args:
        source: Function with the argument ``**pictures: Unpack[CropOptions]``.
    """
    given, crop = inspect.signature(source), inspect.signature(CropConfig)
    *own, _ = given.parameters.values()
    options = [each.replace(kind=each.KEYWORD_ONLY) for each in crop.parameters.values()]
    del source.__annotations__["pictures"]
    source.__annotations__.update(get_type_hints(CropConfig))
    source.__signature__ = given.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return source


@dataclass(frozen=True)
class Pictures:
    """Pictures of any format and size, decoded in parallel.

    An unreadable picture raises an error, or is permanently replaced by the next readable picture
    of its class, so that the number of images, their labels and their order do not change.
    """

    stored: Stored
    target: Tensor  # (images,)
    frame: CropConfig
    on_error: OnError = "stop"
    faults: DataIssues = field(default_factory=DataIssues)

    @property
    def blocks(self) -> ReadGroups | None:
        """Read groups of the storage."""
        return self.stored.blocks

    def read_bytes(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads bytes (n, h, w, 3); ``augmented`` is (seed, epoch), None for plain."""
        frame, places = self.frame, index.tolist()
        if frame.padding is not None:
            pixels = stacked(frame.size, self._plain, places)
            if augmented is None:
                return pixels
            uniform = draws(*augmented, index, 3)
            return crop_and_flip(pixels, uniform, padding=frame.padding, flip=frame.flip)
        if augmented is None:
            return stacked(frame.size, self._plain, places)
        uniform = draws(*augmented, index, 5)
        return stacked(frame.size, self._part, places, uniform.tolist())

    def read(self, index: Tensor, augmented: tuple[int, int] | None) -> Tensor:
        """Reads normalized images (n, 3, h, w); ``augmented`` is (seed, epoch), None for plain."""
        return normalize(self.read_bytes(index, augmented), self.frame.mean, self.frame.std)

    def _plain(self, index: int) -> np.ndarray:
        return evaluation_pixels(self._picture(index), self.frame)

    def _part(self, index: int, uniform: list[float]) -> np.ndarray:
        picture = self._picture(index)
        pixels = _resized(picture, self.frame.size, _random_box(picture.size, uniform))
        return pixels[:, ::-1] if self.frame.flip and uniform[4] < 0.5 else pixels

    def _picture(self, index: int) -> Image.Image:
        from PIL import Image

        for place in same_class(self.target, index):
            try:
                with self.stored.open(place) as opened:
                    return in_color(opened)
            except StorageError:
                raise
            except (*UNREADABLE, Image.DecompressionBombError) as error:
                name = self.stored.name(place)
                fault = f"{name}: not a readable image: {reason(error)}"
                if self.on_error == "stop":
                    raise ValueError(fault) from error
                self.faults.unreadable[name] = fault
        raise ValueError(
            f"{self.stored.name(index)}: not a readable image, nor is any other of class "
            f"{int(self.target[index])}"
        )


def evaluation_pixels(picture: Image.Image, frame: CropConfig) -> np.ndarray:
    """Prepares an RGB picture for evaluation: bytes (size, size, 3), without augmentation."""
    box = None if frame.padding is not None else frame.middle(picture.size)
    return _resized(picture, frame.size, box)


def _resized(
    picture: Image.Image, side: int, box: tuple[float, float, float, float] | None
) -> np.ndarray:
    from PIL import Image

    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR, box))


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """Lists picture files: the given files, and the files below the given folders in sorted order.

    Hidden files and files without one of :data:`EXTENSIONS` are ignored in folders.

    Raises:
        FileNotFoundError: If a path does not exist, or a folder holds no picture.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(f"there is no file or folder {path}")
            found.append(path)
            continue
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.name.lower().endswith(EXTENSIONS)
            and not any(map(is_hidden, file.relative_to(path).parts))
            and file.is_file()
        ]
        if not inside:
            raise FileNotFoundError(
                f"{path} contains no picture; the extensions are {', '.join(EXTENSIONS)}"
            )
        found += inside
    return found


def open_picture(path: Path) -> Image.Image:
    """Reads a picture file as an upright RGB image.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be decoded; the message names it.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as opened:
            return in_color(opened)
    except FileNotFoundError:
        raise
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image: {reason(error)}") from error


def with_crop(images: Images, crop: float) -> Images | None:
    """Returns the same images with another ``crop``, or None if they have no such option."""
    if isinstance(images, Subset):
        inner = with_crop(images.images, crop)
        return None if inner is None else replace(images, images=inner)
    if not isinstance(images, Pictures) or images.frame.padding is not None:
        return None
    return replace(images, frame=replace(images.frame, crop=crop))


def picture_data(
    name: str,
    stored: Sequence[Stored],
    target: Sequence[Tensor],
    classes: Sequence[str],
    frame: CropConfig,
    on_error: OnError,
    faults: DataIssues,
) -> Data:
    """Builds a data set from stored pictures; evaluation pictures are never replaced."""
    train = Pictures(stored[0], target[0], frame, on_error, faults)
    test = Pictures(stored[1], target[1], frame, "stop", faults)
    return Data(name, train, test, classes, frame.mean, frame.std, faults=faults)


UNREADABLE = (OSError, ValueError, TypeError, SyntaxError, EOFError, IndexError, KeyError)
"""Exceptions of decoders for damaged pictures, besides ``DecompressionBombError``."""


def reason(error: Exception) -> str:
    """Summarizes in one line why a picture cannot be read."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "its bytes are of no known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def open_bytes(content: bytes | None) -> Image.Image:
    """Opens a picture in memory.

    Raises:
        OSError: If the content is empty or of an unknown format.
    """
    from PIL import Image

    if not content:
        raise OSError("it is empty")
    return Image.open(io.BytesIO(content), formats=FORMATS)


def same_class(target: Tensor, index: int) -> Iterator[int]:
    """Yields an image, then the other images of its class, cyclically."""
    yield index
    same = (target == target[index]).nonzero()[:, 0].tolist()
    here = same.index(index)
    yield from same[here + 1 :] + same[:here]


def stacked(side: int, make: Callable[..., np.ndarray], *arguments: Iterable[Any]) -> Tensor:
    """Calls ``make`` for every picture and stacks the results, in threads if that is faster.

    Worker processes use a single thread.
    """
    if side <= SMALL or get_worker_info() is not None:
        made = list(map(make, *arguments))
    else:
        with ThreadPoolExecutor(cores()) as threads:
            made = list(threads.map(make, *arguments))
    return torch.from_numpy(np.stack(made))


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_color(picture: Image.Image) -> Image.Image:
    """Converts a picture of any mode to 8-bit RGB and applies its EXIF orientation.

    Raises:
        ValueError: If the range of its values is unknown.
        OSError: If it cannot be decoded.
    """
    from PIL import Image

    picture.load()
    turn = _UPRIGHT.get(_orientation(picture))
    if picture.mode == "F" or picture.mode.startswith("I"):  # PIL would clip these
        picture = Image.fromarray(_bytes(np.asarray(picture), picture))
    elif picture.mode == "P":  # a palette, perhaps with a transparent color
        picture = picture.convert("RGBA")
    color = picture.convert("RGB")
    return color if turn is None else color.transpose(Image.Transpose(turn))


_UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation -> PIL's transposition


def _orientation(picture: Image.Image) -> int:
    if picture.format == "TIFF":  # rotated on load; old versions of Pillow keep the tag
        return 1
    try:
        orientation: int = picture.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata; the picture itself is readable
        return 1
    return orientation


def _bytes(values: np.ndarray, picture: Image.Image) -> np.ndarray:
    """Converts 16-bit or float grayscale to bytes."""
    least, most = values.min(), values.max()
    if picture.mode == "F":
        if not (least >= 0 and most <= 1):
            raise ValueError(f"floats must be from 0 to 1, got {least:.4g} to {most:.4g}")
        return (255 * values).round().astype(np.uint8)
    # Old versions of Pillow open 16-bit PNG files as 32-bit.
    if picture.mode == "I" and picture.format not in ("PNG", "PPM"):
        if least < 0 or most > 65535:
            raise ValueError(f"integers must be from 0 to 65535, got {least} to {most}")
        if 0 < most < 256:
            raise ValueError(
                f"32-bit integers from {least} to {most} would be nearly black, as 65535 is "
                "white; save them with 8 bits"
            )
    return (values // 257).astype(np.uint8)


def _random_box(size: tuple[int, int], uniform: list[float]) -> tuple[float, float, float, float]:
    """Computes a random crop from area, aspect ratio and position, inside the picture."""
    width, height = size
    area = (0.08 + 0.92 * uniform[0]) * width * height
    ratio = (3 / 4) * (16 / 9) ** uniform[1]  # log-uniform from 3/4 to 4/3
    box_width = min(width, (area * ratio) ** 0.5)
    box_height = min(height, (area / ratio) ** 0.5)
    left, top = uniform[2] * (width - box_width), uniform[3] * (height - box_height)
    return left, top, left + box_width, top + box_height
