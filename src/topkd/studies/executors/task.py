"""Tasks of executors: the work of one process, its log and its exit."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

DONE, CRASHED, INVALID = 0, 1, 2
"""Exit statuses; ``INVALID`` is that of errors caused by the user, which would come again."""
LATE, UNSHARED = 3, 4
"""Exit statuses of tasks that did not begin: the time limit is over, or folders are missing."""
USER_ERRORS = (ValueError, OSError, ImportError)
SHOWN = 6  # last lines of the log of a failed task


class Exit(NamedTuple):
    """How the process of a task ended."""

    status: int
    reason: str

    @classmethod
    def of(cls, status: int) -> Exit:
        """Returns the exit of a process that ended by itself."""
        return cls(status, f"exit status {status}")


@dataclass(frozen=True)
class Task:
    """Work for a process of its own: the preparation of a setting, or a job."""

    title: str
    work: Callable[[], None]
    log: Path
    """File that the output is appended to."""
    threads: int
    """CPU threads, unless the recipe sets them."""

    def execute(self) -> Exit:
        """Does the work in this process, with its output in the log."""
        torch.set_num_threads(self.threads)
        with _output_to(self.log):
            try:
                self.work()
            except USER_ERRORS as error:
                print(error, file=sys.stderr)
                return Exit.of(INVALID)
            except Exception:
                traceback.print_exc()
                return Exit.of(CRASHED)
        return Exit.of(DONE)

    def begun(self) -> int:
        """Returns the size of the log, where the output of the next attempt begins."""
        return self.log.stat().st_size if self.log.exists() else 0

    def error(self, end: Exit, begun: int = 0) -> str | None:
        """Describes a failure: its reason and the last lines of the log; None if it is done.

        Args:
            end: How the task ended.
            begun: Where its output begins in the log.
        """
        if end.status == DONE:
            return None
        content = self.log.read_bytes()[begun:] if self.log.exists() else b""
        lines = content.decode("utf-8", errors="replace").splitlines()[-SHOWN:]
        return "\n".join([end.reason, *(line for line in lines if line.strip())])


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Redirects the output of this process to a file, including that of libraries in C."""
    kept = [os.dup(stream) for stream in (1, 2)]
    with open(log, "a", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for stream, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
