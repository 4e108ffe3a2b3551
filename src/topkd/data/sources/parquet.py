"""Any image classification set as Hugging Face stores it: parquet files, one or many."""

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
    MEAN,
    STD,
    CropConfig,
    OnError,
    StorageError,
    open_bytes,
    picture_data,
)
from topkd.data.shards import listing, numbered, splits

if TYPE_CHECKING:
    from PIL import Image


GROWTH, ALWAYS = 20, 1 << 30  # times the file's bytes, and bytes, to which a column may unpack


class Rows:
    """Pictures in the rows of parquet files; row groups are read when one of their rows is wanted.

    Args:
        files: The shards.
        column: With the pictures: bytes, or a struct with a field ``bytes``.
        buffer: Pictures that are kept in memory, apart from two row groups.
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
        self._kept: OrderedDict[int, Any] = OrderedDict()
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
        """The file and the row in it, counted from 0."""
        group = self._blocks[index]
        number, _, first = self._groups[group]
        return f"{self.files[number]}, row {first + index - self._starts[group]}"

    def open(self, index: int) -> Image.Image:
        """Opens a picture, of any mode."""
        group = int(self._blocks[index])
        row = int(index - self._starts[group])
        with self._lock:
            column = self._column(group)
        return open_bytes(column[row].as_py())

    def _column(self, group: int) -> Any:
        """Reads a row group, or takes it from those that were wanted last."""
        if group not in self._kept:
            self._kept[group] = self._read(group)
            size = sum(len(column) for column in self._kept.values())
            while len(self._kept) > 2 and size > 2 * self.buffer:
                size -= len(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(group)
        return self._kept[group]

    def _read(self, group: int) -> Any:
        import pyarrow
        from pyarrow import compute
        from pyarrow import parquet as files

        number, inside, _ = self._groups[group]
        path = self.files[number]
        try:
            with files.ParquetFile(path) as file:
                _refuse_growth(file, path, self.column, [inside])
                column = pyarrow.chunked_array(_few_by_few(file, path, self.column, inside))
        except (pyarrow.ArrowException, OSError, IndexError) as error:
            raise StorageError(f"{path} cannot be read any more: {error}") from error
        if pyarrow.types.is_struct(column.type):
            column = compute.struct_field(column, "bytes")
        return column


def parquet(
    *,
    root: str,
    image: str | None = None,
    label: str | None = None,
    size: int = 224,
    padding: int | None = None,
    crop: float | None = None,
    flip: bool = True,
    mean: tuple[float, float, float] = MEAN,
    std: tuple[float, float, float] = STD,
    buffer: int = 2048,
    on_error: OnError = "stop",
) -> Data:
    """Loads pictures from parquet files in the layout of Hugging Face.

    A file belongs to the split that its name tells (``data/train-00000-of-00002.parquet``), or else
    its folder (``train/0000.parquet``); to judge by, validation comes before test. Pictures become
    squares as with :func:`topkd.data.sources.folder.folder`. They stay on disk: row groups are
    read when they are wanted, in a random order in which about ``buffer`` pictures are mixed.

    Args:
        root: Folder with the files, or with folders of them.
        image: Name of the column of pictures; if not told, the one that the files describe as
            such, or ``image`` or ``img``.
        label: Name of the column of labels, whole numbers or names; if not told, the only one that
            the files describe as such, or ``label``.
        size: Pixels on a side of what networks see.
        padding: Width of the black border that training crops are cut from, for small pictures.
        crop: Share of the shorter side of the middle square that is evaluated on. If not told, 7/8,
            but as many pixels as networks see where a picture has them.
        flip: Whether pictures may be mirrored in training.
        mean: By which each channel is normalized, of values in [0, 1].
        std: By which each channel is normalized.
        buffer: Pictures that are mixed, and kept in memory as they are stored. A set that is no
            larger is shuffled as a whole.
        on_error: Whether a training picture that cannot be read stops the work or is replaced by
            the next of its class. A picture to judge by always stops it.

    Raises:
        FileNotFoundError: If there are no files to train on or to judge by, or one is missing.
        ValueError: If a file cannot be read, or has no such columns, or labels that are no classes.
    """
    frame = CropConfig(size, padding, flip, mean, std, crop)
    top, faults = Path(root).expanduser(), DataIssues()
    parts = splits(top, ".parquet")
    image, label, names = _columns(parts[0][0], image, label)
    _refuse_unlike(parts[0] + parts[1], image, label, names)
    labels = [labels_of(files, label) for files in parts]
    rows = [Rows(files, image, buffer) for files in parts]
    classes, target = numbered(labels, names, rows, str(top), faults)
    return picture_data(f"parquet {top.name}", rows, target, classes, frame, on_error, faults)


def _columns(file: Path, image: str | None, label: str | None) -> tuple[str, str, Any]:
    """Finds the columns of pictures and labels, and the names of the classes where they stand."""
    columns, described = schema(file)
    pictures = [name for name, about in described.items() if about.get("_type") == "Image"]
    labels = [name for name, about in described.items() if about.get("_type") == "ClassLabel"]
    for what, told, known, usual in (
        ("image", image, pictures, ("image", "img")),
        ("label", label, labels, ("label", "labels")),
    ):
        candidates = [told] if told else known or [name for name in usual if name in columns]
        if len(candidates) != 1 or candidates[0] not in columns:
            chosen = listing(candidates) if told or len(candidates) > 1 else "none is described"
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
            raise ValueError(f"{file} names other classes than {files[0]}, or in another order")


def labels_of(files: Sequence[Path], column: str) -> list[int | str]:
    """Reads the labels of all rows.

    Raises:
        ValueError: If a file cannot be read, a label is neither a whole number nor a name, or there
            is none.
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
        raise ValueError(f"{files[0].parent}: the parquet files hold no picture")
    return labels


