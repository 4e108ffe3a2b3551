"""Tasks for other machines, which must share the folders of the study."""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from topkd._io import files
from topkd.studies.executors.task import LATE, UNSHARED, Exit, Task


@dataclass(frozen=True)
class Shared:
    """Folders of a study that all machines must share.

    Args:
        out: Parent of the folders of all runs.
        token: A file in ``out`` with a random name. A machine that does not find it has another
            folder of the same name, or none.
        folder: Working directory, which relative paths in recipes refer to.
    """

    out: Path
    token: Path
    folder: Path

    def problem(self) -> str | None:
        """Returns what this machine lacks in one line, or None."""
        here = platform.node() or "a machine"
        if not self.token.is_file():
            return f"{here} does not share the folder {self.out}: choose an --out on a shared disk"
        if not self.folder.is_dir():
            return f"{here} does not share the folder {self.folder}: run from a shared folder"
        return None


@contextmanager
def shared(out: Path) -> Iterator[Shared]:
    """Writes a token into the folder of a study and deletes it at the end."""
    out = out.resolve()
    token = out / "logs" / f".{uuid.uuid4().hex}.token"
    files.write(token, f"{platform.node()}\n")
    try:
        yield Shared(out, token, Path.cwd())
    finally:
        token.unlink(missing_ok=True)


@dataclass(frozen=True)
class Remote:
    """A task for a process that another program starts, possibly on another machine.

    Args:
        task: The task.
        shared: Folders that it needs.
        until: Value of :func:`time.time` after which it does not begin, e.g. if it was queued.
    """

    task: Task
    shared: Shared
    until: float | None

    def __call__(self) -> Exit:
        """Checks the folders and executes the task in the submitter's working directory."""
        if self.until is not None and time.time() >= self.until:
            return Exit(LATE, "the time limit is over")
        problem = self.shared.problem()
        if problem is not None:
            return Exit(UNSHARED, problem)
        os.chdir(self.shared.folder)
        return self.task.execute()
