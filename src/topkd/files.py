"""Files that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part.

    Raises:
        OSError: If it cannot be written; what was there before is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error
        raise


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
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def sha256(content: bytes) -> str:
    """Computes the hash by which files are recognised."""
    return hashlib.sha256(content).hexdigest()


def json_lines(values: Iterable[Any]) -> str:
    """Writes values as JSON, one on each line."""
    return "".join(json.dumps(value) + "\n" for value in values)
