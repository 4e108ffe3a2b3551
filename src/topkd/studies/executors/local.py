"""Executor that runs jobs as local processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from topkd.config.study import Job
from topkd.studies.executors.base import ATTEMPTS, Ended, prepare, work
from topkd.training.build import load_source

INVALID = 2  # exit status for user errors
SHOWN = 6  # last lines of the log of a failed job
TERMINATION = 20.0  # seconds between SIGTERM and SIGKILL


@dataclass
class _Running:
    job: Job
    process: Any
    log: Path
    start: float
    attempt: int


class Local:
    """Runs jobs as parallel processes.

    If processes can be forked, the data set of a setting is loaded once and shared by all jobs.

    Args:
        jobs: Number of parallel processes.
        threads: CPU threads per process. Defaults to the number of CPUs divided by ``jobs``.
        until: Value of :func:`time.monotonic` after which no job is started.
    """

    def __init__(
        self, jobs: int = 1, *, threads: int | None = None, until: float | None = None
    ) -> None:
        if jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {jobs}")
        self.jobs = jobs
        self.threads = threads or max(1, (os.cpu_count() or 1) // jobs)
        self.until = until
        # Neither an accelerator context nor a thread pool survives a fork.
        forks = sys.platform == "linux" and not torch.accelerator.is_available()
        self._context: Any = multiprocessing.get_context("fork" if forks else "spawn")

    def run(self, jobs: Sequence[Job], out: Path) -> Iterator[Ended]:
        """See :class:`~topkd.studies.executors.base.Executor`."""
        logs = out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        recipes = list({job.recipe.hash: job.recipe for job in jobs}.values())
        first = self._start(prepare, (recipes, out), logs / f"{jobs[0].setting}.log")
        try:
            first.join()
        finally:  # where Ctrl-C ends the wait
            _stop([first])
        if first.exitcode != 0:
            error = _why(first, logs / f"{jobs[0].setting}.log")
            yield from (Ended(job, 0.0, error) for job in jobs)
            return
        shares = self._context.get_start_method() == "fork"
        data = load_source(jobs[0].recipe.data) if shares else None
        yield from self._all(list(jobs), out, data)

    def _all(self, waiting: list[Job], out: Path, data: Any) -> Iterator[Ended]:
        attempts, running = dict[str, int](), list[_Running]()
        try:
            while waiting or running:
                may_start = self.until is None or time.monotonic() < self.until
                while waiting and may_start and len(running) < self.jobs:
                    job = waiting.pop(0)
                    attempts[job.title] = attempts.get(job.title, 0) + 1
                    log = out / "logs" / f"{job.title.replace('/', '-').replace(' ', '-')}.log"
                    process = self._start(work, (job, out, data), log)
                    running.append(
                        _Running(job, process, log, time.monotonic(), attempts[job.title])
                    )
                if not running:
                    return
                wait([each.process.sentinel for each in running])
                for each in [each for each in running if not each.process.is_alive()]:
                    running.remove(each)
                    each.process.join()
                    # An error that a user can cause would come again.
                    if each.process.exitcode not in (0, INVALID) and each.attempt < ATTEMPTS:
                        waiting.insert(0, each.job)
                        continue
                    error = None if each.process.exitcode == 0 else _why(each.process, each.log)
                    yield Ended(each.job, time.monotonic() - each.start, error)
        finally:
            _stop([each.process for each in running])

    def _start(self, target: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> Any:
        process = self._context.Process(
            target=_child, args=(target, arguments, str(log), self.threads)
        )
        process.start()
        return process


def _child(target: Callable[..., None], arguments: tuple[Any, ...], log: str, threads: int) -> None:
    """Entry point of a job's process: logs to a file and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    with open(log, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(threads)
    try:
        target(*arguments)
    except (ValueError, OSError, ImportError) as error:  # errors caused by the user
        print(error, file=sys.stderr, flush=True)
        os._exit(INVALID)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _why(process: Any, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    ending = (
        f"killed by {signal.Signals(-process.exitcode).name}"
        if process.exitcode < 0
        else f"exit status {process.exitcode}"
    )
    return "\n".join([ending, *(line for line in lines[-SHOWN:] if line.strip())])


def _stop(processes: Sequence[Any]) -> None:
    """Terminates jobs, whose runs can be resumed from the last epoch."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + TERMINATION
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
