"""Figures of a study: forest plots, trade-offs, learning curves and gradient shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from topkd.evaluation.metrics import METRICS, Metric
from topkd.evaluation.results import Run
from topkd.evaluation.statistics import Sample
from topkd.reporting.plots.forest import Difference, forest
from topkd.reporting.plots.interactive import Chart
from topkd.reporting.plots.variants import (
    Look,
    Spread,
    learning_curve,
    share_bars,
    tradeoff,
)
from topkd.studies.analysis import Comparison, Verdict
from topkd.studies.overall import Overall
from topkd.studies.sentences import SYMBOLS

Runs = Mapping[str, Mapping[int, Run]]  # variant -> seed -> run, of one setting
SHORT: Mapping[Verdict, str] = {"no difference that matters": "no difference"}


@dataclass(frozen=True)
class Style:
    """What all figures of a study share."""

    metric: Metric
    baseline: str
    margin: float | None
    looks: Mapping[str, Look]

    @property
    def difference(self) -> str:
        """Label of an axis of differences."""
        unit = "points" if self.metric.unit == "%" else self.metric.unit
        return f"{self.metric.title}, difference to {self.baseline}" + (f", {unit}" if unit else "")


def setting_forest(setting: str, comparisons: Sequence[Comparison], style: Style) -> Chart:
    """Plots the comparisons of a setting, the best variant at the top."""
    rows = [
        Difference(
            each.variant,
            each.differences.mean,
            each.interval,
            _by_seed(each, "seed"),
            short(each.verdict),
        )
        for each in comparisons
    ]
    return _forest(rows, setting, style)


def overall_forest(averages: Sequence[Overall], title: str, style: Style) -> Chart:
    """Plots the means over settings, with the differences of all settings and seeds as dots."""
    rows = [
        Difference(
            each.variant,
            each.mean,
            each.interval,
            {
                name: value
                for part in each.comparisons
                for name, value in _by_seed(part, f"{part.setting}, seed").items()
            },
            short(each.verdict),
        )
        for each in averages
    ]
    return _forest(rows, title, style)


def _by_seed(comparison: Comparison, name: str) -> dict[str, float]:
    pairs = zip(comparison.seeds, comparison.differences.values, strict=True)
    return {f"{name} {seed}": value for seed, value in pairs}


def short(verdict: Verdict) -> str:
    """Formats a verdict with its symbol for narrow places."""
    return f"{SYMBOLS[verdict]} {SHORT.get(verdict, verdict)}"


def _forest(rows: Sequence[Difference], title: str, style: Style) -> Chart:
    sign = -1 if style.metric.higher_is_better else 1
    return forest(
        sorted(rows, key=lambda row: sign * row.mean),
        title=title,
        xlabel=style.difference,
        digits=style.metric.digits,
        margin=style.margin,
        colors={name: look.color for name, look in style.looks.items()},
    )


def cost(runs: Runs, style: Style) -> Chart:
    """Plots the primary metric against the training time of a run."""
    seconds = {
        variant: [run.result.train_seconds for run in seeds.values()]
        for variant, seeds in runs.items()
    }
    return _against(runs, seconds, "Accuracy and cost", "training of one run, s", 1, style)


def distance(runs: Runs, style: Style) -> Chart | None:
    """Plots the primary metric against the topological distance; None if it was not measured."""
    metric = METRICS["topological_distance"]
    found = {
        variant: [run.result.metric(metric.name) for run in seeds.values()]
        for variant, seeds in runs.items()
    }
    known = {
        variant: [value for value in values if value is not None]
        for variant, values in found.items()
    }
    if style.metric is metric or not any(known.values()):
        return None
    label = f"{metric.title} to the teacher"
    return _against(runs, known, "Accuracy and topology", label, metric.digits, style)


def _against(
    runs: Runs,
    quantities: Mapping[str, Sequence[float]],
    title: str,
    xlabel: str,
    digits: int,
    style: Style,
) -> Chart:
    metric, points = style.metric, {}
    for variant, seeds in runs.items():
        measured = [run.result.metric(metric.name) for run in seeds.values()]
        values = tuple(value for value in measured if value is not None)
        if values and quantities[variant]:
            x, y = Sample(tuple(quantities[variant])), Sample(values)
            hover = f"{variant}: {xlabel} {x:.{digits}f}, {metric.title} {y:.{metric.digits}f}"
            points[variant] = Spread(x.mean, y.mean, x.std or 0.0, y.std or 0.0, hover)
    return tradeoff(points, title=title, xlabel=xlabel, ylabel=metric.heading, looks=style.looks)


def curves(runs: Runs, style: Style) -> dict[str, Chart]:
    """Plots the accuracy over the epochs, one panel per variant; empty without metrics.jsonl."""
    histories = {
        variant: [
            [entry.get(f"{run.result.eval_split}_top1", math.nan) for entry in run.history]
            for run in seeds.values()
            if run.history
        ]
        for variant, seeds in runs.items()
    }
    known = [v for seeds in histories.values() for seed in seeds for v in seed if math.isfinite(v)]
    if not known:
        return {}
    space = 0.04 * (max(known) - min(known)) or 1.0
    return {
        variant: learning_curve(
            seeds,
            histories.get(style.baseline, []),
            name=variant,
            ylabel=f"{METRICS['top1'].title}, %",
            look=style.looks[variant],
            limits=(min(known) - space, max(known) + space),
        )
        for variant, seeds in histories.items()
        if seeds and variant != style.baseline
    }


def shares(runs: Runs) -> tuple[Chart, dict[str, str]]:
    """Plots the gradient shares at the last epoch, averaged over seeds; see :func:`share_bars`.

    Variants whose gradients were not measured at the embedding are marked.
    """
    found, labels = {}, {}
    for variant, seeds in runs.items():
        results = [run.result.gradient_share for run in seeds.values()]
        for place in {run.result.gradient_at for run in seeds.values()} - {"embedding"}:
            labels[variant] = f"{variant}, at the {place}"
        terms = dict.fromkeys(term for each in results for term in each)
        found[variant] = {
            t: sum(each.get(t, 0.0) for each in results) / len(results) for t in terms
        }
    return share_bars(found, title="Gradient shares, last epoch", labels=labels)


def element(chart: Chart, name: str, alt: str) -> Markup:
    """Returns the HTML element of a figure; the name must be unique on the page."""
    return Markup(chart.svg(prefix=name, alt=alt))  # noqa: S704
