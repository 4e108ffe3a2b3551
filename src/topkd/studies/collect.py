"""Metrics of finished jobs, read from ``result.json`` files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from topkd._io import files
from topkd.config.study import Plan
from topkd.studies.analysis import Comparison, compare
from topkd.studies.plan import Place


@dataclass(frozen=True)
class Collected:
    """Finished jobs of a study."""

    plan: Plan
    results: dict[tuple[str, str], dict[int, dict[str, Any]]]
    """(setting, variant) -> seed -> content of ``result.json``."""

    def values(self, setting: str, metric: str) -> dict[str, dict[int, float]]:
        """Returns a metric as variant -> seed -> value, without variants that lack it.

        Args:
            setting: Name of the setting.
            metric: Name of a metric in ``last`` or ``teacher_similarity``.
        """
        found = {}
        for variant in self.plan.variants:
            runs = self.results.get((setting, variant), {})
            values = {
                seed: float(value)
                for seed, result in sorted(runs.items())
                if (value := metric_of(result, metric)) is not None
            }
            if values:
                found[variant] = values
        return found

    def comparisons(self, setting: str, metric: str | None = None) -> list[Comparison]:
        """Compares variants with the baseline; the default metric is the primary one.

        Raises:
            ValueError: If the baseline has no finished run in this setting.
        """
        primary = self.plan.file.primary
        name = metric or primary.metric
        values, baseline = self.values(setting, name), self.plan.file.baseline
        if baseline not in values:
            raise ValueError(f"{setting}: no run of the baseline {baseline} is finished")
        margin = primary.margin if name == primary.metric else None
        return compare(
            setting, values, baseline, margin=margin, higher_is_better=name not in LOWER_IS_BETTER
        )


LOWER_IS_BETTER = frozenset({"nll", "ece", "kl", "topological_distance"})


def metric_of(result: dict[str, Any], name: str) -> float | None:
    """Returns a metric of a result; None if it was not measured."""
    for part in ("last", "teacher_similarity"):
        value = (result.get(part) or {}).get(name)
        if value is not None:
            return float(value)
    return None


def collect(plan: Plan, place: Place) -> Collected:
    """Reads the results of all finished jobs.

    Raises:
        ValueError: If a result was altered or belongs to another recipe.
    """
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for job in plan.jobs():
        path = place.result(job)
        if path is not None:
            found.setdefault((job.setting, job.variant), {})[job.seed] = files.read_sealed(path)
    return Collected(plan, found)
