"""What an executor does, and the work of one job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from topkd._io.progress import Progress
from topkd.config.recipe import STUDENT, Recipe
from topkd.config.study import Job
from topkd.data import Data
from topkd.training.build import Objects
from topkd.training.experiment import Experiment

ATTEMPTS = 2  # of a job that fails


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    job: Job
    seconds: float
    error: str | None = None
    """Last lines of its output if it failed."""


class Executor(Protocol):
    """Starts jobs. Runs resume and finished runs are skipped, so a job may be started again."""

    def run(self, jobs: Sequence[Job], out: Path) -> Iterator[Ended]:
        """Runs jobs of one setting and yields each when it has ended.

        Args:
            jobs: Jobs whose recipes share data and teacher.
            out: Parent of the folders of all runs.
        """


def prepare(recipes: Sequence[Recipe], out: Path) -> None:
    """Makes what the jobs of a setting share: the teacher, its predictions and fitted losses."""
    for recipe in recipes:
        experiment = Experiment(recipe, out, Progress(quiet=True))
        experiment.fit_losses()
        experiment.cache_teacher()


def work(job: Job, out: Path, data: Data | None = None) -> None:
    """Carries out one job in this process."""
    objects, quiet = Objects(data=data), Progress(quiet=True)
    experiment = Experiment(job.recipe, out, quiet, objects, trackers=())
    experiment.train_student(STUDENT, job.seed)
