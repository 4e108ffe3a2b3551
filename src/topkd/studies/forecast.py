"""Estimates of the time and disk space that the pending jobs of a study take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from topkd._io import files
from topkd.config.study import Plan
from topkd.reporting.sections import count
from topkd.studies.plan import Place


@dataclass
class Forecast:
    """Time and disk space of jobs, estimated from finished jobs of the same setting.

    Args:
        seconds: Setting -> training times of finished jobs.
        sizes: Setting -> bytes in the folders of finished jobs.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)

    def add(self, setting: str, run: Path, *, size: bool = True) -> None:
        """Adds a finished run."""
        result = files.read_json(run / "result.json")
        self.seconds.setdefault(setting, []).append(float(result["train_seconds"]))
        if size:
            written = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
            self.sizes.setdefault(setting, []).append(written)

    def knows(self, setting: str) -> bool:
        """Tests whether a job of the setting is finished here."""
        return setting in self.sizes

    def of(self, pending: Mapping[str, int]) -> str:
        """Describes what jobs take, e.g. ``about 2 min in one process and 3 MB``.

        Args:
            pending: Setting with a finished job -> number of jobs.
        """
        seconds = sum(number * _mean(self.seconds[setting]) for setting, number in pending.items())
        size = sum(number * _mean(self.sizes[setting]) for setting, number in pending.items())
        return f"about {duration(seconds)} in one process and {max(1, round(size / 1e6))} MB"


def opening(plan: Plan, place: Place) -> tuple[str, Forecast]:
    """Summarizes a plan in a line, and reads what its finished jobs took.

    Raises:
        ValueError: If a result was altered or belongs to another recipe.
    """
    forecast, pending, jobs = Forecast(), Counter[str](), plan.jobs()
    for job in jobs:
        path = place.result(job)
        if path is None:
            pending[job.setting] += 1
        else:
            forecast.add(job.setting, path.parent, size=path.is_relative_to(place.out))
    line = (
        f"{plan.file.name}: {count(len(jobs), 'job')} ({count(len(plan.settings), 'setting')}, "
        f"{count(len(plan.variants), 'variant')}, {count(len(plan.file.all_seeds), 'seed')}), "
        f"{len(jobs) - pending.total()} done"
    )
    if pending and all(map(forecast.knows, pending)):
        line += f"; the others take {forecast.of(pending)}"
    return line, forecast


def duration(seconds: float) -> str:
    """Formats a duration.

    Examples:
        >>> duration(42.4), duration(600), duration(9000)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
