"""Atomic file writes, files with a hash of their content, and locks."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

SEAL = "sha256"
"""Key of the hash in sealed JSON."""
_UNFINISHED = ".tmp"  # suffix of a file that is being written


def write(path: Path, content: bytes | str) -> None:
    """Writes a file atomically: a reader finds either the old content or the new.

    The content is written to a temporary file in the same folder and synced. The file is then
    renamed, and the folder is synced.

    Raises:
        OSError: If the file cannot be written. The old content is kept.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_orphans(path)
    handle, name = tempfile.mkstemp(_UNFINISHED, f".{path.name}.{_owner()}.", path.parent)
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


def _owner() -> str:
    """Identifies this process in the names of temporary files: machine hash and process number."""
    return f"{sha256(platform.node().encode())[:6]}-{os.getpid()}"


def _delete_orphans(path: Path) -> None:
    """Deletes temporary files for the same path whose process on this machine has been killed."""
    machine = _owner().partition("-")[0]
    for left in path.parent.glob(f".{glob.escape(path.name)}.{machine}-*{_UNFINISHED}"):
        number = left.name.removeprefix(f".{path.name}.{machine}-").partition(".")[0]
        if number.isdigit() and not _is_alive(int(number)):
            left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere, signal 0 is not a test
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process of another user, or an unknown state
        return True
    return True


def refuse_deleted(folder: Path) -> None:
    """Raises an error if a run's folder was deleted; :func:`write` would recreate it incomplete.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} was deleted during the run; rerun the command to start again"
        )


def sweep(folder: Path) -> None:
    """Deletes temporary files of killed processes in a folder and its subfolders.

    The caller must hold the lock of the folder.
    """
    for path in folder.rglob(f".*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of a path, so that no other process works on it at the same time.

    The lock is released when its process ends, even if it is killed.

    Args:
        path: File or folder to lock. The lock is a hidden file beside it and is not deleted.
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


def is_locked(path: Path) -> bool:
    """Tests whether a process holds the lock of a path; see :func:`locked`."""
    place = path.parent / f".{path.name}.lock"
    if not place.exists():
        return False
    try:
        with FileLock(place).acquire(timeout=0):
            return False
    except Timeout:
        return True


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        ValueError: If the file is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a mapping as JSON, together with its hash."""
    plain = json.loads(json.dumps(dict(values)))
    write_json(path, plain | {SEAL: _seal(plain)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads a file written by :func:`write_sealed`.

    Raises:
        ValueError: If the file was altered or has no hash; the message names it.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.pop(SEAL, None) != _seal(values):
        raise ValueError(f"{path} was altered: its sha256 does not match its content")
    return values


def write_checked(path: Path, content: bytes) -> None:
    """Writes a file, then a second file with its hash; with both, it is complete."""
    write(path, content)
    write_sealed(_beside(path), {"hash": sha256(content)})


def is_complete(path: Path) -> bool:
    """Tests whether :func:`write_checked` has completed a file."""
    return path.exists() and _beside(path).exists()


def read_checked(path: Path) -> bytes:
    """Reads a file written by :func:`write_checked`; without a hash file, it is not checked.

    Raises:
        ValueError: If the file was altered; the message names it.
    """
    content = path.read_bytes()
    if _beside(path).exists() and read_sealed(_beside(path))["hash"] != sha256(content):
        raise ValueError(f"{path} was altered; delete it to create it again")
    return content


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Computes the hashes of files in a folder."""
    return {name: sha256((folder / name).read_bytes()) for name in names}


def check_hashes(folder: Path, recorded: Mapping[str, str], *, need_all: bool = False) -> None:
    """Compares files with their recorded hashes.

    Args:
        folder: Folder of the files.
        recorded: Name -> hash.
        need_all: Whether a missing file is an error.

    Raises:
        ValueError: If a file was altered, or is missing and required; the message names it.
    """
    for name, expected in recorded.items():
        path = folder / name
        if not path.exists():
            if need_all:
                raise ValueError(f"{path} is missing, but its run has ended; delete {folder}")
        elif sha256(path.read_bytes()) != expected:
            raise ValueError(f"{path} was altered after its run had ended; delete {folder}")


def sha256(content: bytes) -> str:
    """Computes the SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: Path) -> str:
    """Computes the SHA-256 of a file without loading it into memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_lines(values: Iterable[Any]) -> str:
    """Formats values as JSON Lines."""
    return "".join(json.dumps(value) + "\n" for value in values)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _seal(values: Any) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode())


def _sync(folder: Path) -> None:
    """Syncs a folder, so that a rename survives a power failure; Windows needs no sync."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
