"""Networks that a loss fits to the teacher before distillation: fitted once, resumable, locked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from topkd._io import files, state
from topkd.losses.base import LossContext

SaveState = Callable[[Mapping[str, Any]], None]
Fit = Callable[[dict[str, Any] | None, SaveState], bytes]


def fit_once(context: LossContext, name: str, settings: Sequence[Any], fit: Fit) -> bytes:
    """Fits a network to the teacher, or reads the file of an earlier fit.

    The file is ``{name}-{hash}.safetensors`` in the folder of the context, where the hash covers
    the teacher and the settings. It is written atomically, together with a hash of its content.
    A lock keeps other processes from fitting the same network at the same time. The training state
    is deleted once the file is complete.

    Args:
        context: Teacher hash, folder and progress.
        name: Start of the file name.
        settings: Everything else that the result depends on, as JSON values.
        fit: Trains the network and returns the content of the file. It receives the last saved
            training state, or None, and a function that saves a new one.

    Returns:
        The content of the file.

    Raises:
        ValueError: If the file or the saved state was altered.
    """
    digest = files.sha256(json.dumps([context.teacher_hash, *settings]).encode())
    path = context.folder / f"{name}-{digest[:8]}.safetensors"
    if not files.is_complete(path):
        with context.progress.alone(path):
            if not files.is_complete(path):  # another process may have completed it meanwhile
                saved = path.with_suffix(".state")
                files.write_checked(path, fit(state.load(saved), partial(state.save, saved)))
                state.delete(saved)
    return files.read_checked(path)
