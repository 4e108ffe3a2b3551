"""Executor that submits jobs to SLURM, with submitit."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topkd._runtime.imports import optional
from topkd.config.study import MOST_JOBS
from topkd.studies.executors.base import Executor
from topkd.studies.executors.shared import Remote, shared
from topkd.studies.executors.task import CRASHED, Exit, Task

MINUTES = 60  # default time limit of a job
POLL = 1.0  # seconds between looks at result files; submitit asks SLURM itself less often


class Slurm(Executor):
    """Submits the jobs of a setting as one job array.

    A job that reaches its time limit or is preempted is queued again and resumes from its last
    epoch; submitit bounds how often a time limit may be reached.

    Args:
        jobs: Number of jobs of an array that run at a time. Defaults to as many as SLURM allows.
        threads: CPUs per job.
        slurm: Options of ``sbatch`` without dashes, ``KEY=VALUE`` or ``KEY``. ``time`` is in
            minutes.
        until: Value of :func:`time.time` after which no job begins.
        cluster: Cluster of submitit: ``slurm``, or ``local`` for processes on this machine.

    References:
        submitit
        https://github.com/facebookincubator/submitit
    """

    def __init__(
        self,
        jobs: int | None = None,
        *,
        threads: int = 1,
        slurm: Sequence[str] = (),
        until: float | None = None,
        cluster: str = "slurm",
    ) -> None:
        super().__init__(jobs, threads, until)
        self.parallel, self.jobs = jobs, None  # all are submitted; SLURM lets so many run
        options = dict(_option(text) for text in slurm)
        minutes = str(options.pop("time", MINUTES))
        if not minutes.isdecimal() or int(minutes) < 1:
            raise ValueError(f"--slurm time: expected minutes, got {minutes!r}")
        self.options, self.minutes, self.cluster = options, int(minutes), cluster

    @contextmanager
    def session(self, out: Path) -> Iterator[None]:
        """Finds SLURM; its scripts and pickles are written to ``logs/slurm``."""
        submitit = optional("submitit", "slurm")
        if self.cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
            raise FileNotFoundError("--on slurm: this machine has no sbatch; run it where SLURM is")
        self._failure = submitit.core.utils.FailedJobError
        with shared(out) as self._shared:
            folder = self._shared.out / "logs" / "slurm"
            self._executor = submitit.AutoExecutor(folder, cluster=self.cluster)
            self._executor.update_parameters(
                name="topkd",
                timeout_min=self.minutes,
                cpus_per_task=self.threads,
                slurm_array_parallelism=self.parallel or MOST_JOBS,  # submitit: 256
                slurm_additional_parameters=self.options,
            )
            yield

    def start(self, tasks: Sequence[Task]) -> list[Any]:
        """See :class:`~topkd.studies.executors.base.Executor`.

        Raises:
            ValueError: If SLURM rejects the jobs.
        """
        works = [_Resumable(Remote(task, self._shared, self.until)) for task in tasks]
        try:
            return list(self._executor.submit_array(works))
        except self._failure as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ValueError(f"--on slurm: {next(iter(lines), 'sbatch failed')}") from error

    def wait(self, handles: Sequence[Any]) -> list[tuple[Any, Exit]]:
        """See :class:`~topkd.studies.executors.base.Executor`."""
        while not (ended := [job for job in handles if job.done()]):
            time.sleep(POLL)
        return [(job, _exit_of(job)) for job in ended]

    def stop(self, handles: Sequence[Any]) -> None:
        """See :class:`~topkd.studies.executors.base.Executor`."""
        for job in handles:
            job.cancel(check=False)


class _Resumable:
    """A task that submitit submits again when SLURM interrupts it."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote

    def __call__(self) -> Exit:
        return self.remote()

    def checkpoint(self) -> Any:
        """Returns what to run after an interruption: the same, since runs resume."""
        return optional("submitit", "slurm").helpers.DelayedSubmission(self)


def _option(text: str) -> tuple[str, str | bool]:
    """Parses ``KEY=VALUE`` or ``KEY``, with or without dashes."""
    key, equals, value = text.lstrip("-").partition("=")
    if not key:
        raise ValueError(f"--slurm: expected KEY=VALUE, got {text!r}")
    return key.replace("-", "_"), value if equals else True


def _exit_of(job: Any) -> Exit:
    if job.exception() is None:
        end: Exit = job.result()
        return end
    return Exit(CRASHED, f"job {job.job_id} ended as {job.state}; see {job.paths.stderr}")
