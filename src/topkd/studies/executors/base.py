"""Base class of executors: what all of them do with the jobs of a setting."""

from __future__ import annotations

import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from topkd._io.progress import Progress
from topkd.config.recipe import Recipe
from topkd.config.study import Job, folder_name
from topkd.data import Data
from topkd.studies.executors.task import DONE, INVALID, LATE, UNSHARED, USER_ERRORS, Exit, Task
from topkd.training.build import Objects
from topkd.training.check import check
from topkd.training.experiment import Experiment
from topkd.training.trial import try_losses

ATTEMPTS = 2  # attempts per task


@dataclass(frozen=True)
class Ended:
    """Outcome of a job."""

    job: Job
    seconds: float
    """Time since its start, or since its submission to a queue."""
    error: str | None = None
    """Last lines of the output if the job failed."""


class Executor(ABC):
    """Runs jobs. A job can be restarted: runs resume, and finished runs are skipped.

    A subclass starts tasks and waits for them; it need not retry them. Each task has a process of
    its own, so that a crash ends one job only.

    Args:
        jobs: Number of tasks at a time; None for no limit.
        threads: CPU threads per task.
        until: Value of :func:`time.time` after which no task is started.
    """

    def __init__(self, jobs: int | None, threads: int, until: float | None) -> None:
        for name, value in (("jobs", jobs), ("threads", threads)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        self.jobs, self.threads, self.until = jobs, threads, until

    @contextmanager
    def session(self, out: Path) -> Iterator[None]:
        """Holds what all settings of a study need, such as a cluster, while they run.

        Args:
            out: Parent of the folders of all runs.
        """
        yield

    @abstractmethod
    def start(self, tasks: Sequence[Task]) -> list[Any]:
        """Starts tasks and returns a hashable handle for each of them."""

    @abstractmethod
    def wait(self, handles: Sequence[Any]) -> list[tuple[Any, Exit]]:
        """Waits until at least one of the tasks has ended; returns those that have."""

    @abstractmethod
    def stop(self, handles: Sequence[Any]) -> None:
        """Stops tasks, whose runs can be resumed from the last epoch."""

    def data(self, recipes: Sequence[Recipe]) -> Data | None:
        """Returns the data set of recipes if their tasks can share it; they load it otherwise.

        Raises:
            ValueError: If the data cannot be read.
            OSError: If a file is missing.
        """
        return None

    def run(self, jobs: Sequence[Job], out: Path) -> Iterator[Ended]:
        """Prepares a setting, runs its jobs and yields each one when it ends.

        A task that crashes is started again, :data:`ATTEMPTS` times in all. Jobs that may not
        start any more are not yielded.

        Args:
            jobs: Jobs whose recipes share data set and teacher.
            out: Parent of the folders of all runs.

        Raises:
            FileNotFoundError: If another machine does not share the folders of the study.
        """
        out = out.resolve()
        recipes = list({job.recipe.hash: job.recipe for job in jobs}.values())
        try:
            data = self.data(recipes)
        except USER_ERRORS as invalid:
            reason = str(invalid)
            yield from (Ended(job, 0.0, reason) for job in jobs)
            return
        log = self.log(jobs[0], out)
        log.parent.mkdir(parents=True, exist_ok=True)
        preparation = partial(prepare, recipes, out, data)
        setting = jobs[0].setting
        name = f"{folder_name(setting)}.log"
        first = Task(setting, preparation, log.with_name(name), self.threads)
        for _, _, error in self._ended([first]):
            if error is not None:
                yield from (Ended(job, 0.0, error) for job in jobs)
                return
            of = {job.title: job for job in jobs}
            tasks = [
                Task(job.title, partial(work, job, out, data), self.log(job, out), self.threads)
                for job in jobs
            ]
            for task, seconds, problem in self._ended(tasks):
                yield Ended(of[task.title], seconds, problem)

    def log(self, job: Job, out: Path) -> Path:
        """Returns the file with the output of a job, in a folder of its study."""
        study = job.recipe.name.partition("/")[0]
        names = folder_name(job.setting), folder_name(job.variant), f"seed-{job.seed}.log"
        return out / "logs" / study / "-".join(names)

    def _ended(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, float, str | None]]:
        """Runs tasks, retries those that crash, and yields each with its seconds and its error."""
        waiting, running = deque(tasks), dict[Any, tuple[Task, float, int]]()
        attempts = Counter[str]()
        try:
            while waiting or running:
                begun = [waiting.popleft() for _ in range(self._places(len(waiting), len(running)))]
                attempts.update(task.title for task in begun)
                sizes = [task.begun() for task in begun]
                handles = self.start(begun) if begun else []
                for handle, task, size in zip(handles, begun, sizes, strict=True):
                    running[handle] = task, time.monotonic(), size
                if not running:
                    return
                for handle, end in self.wait(list(running)):
                    task, start, size = running.pop(handle)
                    if end.status == UNSHARED:
                        raise FileNotFoundError(end.reason)
                    if end.status not in (DONE, INVALID, LATE) and attempts[task.title] < ATTEMPTS:
                        waiting.appendleft(task)
                    elif end.status != LATE:
                        yield task, time.monotonic() - start, task.error(end, size)
        finally:
            self.stop(list(running))

    def _places(self, waiting: int, running: int) -> int:
        """Returns how many of the waiting tasks may start."""
        if self.until is not None and time.time() >= self.until:
            return 0
        return waiting if self.jobs is None else min(waiting, self.jobs - running)


def prepare(recipes: Sequence[Recipe], out: Path, data: Data | None = None) -> None:
    """Prepares the shared parts of a setting: teacher, its predictions and fitted losses.

    Jobs of a recipe that cannot be prepared report it themselves.

    Raises:
        Exception: The error of the first recipe, if no recipe can be prepared.
    """
    errors = list[Exception]()
    for recipe in recipes:
        try:
            check(recipe)
            try_losses(recipe)  # finds invalid options before the teacher is trained
            experiment = Experiment(recipe, out, Progress(quiet=True), Objects(data=data))
            experiment.fit_losses()
            experiment.cache_teacher()
        except USER_ERRORS as error:
            errors.append(error)
        except Exception as error:  # code of a user may raise any; other recipes may not use it
            traceback.print_exc()
            errors.append(error)
    if len(errors) == len(recipes):
        raise errors[0]


def work(job: Job, out: Path, data: Data | None = None) -> None:
    """Runs one job in this process."""
    objects, quiet = Objects(data=data), Progress(quiet=True)
    experiment = Experiment(job.recipe, out, quiet, objects, trackers=())
    experiment.train_student(job.seed)
