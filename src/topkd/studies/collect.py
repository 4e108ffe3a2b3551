"""Metrics of finished jobs, read from ``result.json`` files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topkd._io import files
from topkd.config.study import Plan
from topkd.config.validation import RecipeError, near
from topkd.evaluation.metrics import METRICS, Metric
from topkd.studies.analysis import Comparison, compare
from topkd.studies.plan import Place


@dataclass(frozen=True)
class Collected:
    """Finished jobs of a study."""

    plan: Plan
    results: dict[tuple[str, str], dict[int, dict[str, Any]]]
    """(setting, variant) -> seed -> content of ``result.json``."""
    folders: dict[tuple[str, str], dict[int, Path]] = field(default_factory=dict)
    """(setting, variant) -> seed -> folder of the result."""

    def values(self, setting: str, metric: Metric) -> dict[str, dict[int, float]]:
        """Returns a metric as variant -> seed -> value, without variants that lack it."""
        found = {}
        for variant in self.plan.variants:
            runs = self.results.get((setting, variant), {})
            values = {
                seed: value
                for seed, result in sorted(runs.items())
                if (value := _value(result, metric)) is not None
            }
            if values:
                found[variant] = values
        return found

    def comparisons(self, setting: str) -> list[Comparison]:
        """Compares variants with the baseline by the primary metric.

        Raises:
            ValueError: If the baseline has no finished run in this setting.
        """
        metric, file = primary_metric(self.plan), self.plan.file
        values = self.values(setting, metric)
        if file.baseline not in values:
            raise ValueError(f"{setting}: {self.without_baseline(setting)}")
        return compare(
            setting,
            values,
            file.baseline,
            margin=file.primary.margin,
            higher_is_better=metric.higher_is_better,
            compared=self.plan.compared,
        )

    def without_baseline(self, setting: str) -> str | None:
        """Says why the variants of a setting cannot be compared; None if they can."""
        metric, baseline = primary_metric(self.plan), self.plan.file.baseline
        if baseline in self.values(setting, metric):
            return None
        if self.results.get((setting, baseline)):
            return f"the runs of the baseline {baseline} have no {metric.name}"
        return f"no run of the baseline {baseline} is finished"


def primary_metric(plan: Plan) -> Metric:
    """Returns the metric that a study compares.

    Raises:
        RecipeError: If there is no metric of this name, or a recipe does not compute it.
    """
    name = plan.file.primary.metric
    if name not in METRICS:
        raise RecipeError(
            f"{plan.file.name}: primary.metric: there is no metric {name!r}"
            f"{near(name, list(METRICS))}"
        )
    recipes = plan.recipes.values()
    if METRICS[name].on_request and not all(name in recipe.evaluation for recipe in recipes):
        raise RecipeError(
            f"{plan.file.name}: primary.metric: {name} is computed on request only; "
            f"set evaluation: [{name}]"
        )
    if METRICS[name].needs_teacher and not all(recipe.teacher for recipe in recipes):
        raise RecipeError(
            f"{plan.file.name}: primary.metric: {name} cannot be computed without a teacher"
        )
    return METRICS[name]


def _value(result: Mapping[str, Any], metric: Metric) -> float | None:
    part = result.get("teacher_similarity" if metric.needs_teacher else "last") or {}
    value = part.get(metric.name)
    return None if value is None else float(value)


def collect(plan: Plan, place: Place) -> Collected:
    """Reads the results of all finished jobs.

    Raises:
        ValueError: If a result was altered or belongs to another recipe.
    """
    study = Collected(plan, {})
    for job in plan.jobs():
        path = place.result(job)
        if path is not None:
            key = job.setting, job.variant
            study.results.setdefault(key, {})[job.seed] = files.read_sealed(path)
            study.folders.setdefault(key, {})[job.seed] = path.parent
    return study
