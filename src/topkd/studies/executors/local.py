"""Executor that runs jobs as local processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

import torch

from topkd.config.study import Job
from topkd.data import Data
from topkd.studies.executors.base import Executor
from topkd.studies.executors.task import CRASHED, Exit, Task
from topkd.training.build import load_source

TERMINATION = 20.0  # seconds between SIGTERM and SIGKILL


class Local(Executor):
    """Runs jobs as parallel processes.

    If processes can be forked, the data set of a setting is loaded once and shared by all jobs.

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

    def data(self, jobs: Sequence[Job]) -> Data | None:
        """See :class:`~topkd.studies.executors.base.Executor`."""
        forks = self._context.get_start_method() == "fork"
        return load_source(jobs[0].recipe.data) if forks else None

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
    status = CRASHED
    try:
        status = task.execute().status
    finally:
        os._exit(status)


def _exit_of(code: int) -> Exit:
    return Exit(code, f"killed by {signal.Signals(-code).name}") if code < 0 else Exit.of(code)
