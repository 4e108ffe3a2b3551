"""Executor that runs jobs as local processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

import torch

from topkd.config.recipe import Recipe
from topkd.data import DATA, Data
from topkd.studies.executors.base import Executor
from topkd.studies.executors.task import CRASHED, Exit, Task
from topkd.topology import rips
from topkd.training.build import load_source
from topkd.training.check import check_name

TERMINATION = 20.0  # seconds between SIGTERM and SIGKILL


class Local(Executor):
    """Runs jobs as parallel processes.

    If processes can be forked, the data set of a setting is loaded once and shared by all jobs, and
    so are imported libraries and compiled kernels.

    Args:
        jobs: Number of parallel processes.
        threads: CPU threads per process. Defaults to the number of CPUs divided by ``jobs``.
        until: Value of :func:`time.time` after which no job is started.
    """

    def __init__(
        self, jobs: int = 1, *, threads: int | None = None, until: float | None = None
    ) -> None:
        threads = max(1, (os.cpu_count() or 1) // max(1, jobs)) if threads is None else threads
        super().__init__(jobs, threads, until)
        # Neither an accelerator context nor a thread pool survives a fork.
        forks = sys.platform == "linux" and not torch.accelerator.is_available()
        self._context: Any = multiprocessing.get_context("fork" if forks else "spawn")

    def data(self, recipes: Sequence[Recipe]) -> Data | None:
        """See :class:`~topkd.studies.executors.base.Executor`."""
        if self._context.get_start_method() != "fork":
            return None
        rips(torch.zeros(1, 2, 1))  # loads kernels, and modules that torch imports late
        first, *others = (recipe.data for recipe in recipes)
        if any((each.name, each.options) != (first.name, first.options) for each in others):
            return None
        check_name(DATA, first.name, "data.name")
        return load_source(first)

    def start(self, tasks: Sequence[Task]) -> list[Any]:
        """See :class:`~topkd.studies.executors.base.Executor`."""
        processes = [self._context.Process(target=_child, args=(task,)) for task in tasks]
        for process in processes:
            process.start()
        return processes

    def wait(self, handles: Sequence[Any]) -> list[tuple[Any, Exit]]:
        """See :class:`~topkd.studies.executors.base.Executor`."""
        wait([process.sentinel for process in handles])
        ended = [process for process in handles if not process.is_alive()]
        for process in ended:
            process.join()
        return [(process, _exit_of(process.exitcode)) for process in ended]

    def stop(self, handles: Sequence[Any]) -> None:
        """See :class:`~topkd.studies.executors.base.Executor`."""
        for process in handles:
            process.terminate()
        end = time.monotonic() + TERMINATION
        for process in handles:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _child(task: Task) -> None:
    """Entry point of a job's process, which leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    # GNU OpenMP waits forever in a forked thread that has used it before; a new thread starts anew.
    thread = threading.Thread(target=_execute, args=(task,))
    thread.start()
    thread.join()


def _execute(task: Task) -> None:
    status = CRASHED
    try:
        status = task.execute().status
    finally:
        os._exit(status)


def _exit_of(code: int) -> Exit:
    return Exit(code, f"killed by {signal.Signals(-code).name}") if code < 0 else Exit.of(code)
