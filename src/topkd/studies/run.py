"""Runs the pending jobs of a study and reports failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topkd._io import files
from topkd._io.progress import Progress
from topkd.config.study import Job, Plan, folder_name
from topkd.config.validation import write_yaml
from topkd.studies.collect import primary_metric
from topkd.studies.executors.base import Ended, Executor
from topkd.studies.forecast import opening
from topkd.studies.plan import Place
from topkd.training.experiment import Experiment


@dataclass
class Outcome:
    """Result of :func:`run`."""

    jobs: int
    done_before: int
    ended: list[Ended] = field(default_factory=list)

    @property
    def failed(self) -> list[Ended]:
        """Jobs that failed in every attempt."""
        return [each for each in self.ended if each.error is not None]

    @property
    def not_started(self) -> int:
        """Jobs that the time limit kept from starting."""
        return self.left - len(self.failed)

    @property
    def left(self) -> int:
        """Jobs that are not done."""
        return self.jobs - self.done_before - len(self.ended) + len(self.failed)


def run(
    plan: Plan,
    out: Path,
    executor: Executor,
    progress: Progress,
    results: Sequence[Path] = (),
) -> Outcome:
    """Runs the pending jobs of a study, setting by setting.

    Args:
        plan: The study.
        out: Parent of the folders of all runs.
        executor: Runs the jobs.
        progress: Shows progress and messages.
        results: Folders with results from other machines, whose jobs count as done.

    Raises:
        RecipeError: If the primary metric does not exist.
        ValueError: If a result was altered, belongs to another recipe or had another teacher.
    """
    primary_metric(plan)  # a typing error should not wait for the table
    place, jobs = Place(out, results), plan.jobs()
    pending = place.pending(jobs)
    _refuse_other_teachers(plan, place)
    _record(plan, out)
    outcome = Outcome(len(jobs), len(jobs) - len(pending))
    left = Counter(job.setting for job in pending)
    line, forecast = opening(plan, place)
    progress.say(line)
    for warning in dict.fromkeys(
        f"warning: {job.setting}: {line}"
        for job in pending
        for line in job.recipe.schedule_warnings(job.recipe.main)
    ):
        progress.say(warning)
    with progress.bar(plan.file.name, len(jobs), "jobs") as advance:
        advance(outcome.done_before, "")
        for ended in _ended(executor, pending, out):
            job, setting = ended.job, ended.job.setting
            outcome.ended.append(ended)
            left[setting] -= 1
            if ended.error is not None:
                advance(1, f"{job.title}, failed")
                progress.say(f"{job.title}: {ended.error}")
                continue
            advance(1, f"{job.title}, {ended.seconds:.0f} s")
            if left[setting] and not forecast.knows(setting):
                forecast.add(setting, place.run(job))
                rest = forecast.of({setting: left[setting]})
                progress.say(f"{setting}: the other {left[setting]} take {rest}")
    return outcome


def _refuse_other_teachers(plan: Plan, place: Place) -> None:
    """Raises ``ValueError`` if a finished job had another teacher than its recipe has now."""
    done: dict[tuple[str, str], dict[Path, dict[str, Any]]] = {}
    for job in plan.jobs():
        path = place.run(job) / "result.json"
        if path.is_file():
            found = done.setdefault((job.setting, job.variant), {})
            found[path.parent] = files.read_sealed(path)
    for of, results in done.items():
        experiment = Experiment(plan.recipes[of], place.out, Progress(quiet=True))
        experiment.refuse_other_teacher(results)


def _ended(executor: Executor, pending: Sequence[Job], out: Path) -> Iterator[Ended]:
    """Runs jobs setting by setting."""
    if not pending:
        return
    with executor.session(out):
        for setting in dict.fromkeys(job.setting for job in pending):
            yield from executor.run([job for job in pending if job.setting == setting], out)


def _record(plan: Plan, out: Path) -> None:
    """Writes the study file beside the runs, for documentation."""
    tree = plan.file.model_dump(mode="json", exclude_unset=True)
    files.write(out / folder_name(plan.file.name) / "study.yaml", write_yaml(tree))
