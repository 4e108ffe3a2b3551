"""Tar shards of pictures in the WebDataset layout, local or remote."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from topkd._io import files
from topkd.data.base import Data, DataIssues, ReadGroups
from topkd.data.pictures import (
    EXTENSIONS,
    CropConfig,
    CropOptions,
    Names,
    OnError,
    StorageError,
    is_hidden,
    open_bytes,
    picture_data,
    with_crop_options,
)
from topkd.data.shards import numbered, splits

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Unpack


LONGEST, FILE = 1000, 1 << 20  # limits: characters of a label, bytes of its file


@dataclass(frozen=True)
class Entry:
    """One sample of a shard: byte range of its picture, and its label."""

    name: str
    offset: int
    size: int
    label: str


@dataclass(frozen=True)
class Shard:
    """A tar file: a local path, or a URL or command that yields one."""

    place: str
    is_remote: bool

    def __str__(self) -> str:
        return self.place


class ShardCache:
    """Opens shards; downloads remote ones to a folder and deletes the least recently used.

    Args:
        cache: The folder; None if all shards are local.
        keep: Maximum number of downloaded shards; None for no limit.
    """

    def __init__(self, cache: Path | None, keep: int | None) -> None:
        self.cache, self.keep = cache, keep
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"cache": self.cache, "keep": self.keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def open(self, shard: Shard) -> IO[bytes]:
        """Opens a shard for reading.

        Raises:
            StorageError: If it cannot be opened or downloaded.
        """
        try:
            if not shard.is_remote:
                return open(shard.place, "rb")
            with self._lock:
                return self._fetched(shard.place)
        except OSError as error:
            raise StorageError(f"{shard} cannot be read: {error}") from error

    def _fetched(self, shard: str) -> IO[bytes]:
        assert self.cache is not None
        path = self.cache / f"{files.sha256(shard.encode())[:24]}.tar"
        if not path.exists():
            self._fetch(shard, path)
        file = open(path, "rb")  # noqa: SIM115  (handed out, and readable if it is removed now)
        os.utime(path)
        if self.keep is not None:
            there = sorted(self.cache.glob("*.tar"), key=_last_use)
            for old in there[: max(0, len(there) - self.keep)]:
                old.unlink(missing_ok=True)
        return file

    def _fetch(self, shard: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        try:
            with os.fdopen(handle, "wb") as file, _package().gopen(shard) as stream:
                shutil.copyfileobj(stream, file, 1 << 20)
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # deleted by another process
        return 0.0


class Members:
    """Pictures in tar files, read by byte range.

    Args:
        shards: The tar files.
        entries: The samples of each shard.
        shard_cache: Opens the shards.
    """

    def __init__(
        self, shards: Sequence[Shard], entries: Sequence[Sequence[Entry]], shard_cache: ShardCache
    ) -> None:
        self.shards, self.shard_cache = shards, shard_cache
        every = [entry for samples in entries for entry in samples]
        self._names = Names(entry.name for entry in every)
        self._where = np.array([(e.offset, e.size) for e in every], np.int64).reshape(-1, 2)
        sizes = [len(samples) for samples in entries]
        self._shard = np.repeat(np.arange(len(sizes)), sizes)
        self._largest = max(sizes, default=0)

    @property
    def blocks(self) -> ReadGroups | None:
        """The shard of each picture, if the cache does not hold all shards."""
        keep = self.shard_cache.keep
        if keep is None or not any(shard.is_remote for shard in self.shards):
            return None
        return ReadGroups(self._shard, (keep - 2) * self._largest)

    def name(self, index: int) -> str:
        """Returns the shard and the file in it."""
        return f"{self.shards[self._shard[index]]}: {self._names[index]}"

    def open(self, index: int) -> Image.Image:
        """Opens a picture in any mode."""
        offset, size = self._where[index].tolist()
        shard = self.shards[self._shard[index]]
        with self.shard_cache.open(shard) as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise StorageError(f"{shard} has become shorter since it was indexed")
        return open_bytes(content)


@with_crop_options
def webdataset(
    *,
    root: str = ".",
    train: str | None = None,
    test: str | None = None,
    label: str = "cls",
    classes: str | None = None,
    cache: str | None = None,
    keep: int | None = None,
    on_error: OnError = "stop",
    **pictures: Unpack[CropOptions],
) -> Data:
    """Loads pictures from tar shards: ``0001.jpg`` and ``0001.cls`` are one sample.

    Every shard is indexed once. Local shards are then read with random access, in the same order
    as a folder.

    Remote shards (``https://...``, ``pipe:aws s3 cp s3://... -``) are downloaded to ``cache`` by
    the webdataset package. If ``keep`` limits the cache, an epoch reads them in random order and
    mixes pictures across about ``keep`` - 2 shards, so that no shard is downloaded twice in an
    epoch. ``pipe:cat /mnt/slow/...`` does the same for a drive with slow random access.

    Args:
        root: Folder of the shards, which is searched if train and test are not given.
        train: Shards in webdataset's notation, ``imagenet-train-{000000..001281}.tar``, separated
            by ``::``. Paths are relative to ``root``.
        test: Evaluation shards. If neither is given, file or folder names determine the split.
        label: Extension of the labels, integers or names; ``json:key`` for a key of a JSON file.
        classes: File with the class names, one per line.
        cache: Folder for downloaded shards and indices. Without it, every start indexes all shards,
            which takes about 30 microseconds per file: one or two minutes for ImageNet.
        keep: Maximum number of downloaded shards, at least 3. Defaults to no limit.
        on_error: Whether an unreadable training picture raises an error or is replaced by the next
            picture of its class. An unreadable evaluation picture always raises an error.
        **pictures: Cropping and normalization: see :class:`topkd.data.pictures.CropConfig`.

    Raises:
        FileNotFoundError: If there are no shards, or one is missing.
        ModuleNotFoundError: If the webdataset package is not installed.
        ValueError: If a shard cannot be read, or a sample has no picture or no label.

    References:
        https://github.com/webdataset/webdataset
    """
    frame = CropConfig(**pictures)
    top, faults = Path(root).expanduser(), DataIssues()
    parts = _shards(top, train, test)
    if any(shard.is_remote for part in parts for shard in part) and cache is None:
        raise ValueError("remote shards need data.cache, the folder to download them to")
    if keep is not None and keep < 3:
        raise ValueError(f"data.keep must be 3 or more, got {keep}")
    folder = None if cache is None else Path(cache).expanduser()
    shard_cache = ShardCache(folder, keep)
    entries = [[_entries(shard, label, shard_cache) for shard in part] for part in parts]
    labels = [_parsed([e.label for samples in part for e in samples]) for part in entries]
    names = None
    if classes is not None:
        names = Path(classes).expanduser().read_text(encoding="utf-8").splitlines()
    members = [
        Members(part, found, shard_cache) for part, found in zip(parts, entries, strict=True)
    ]
    known, target = numbered(labels, names, members, str(top), faults)
    return picture_data(f"webdataset {top.name}", members, target, known, frame, on_error, faults)


def _shards(root: Path, train: str | None, test: str | None) -> list[list[Shard]]:
    if train is None and test is None:
        return [[Shard(str(path), False) for path in part] for part in splits(root, ".tar")]
    if train is None or test is None:
        raise ValueError("set both data.train and data.test, or neither")
    return [_expanded(root, pattern, key) for key, pattern in (("train", train), ("test", test))]


def _expanded(root: Path, pattern: str, key: str) -> list[Shard]:
    """Expands braces and separates local paths from remote shards.

    This happens before a path is joined to its folder, so that a file whose name looks like a
    command or a URL is still a file.
    """
    shards = []
    for written in _package().shardlists.expand_urls(pattern):
        if re.match(r"pipe:|\w+://", written):
            _refuse_quotes(written, key)
            shards.append(Shard(written, True))
            continue
        path = root / written
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; data.{key} names it")
        shards.append(Shard(str(path), False))
    return shards


def _refuse_quotes(address: str, key: str) -> None:
    """Refuses addresses with characters that webdataset does not quote for the shell."""
    wrong = re.search(r"['\"`\\\s\x00-\x1f]", address)
    if wrong and not address.startswith("pipe:"):
        raise ValueError(
            f"data.{key}: the address {address!r} contains {wrong[0]!r}; write it percent-encoded"
        )


def _parsed(labels: list[str]) -> list[int | str]:
    """Converts labels to integers if all of them are numbers."""
    if all(re.fullmatch(r"-?\d+", label) for label in labels):
        return [int(label) for label in labels]
    return list(labels)


def _entries(shard: Shard, label: str, shard_cache: ShardCache) -> list[Entry]:
    """Indexes a shard, or reads its cached index."""
    key = [shard.place, label]
    if not shard.is_remote:
        about = Path(shard.place).stat()
        key += [str(about.st_size), str(about.st_mtime_ns)]
    known = None
    if shard_cache.cache is not None:
        known = shard_cache.cache / f"{files.sha256(json.dumps(key).encode())[:24]}.json"
        if known.exists():
            return [Entry(*entry) for entry in files.read_json(known)]
    with shard_cache.open(shard) as file:
        found = _index(file, shard.place, label)
    if known is not None:
        rows = [(e.name, e.offset, e.size, e.label) for e in found]
        files.write(known, json.dumps(rows))
    return found


def _index(file: IO[bytes], shard: str, label: str) -> list[Entry]:
    extension, _, key = label.partition(":")
    split = _package().tariterators.base_plus_ext
    samples: list[tuple[str, dict[str, tarfile.TarInfo]]] = []
    entries = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name, rest = split(member.name)
                places = [part for part in member.name.split("/") if part not in (".", "..")]
                if not member.isfile() or name is None or any(map(is_hidden, places)):
                    continue
                if member.issparse():  # a few bytes can expand to any size
                    raise StorageError(
                        f"{shard}: {member.name} is sparse; store it as a plain file"
                    )
                if (
                    not samples or samples[-1][0] != name
                ):  # consecutive files with one name form a sample
                    samples.append((name, {}))
                if samples[-1][1].setdefault(rest.lower(), member) is not member:
                    raise StorageError(f"{shard}: {member.name} appears twice")
            for name, parts in samples:
                where = f"{shard}: {name}"
                picture = next((parts[e[1:]] for e in EXTENSIONS if e[1:] in parts), None)
                if picture is None or extension not in parts:
                    missing = "picture" if picture is None else f".{extension}"
                    raise StorageError(f"{where} has no {missing}, only .{', .'.join(parts)}")
                content = tar.extractfile(parts[extension])
                assert content is not None
                text = _label(content.read(FILE), key, where)
                entries.append(Entry(picture.name, picture.offset_data, picture.size, text))
    except (tarfile.TarError, EOFError, MemoryError, OverflowError) as error:
        raise StorageError(f"{shard} is not a complete, uncompressed tar file: {error}") from error
    if not entries:
        raise StorageError(f"{shard} contains no sample")
    return entries


def _label(content: bytes, key: str, where: str) -> str:
    try:
        text = content.decode().strip()
        value = json.loads(text)[key] if key else text
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise StorageError(f"{where}: its label cannot be read: {error!r}") from error
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise StorageError(
            f"{where}: expected a whole number or a name as label, got {value!r:.80}"
        )
    label = str(value)
    if not label:
        raise StorageError(f"{where}: its label is empty")
    if len(label) > LONGEST:
        raise StorageError(f"{where}: expected a label of up to {LONGEST:,} characters, got more")
    return label


def _package() -> Any:
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tar shards need the webdataset package: pip install 'topkd[data]'"
        ) from error
    return webdataset
