"""Executor protocol, and the work of one job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from topkd._io.progress import Progress
from topkd.config.recipe import Recipe
from topkd.config.study import Job
from topkd.data import Data
from topkd.training.build import Objects
from topkd.training.experiment import Experiment

ATTEMPTS = 2  # attempts per job


@dataclass(frozen=True)
class Ended:
    """Outcome of a job."""

    job: Job
    seconds: float
    error: str | None = None
    """Last lines of the output if the job failed."""


class Executor(Protocol):
    """Runs jobs. A job can be restarted: runs resume, and finished runs are skipped."""

    def run(self, jobs: Sequence[Job], out: Path) -> Iterator[Ended]:
        """Runs the jobs of one setting and yields each one when it ends.

        Args:
            jobs: Jobs whose recipes share data set and teacher.
            out: Parent of the folders of all runs.
        """


def prepare(recipes: Sequence[Recipe], out: Path) -> None:
    """Prepares the shared parts of a setting: teacher, its predictions and fitted losses."""
    for recipe in recipes:
        experiment = Experiment(recipe, out, Progress(quiet=True))
        experiment.fit_losses()
        experiment.cache_teacher()


def work(job: Job, out: Path, data: Data | None = None) -> None:
    """Runs one job in this process."""
    objects, quiet = Objects(data=data), Progress(quiet=True)
    experiment = Experiment(job.recipe, out, quiet, objects, trackers=())
    experiment.train_student(job.seed)
