"""Image classification data in parquet files with the layout of Hugging Face."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topkd.data.base import Data, DataIssues, ReadGroups
from topkd.data.pictures import (
    CropConfig,
    CropOptions,
    OnError,
    StorageError,
    open_bytes,
    picture_data,
    with_crop_options,
)
from topkd.data.shards import listing, numbered, splits

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Unpack


GROWTH, ALWAYS = 20, 1 << 30  # limits of an unpacked column: multiple of the file size, and bytes


class Rows:
    """Pictures in the rows of parquet files; row groups are read on demand.

    Args:
        files: The shards.
        column: Column of the pictures: bytes, or a struct with a field ``bytes``.
        buffer: Number of pictures kept in memory, besides two row groups.
    """

    def __init__(self, files: Sequence[Path], column: str, buffer: int) -> None:
        self.files, self.column, self.buffer = files, column, buffer
        inside = [_group_sizes(file) for file in files]
        self._groups = [  # (file, row group in it, first row in the file)
            (number, group, sum(sizes[:group]))
            for number, sizes in enumerate(inside)
            for group in range(len(sizes))
        ]
        sizes = np.concatenate(inside).astype(np.int64)
        self._starts = np.cumsum(sizes) - sizes
        self._blocks = np.repeat(np.arange(len(sizes)), sizes)
        self._begin()

    def _begin(self) -> None:
        self._kept: OrderedDict[int, list[bytes | None]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @property
    def blocks(self) -> ReadGroups:
        """The row group of each picture."""
        return ReadGroups(self._blocks, self.buffer)

    def name(self, index: int) -> str:
        """Returns the file and the row, counted from 0."""
        group = self._blocks[index]
        number, _, first = self._groups[group]
        return f"{self.files[number]}, row {first + index - self._starts[group]}"

    def open(self, index: int) -> Image.Image:
        """Opens a picture in any mode."""
        group = int(self._blocks[index])
        row = int(index - self._starts[group])
        with self._lock:
            column = self._column(group)
        return open_bytes(column[row])

    def _column(self, group: int) -> list[bytes | None]:
        """Reads a row group, or returns it from the cache."""
        if group not in self._kept:
            self._kept[group] = self._read(group)
            size = sum(len(column) for column in self._kept.values())
            while len(self._kept) > 2 and size > 2 * self.buffer:
                size -= len(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(group)
        return self._kept[group]

    def _read(self, group: int) -> list[bytes | None]:
        import pyarrow
        from pyarrow import compute
        from pyarrow import parquet as files

        number, inside, _ = self._groups[group]
        path = self.files[number]
        try:
            with files.ParquetFile(path) as file:
                _refuse_growth(file, path, self.column, [inside])
                column = pyarrow.chunked_array(_read_in_batches(file, path, self.column, inside))
        except (pyarrow.ArrowException, OSError, IndexError) as error:
            raise StorageError(f"{path} can no longer be read: {error}") from error
        if pyarrow.types.is_struct(column.type):
            column = compute.struct_field(column, "bytes")
        pictures: list[bytes | None] = column.to_pylist()  # faster than row by row
        return pictures


@with_crop_options
def parquet(
    *,
    root: str,
    image: str | None = None,
    label: str | None = None,
    buffer: int = 2048,
    on_error: OnError = "stop",
    **pictures: Unpack[CropOptions],
) -> Data:
    """Loads pictures from parquet files in the layout of Hugging Face.

    The split is read from the name of the file (``data/train-00000-of-00002.parquet``) or of its
    folder (``train/0000.parquet``). Evaluation prefers validation to test. Pictures stay
    on disk: row groups are read on demand, in a random order that mixes about ``buffer`` pictures.

    Args:
        root: Folder with the files, or with folders of them.
        image: Column of the pictures. Defaults to the one that the files describe as such, or else
            to ``image`` or ``img``.
        label: Column of the labels, integers or names. Defaults to the only one that the files
            describe as such, or else to ``label``.
        buffer: Size of the shuffle buffer, in encoded pictures. A set that is no larger is
            shuffled completely.
        on_error: Whether an unreadable training picture raises an error or is replaced by the next
            picture of its class. An unreadable evaluation picture always raises an error.
        **pictures: Cropping and normalization: see :class:`topkd.data.pictures.CropConfig`.

    Raises:
        FileNotFoundError: If a split has no files, or one is missing.
        ValueError: If a file cannot be read or lacks a column, or a label is not a class.
    """
    frame = CropConfig(**pictures)
    top, faults = Path(root).expanduser(), DataIssues()
    parts = splits(top, ".parquet")
    image, label, names = _columns(parts[0][0], image, label)
    _refuse_unlike(parts[0] + parts[1], image, label, names)
    labels = [labels_of(files, label) for files in parts]
    rows = [Rows(files, image, buffer) for files in parts]
    classes, target = numbered(labels, names, rows, str(top), faults)
    return picture_data(f"parquet {top.name}", rows, target, classes, frame, on_error, faults)


def _columns(file: Path, image: str | None, label: str | None) -> tuple[str, str, Any]:
    """Finds the columns of pictures and labels, and the class names if they are recorded."""
    columns, described = schema(file)
    pictures = [name for name, about in described.items() if about.get("_type") == "Image"]
    labels = [name for name, about in described.items() if about.get("_type") == "ClassLabel"]
    for what, given, known, usual in (
        ("image", image, pictures, ("image", "img")),
        ("label", label, labels, ("label", "labels")),
    ):
        candidates = [given] if given else known or [name for name in usual if name in columns]
        if len(candidates) != 1 or candidates[0] not in columns:
            chosen = listing(candidates) if given or len(candidates) > 1 else "none is described"
            raise ValueError(
                f"{file} has the columns {listing(columns)}; set data.{what} to the one that holds "
                f"the {what}s (got {chosen})"
            )
        image, label = (candidates[0], label) if what == "image" else (image, candidates[0])
    assert image is not None
    assert label is not None
    return image, label, described.get(label, {}).get("names")


def _refuse_unlike(files: Sequence[Path], image: str, label: str, names: Any) -> None:
    for file in files:
        columns, described = schema(file)
        if not {image, label} <= set(columns):
            raise ValueError(
                f"{file} has the columns {listing(columns)}; the first file has {image} and {label}"
            )
        if described.get(label, {}).get("names") != names:
            raise ValueError(f"{file} has other classes than {files[0]}, or another order")


def labels_of(files: Sequence[Path], column: str) -> list[int | str]:
    """Reads the labels of all rows.

    Raises:
        ValueError: If a file cannot be read, there is no row, or a label is neither an integer
            nor a name.
    """
    labels: list[int | str] = []
    for file in files:
        with _opened(file, dictionaries=[column]) as table:
            _refuse_growth(table, file, column, range(table.metadata.num_row_groups))
            found = _values(table.read(columns=[column])[column])
        for row, value in enumerate(found):
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise ValueError(
                    f"{file}, row {row}: expected a whole number or a name as label, got {value!r}"
                )
        labels += found
    if not labels:
        raise ValueError(f"{files[0].parent}: the parquet files contain no picture")
    return labels


def schema(file: Path) -> tuple[list[str], dict[str, Any]]:
    """Reads the column names and the features in Hugging Face's metadata.

    Raises:
        ValueError: If the file cannot be read.
    """
    with _opened(file) as table:
        arrow = table.schema_arrow
    try:
        about = json.loads((arrow.metadata or {}).get(b"huggingface", b"{}"))
        features = about.get("info", {}).get("features", {})
        described = {name: each for name, each in features.items() if isinstance(each, dict)}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: its Hugging Face metadata are damaged: {error}") from error
    for name, each in described.items():
        names = each.get("names")
        if each.get("_type") != "ClassLabel" or names is None:
            continue
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"{file}: expected a list of names of {name}, got {names!r:.80}")
    return list(arrow.names), described


def _group_sizes(file: Path) -> list[int]:
    with _opened(file) as table:
        groups = range(table.metadata.num_row_groups)
        return [table.metadata.row_group(group).num_rows for group in groups]


def _values(column: Any) -> list[Any]:
    """Lists the values of a column; dictionary values share memory."""
    import pyarrow

    if not pyarrow.types.is_dictionary(column.type):
        values: list[Any] = column.to_pylist()
        return values
    found: list[Any] = []
    for chunk in column.chunks:
        known = chunk.dictionary.to_pylist()
        places = chunk.indices.to_pylist()
        found += [None if place is None else known[place] for place in places]
    return found


@contextmanager
def _opened(file: Path, dictionaries: Sequence[str] = ()) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet as files

    try:
        with files.ParquetFile(file, read_dictionary=list(dictionaries)) as table:
            rows, size = table.metadata.num_rows, file.stat().st_size
            if rows > size:  # a picture takes more than a byte
                raise ValueError(
                    f"{file} has {size:,} bytes and declares {rows:,} rows of pictures"
                )
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}") from error


def _refuse_growth(table: Any, file: Path, column: str, groups: Iterable[int]) -> None:
    """Refuses row groups whose uncompressed size is implausible."""
    inside = [table.metadata.row_group(group) for group in groups]
    chunks = [group.column(number) for group in inside for number in range(group.num_columns)]
    unpacked = sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] == column
    )
    _refuse_larger(unpacked, file, column)


def _read_in_batches(table: Any, file: Path, column: str, group: int) -> list[Any]:
    """Reads a column in small batches, so that a false size is detected early."""
    pieces, size = [], 0
    for batch in table.iter_batches(64, row_groups=[group], columns=[column]):
        pieces.append(batch.column(0))
        size += batch.nbytes
        _refuse_larger(size, file, column)
    return pieces


def _refuse_larger(unpacked: int, file: Path, column: str) -> None:
    size = file.stat().st_size
    if unpacked > max(ALWAYS, GROWTH * size):
        raise StorageError(
            f"{file} has {size:,} bytes, and its {column} would unpack to {unpacked:,} or more; at "
            f"most {GROWTH} times the size of the file is read"
        )
