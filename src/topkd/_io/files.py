"""Atomic file writes, files with a hash of their content, and locks."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

SEAL = "sha256"
"""Key of the hash in sealed JSON."""
_UNFINISHED = ".tmp"  # ends the name of a file that is being written


def write(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part.

    The content is written to a temporary file beside it and synced to the disk; the file is then
    renamed, and its folder synced.

    Raises:
        OSError: If it cannot be written; what was there before is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(_UNFINISHED, f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        _sync(path.parent)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error
        raise


def refuse_deleted(folder: Path) -> None:
    """Ends work whose folder somebody has deleted: :func:`write` would make a part of it anew.

    Raises:
        FileNotFoundError: If it is not there any more.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} was deleted while it was written to; the same command begins it anew"
        )


def sweep(folder: Path) -> None:
    """Deletes what writes that were killed have left in a folder and below it.

    The caller holds the lock of the folder, so that nobody else is writing there.
    """
    for path in folder.rglob(f".*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Holds a lock while work is done that no other process may do at the same time.

    A lock ends with its process, however that ends.

    Args:
        path: What is worked on. The lock is a hidden file beside it, which stays.
        wait: Called once if another process holds the lock, before waiting for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON for people and machines."""
    write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        ValueError: If the file does not hold JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a mapping as JSON with a hash of it, by which a change is noticed."""
    plain = json.loads(json.dumps(dict(values)))
    write_json(path, plain | {SEAL: _seal(plain)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what :func:`write_sealed` wrote.

    Raises:
        ValueError: If the file was altered or is something else; the message names it.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.pop(SEAL, None) != _seal(values):
        raise ValueError(f"{path} was altered: its sha256 does not match its content")
    return values


def write_checked(path: Path, content: bytes) -> None:
    """Writes a file, and beside it a small one with its hash; it is complete with both."""
    write(path, content)
    write_sealed(_beside(path), {"hash": sha256(content)})


def is_complete(path: Path) -> bool:
    """Tests whether :func:`write_checked` has written a file to the end."""
    return path.exists() and _beside(path).exists()


def read_checked(path: Path) -> bytes:
    """Reads what :func:`write_checked` wrote; a file without a hash beside it is not checked.

    Raises:
        ValueError: If the file was altered; the message names it.
    """
    content = path.read_bytes()
    if _beside(path).exists() and read_sealed(_beside(path))["hash"] != sha256(content):
        raise ValueError(f"{path} was altered; delete it, and it is made again")
    return content


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Computes the hashes of files in a folder."""
    return {name: sha256((folder / name).read_bytes()) for name in names}


def check_hashes(folder: Path, recorded: Mapping[str, str], *, need_all: bool = False) -> None:
    """Compares files with their recorded hashes.

    Args:
        folder: Where they are.
        recorded: Name -> hash.
        need_all: Whether a file may not be missing.

    Raises:
        ValueError: If a file was altered, or is missing and may not be; the message names it.
    """
    for name, expected in recorded.items():
        path = folder / name
        if not path.exists():
            if need_all:
                raise ValueError(f"{path} is missing, but its run has ended; delete {folder}")
        elif sha256(path.read_bytes()) != expected:
            raise ValueError(f"{path} was altered after its run had ended; delete {folder}")


def sha256(content: bytes) -> str:
    """Computes the hash by which files are recognized."""
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: Path) -> str:
    """Computes the same hash of a file that may be larger than the memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_lines(values: Iterable[Any]) -> str:
    """Writes values as JSON, one on each line."""
    return "".join(json.dumps(value) + "\n" for value in values)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _seal(values: Any) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode())


def _sync(folder: Path) -> None:
    """Makes a rename survive a power cut; Windows does so by itself and opens no folder."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