def schema(file: Path) -> tuple[list[str], dict[str, Any]]:
    """Reads the names of the columns, and what the writer of a file says about them.

    Raises:
        ValueError: If the file cannot be read.
    """
    with _opened(file) as table:
        told = table.schema_arrow
    try:
        about = json.loads((told.metadata or {}).get(b"huggingface", b"{}"))
        features = about.get("info", {}).get("features", {})
        described = {name: each for name, each in features.items() if isinstance(each, dict)}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata of huggingface are damaged: {error}") from error
    for name, each in described.items():
        names = each.get("names")
        if each.get("_type") != "ClassLabel" or names is None:
            continue
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"{file}: expected a list of names of {name}, got {names!r:.80}")
    return list(told.names), described


def _group_sizes(file: Path) -> list[int]:
    with _opened(file) as table:
        groups = range(table.metadata.num_row_groups)
        return [table.metadata.row_group(group).num_rows for group in groups]


def _values(column: Any) -> list[Any]:
    """Lists the values of a column; those that it stores once are in memory once."""
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
                    f"{file} has {size:,} bytes and tells of {rows:,} rows of pictures"
                )
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}") from error


def _refuse_growth(table: Any, file: Path, column: str, groups: Iterable[int]) -> None:
    """Refuses row groups that would be much larger in memory than pictures and labels become."""
    inside = [table.metadata.row_group(group) for group in groups]
    chunks = [group.column(number) for group in inside for number in range(group.num_columns)]
    whole = sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] == column
    )
    _refuse_larger(whole, file, column)


def _few_by_few(table: Any, file: Path, column: str, group: int) -> list[Any]:
    """Reads a column of a row group in pieces, so that one that lies about its size ends soon."""
    pieces, whole = [], 0
    for batch in table.iter_batches(64, row_groups=[group], columns=[column]):
        pieces.append(batch.column(0))
        whole += batch.nbytes
        _refuse_larger(whole, file, column)
    return pieces


def _refuse_larger(whole: int, file: Path, column: str) -> None:
    size = file.stat().st_size
    if whole > max(ALWAYS, GROWTH * size):
        raise StorageError(
            f"{file} has {size:,} bytes, and {column} in it would unpack to {whole:,} or more; at "
            f"most {GROWTH} times the size of the file is read"
        )
