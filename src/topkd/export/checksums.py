"""Names, hashes and sizes of the files of an export, as in ``checksums.json``."""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from topkd._io import files

CHECKSUMS = "checksums.json"
"""The file with SHA-256 and size of every other file of an export."""


class Entry(BaseModel, frozen=True, strict=True):
    """Hash and size of a file."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="a SHA-256")
    bytes: int = Field(ge=0, description="bytes as a whole number from 0")


Checksums = dict[str, Entry]
"""Name -> hash and size."""

_SCHEMA = TypeAdapter(Checksums)


def of(folder: Path) -> Checksums:
    """Hashes the files of an export and compares them with the hashes in ``config.json``.

    Raises:
        FileNotFoundError: If the folder holds no export.
        ValueError: If a file has changed since its export, or a name is invalid on some system.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"{folder} holds no export: config.json is missing; `topkd export` writes it"
        )
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    checksums = {
        name: Entry(sha256=files.sha256_of(path), bytes=path.stat().st_size)
        for name, path in paths.items()
        if path.is_file() and name != CHECKSUMS and not re.search(r"(^|/)\.", name)
    }
    _refuse_names(checksums, str(folder))
    try:
        known = {name: entry["sha256"] for name, entry in files.read_json(config)["files"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is not what `topkd export` writes") from error
    for name, expected in known.items():
        if name not in checksums or checksums[name].sha256 != expected:
            raise ValueError(f"{folder / name} is not the file that was checked; export it again")
    return checksums


def write(folder: Path, checksums: Checksums) -> None:
    """Writes ``checksums.json``."""
    files.write_json(folder / CHECKSUMS, _SCHEMA.dump_python(checksums))


def parse(content: bytes, where: str) -> Checksums:
    """Reads ``checksums.json`` of any origin.

    Raises:
        ValueError: If it is not JSON, or a name, a hash or a size is invalid.
    """
    damaged = f"{where} is damaged"
    try:
        checksums = _SCHEMA.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].replace("Input should be", "expected")
        if len(first["loc"]) == 2:  # name, field
            message = f"expected {Entry.model_fields[str(first['loc'][1])].description}"
        where = ": ".join([damaged, *(repr(name) for name in first["loc"][:1])])
        raise ValueError(f"{where}: {message}, got {reprlib.repr(first['input'])}") from error
    _refuse_names(checksums, damaged)
    return checksums


def _refuse_names(names: Iterable[str], where: str) -> None:
    """Rejects names that leave the folder or collide on some file system."""
    places = [([CHECKSUMS], CHECKSUMS)]
    for name in names:
        if not _is_plain(name):
            raise ValueError(
                f"{where}: expected a name that stays inside of the folder, got {name!r:.80}"
            )
        places.append((unicodedata.normalize("NFC", name).casefold().split("/"), name))
    # In sorted order, a file is directly followed by what would lie inside it.
    for (place, name), (next_place, other) in pairwise(sorted(places)):
        if next_place[: len(place)] == place:
            raise ValueError(
                f"{where}: {name!r} and {other!r} have the same place but for upper and lower "
                "case; give one of them another name"
            )


def _is_plain(name: str) -> bool:
    """Returns whether a name stays inside the folder on every operating system."""
    parts = name.split("/")
    return (
        name.isprintable()
        and not re.search(r"[\\:]", name)
        and not any(part == "" or part[0] == "." or part[-1] in ". " for part in parts)
    )
