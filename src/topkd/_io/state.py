"""Resumable training state, with a hash that detects damaged files."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from topkd._io import files, pickles

_INDEX = "latest.json"


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Saves a state atomically: after a crash, either the previous state or this one is valid.

    The previous state is kept, since another process may still be reading it.

    Args:
        folder: Folder for the state of one run.
        state: Tensors and plain values, or containers of these.
    """
    content = io.BytesIO()
    torch.save(dict(state), content)
    data = content.getvalue()
    digest = files.sha256(data)
    name = f"state-{digest[:12]}.pt"
    files.write(folder / name, data)
    before = files.read_sealed(folder / _INDEX)["file"] if (folder / _INDEX).exists() else None
    files.write_sealed(folder / _INDEX, {"file": name, "hash": digest})
    for old in folder.glob("state-*.pt"):
        if old.name not in (name, before):
            old.unlink(missing_ok=True)


def load(folder: Path) -> dict[str, Any] | None:
    """Loads the state that :func:`save` wrote last; None if there is none.

    Raises:
        ValueError: If a file is missing or was altered.
    """
    if not (folder / _INDEX).exists():
        return None
    advice = f"delete {folder} to start this training again"
    try:
        index = files.read_sealed(folder / _INDEX)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from error
    path = folder / index["file"]
    data = path.read_bytes() if path.exists() else b""
    if files.sha256(data) != index["hash"]:
        raise ValueError(f"{path} is {'altered' if data else 'missing or empty'}; {advice}")
    state: dict[str, Any] = pickles.read(io.BytesIO(data), str(path))
    return state


def delete(folder: Path) -> None:
    """Deletes a state."""
    shutil.rmtree(folder, ignore_errors=True)
