"""Runs the pending jobs of a study and reports failures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from topkd._io import files
from topkd._io.progress import Progress
from topkd.config.study import Job, Plan, folder_name
from topkd.config.validation import write_yaml
from topkd.studies.collect import primary_metric
from topkd.studies.executors.base import Ended, Executor
from topkd.studies.plan import Place


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
        ValueError: If a result was altered or belongs to another recipe.
    """
    primary_metric(plan)  # a typing error should not wait for the table
    place, jobs = Place(out, results), plan.jobs()
    pending = place.pending(jobs)
    _record(plan, out)
    outcome = Outcome(len(jobs), len(jobs) - len(pending))
    progress.say(estimate(plan, place))
    with progress.bar(plan.file.name, len(jobs), "jobs") as advance:
        advance(outcome.done_before, "")
        for ended in _ended(executor, pending, out):
            outcome.ended.append(ended)
            how = f"{ended.seconds:.0f} s" if ended.error is None else "failed"
            advance(1, f"{ended.job.title}, {how}")
            if ended.error is not None:
                progress.say(f"{ended.job.title}: {ended.error}")
    return outcome


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


def estimate(plan: Plan, place: Place) -> str:
    """Summarizes a plan in a line: number of jobs, finished jobs and remaining time.

    The remaining time is estimated from finished jobs of the same setting.
    """
    jobs = plan.jobs()
    seconds: dict[str, list[float]] = {}
    pending = []
    for job in jobs:
        path = place.result(job)
        if path is None:
            pending.append(job)
        else:
            found = json.loads(path.read_text(encoding="utf-8"))
            seconds.setdefault(job.setting, []).append(found.get("train_seconds", 0.0))
    known = [seconds[job.setting] for job in pending if job.setting in seconds]
    line = (
        f"{plan.file.name}: {len(jobs)} jobs ({len(plan.settings)} settings, "
        f"{len(plan.variants)} variants), {len(jobs) - len(pending)} done"
    )
    if pending and len(known) == len(pending):
        rest = sum(sum(each) / len(each) for each in known)
        line += f"; about {time.strftime('%H:%M', time.gmtime(rest))} h left in one process"
    return line
