"""Resumable state of training, with a hash by which damage is noticed."""

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
    """Saves a state; a crash at any moment leaves the last one or this one.

    The state before it is kept too, so that another process can still be reading it.

    Args:
        folder: Where; it holds one training's state.
        state: Tensors and plain values, and containers of these.
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
    """Loads what :func:`save` saved last; None if there is nothing.

    Raises:
        ValueError: If a file is not the one that was saved.
    """
    if not (folder / _INDEX).exists():
        return None
    again = f"delete {folder} to begin this training again"
    try:
        index = files.read_sealed(folder / _INDEX)
    except ValueError as error:
        raise ValueError(f"{error}; {again}") from error
    path = folder / index["file"]
    data = path.read_bytes() if path.exists() else b""
    if files.sha256(data) != index["hash"]:
        raise ValueError(f"{path} is {'altered' if data else 'missing or empty'}; {again}")
    state: dict[str, Any] = pickles.read(io.BytesIO(data), str(path))
    return state


def delete(folder: Path) -> None:
    """Deletes a state that is not needed any more."""
    shutil.rmtree(folder, ignore_errors=True)
