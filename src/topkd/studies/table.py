"""Tables of a study: Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

from topkd.evaluation.metrics import Metric
from topkd.evaluation.statistics import Sample
from topkd.reporting.escaping import for_latex, for_markdown
from topkd.studies.analysis import Comparison
from topkd.studies.collect import Collected, primary_metric


def rows(study: Collected) -> list[dict[str, Any]]:
    """Returns a row per variant and setting, as plain values; the baseline comes first.

    Raises:
        ValueError: If no setting has a finished run of the baseline.
    """
    problems = [study.without_baseline(setting) for setting in study.plan.settings]
    if all(problems):
        raise ValueError(f"{study.plan.file.name}: {problems[0]}")
    return [row for setting in study.plan.settings for row in setting_rows(study, setting)]


def setting_rows(study: Collected, setting: str) -> list[dict[str, Any]]:
    """Returns the rows of one setting, including variants that cannot be compared."""
    problem = study.without_baseline(setting)
    compared = {} if problem else {each.variant: each for each in study.comparisons(setting)}
    values = study.values(setting, primary_metric(study.plan))
    found = []
    for variant in study.plan.variants:
        if variant in compared:
            found.append(_row(compared[variant]))
            continue
        sample = Sample(tuple(values[variant].values())) if variant in values else None
        verdict = "no common seed" if problem is None else "baseline not finished"
        if sample is None:
            has_runs = study.results.get((setting, variant))
            verdict = "not measured" if has_runs else "not finished"
        elif variant == study.plan.file.baseline:
            verdict = "baseline"
        found.append(_summary(setting, variant, sample) | {"verdict": verdict})
    return found


def _summary(setting: str, variant: str, sample: Sample | None) -> dict[str, Any]:
    return {
        "setting": setting,
        "variant": variant,
        "n": 0 if sample is None else sample.n,
        "mean": None if sample is None else sample.mean,
        "std": None if sample is None else sample.std,
    }


def _row(comparison: Comparison) -> dict[str, Any]:
    verdict: str = comparison.verdict
    if comparison.needed is not None:
        verdict += f" (about {comparison.needed} seeds would decide)"
    low, high = comparison.interval or (None, None)
    return _summary(comparison.setting, comparison.variant, comparison.values) | {
        "pairs": comparison.differences.n,
        "difference": comparison.differences.mean,
        "low": low,
        "high": high,
        "p": comparison.p,
        "verdict": verdict,
    }


def markdown(study: Collected) -> str:
    """Writes a Markdown table."""
    metric = primary_metric(study.plan)
    lines = ["| " + " | ".join(headings(metric)) + " |", "|---|---|--:|--:|--:|--:|---|"]
    lines += [
        "| " + " | ".join(map(for_markdown, cells(row, metric))) + " |" for row in rows(study)
    ]
    return "\n".join(lines) + "\n"


def latex(study: Collected) -> str:
    """Writes a LaTeX table for the package booktabs; bold where a variant is better."""
    metric = primary_metric(study.plan)
    lines = [
        r"\begin{tabular}{llrrrrl}",
        r"\toprule",
        " & ".join(for_latex(heading) for heading in headings(metric)) + r" \\",
        r"\midrule",
    ]
    before = None
    for row in rows(study):
        if before not in (None, row["setting"]):
            lines.append(r"\midrule")
        before = row["setting"]
        escaped = [for_latex(cell) for cell in cells(row, metric)]
        if row["verdict"] == "better":
            escaped[2] = rf"\textbf{{{escaped[2]}}}"
        lines.append(" & ".join(escaped) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_csv(study: Collected) -> str:
    """Writes CSV, one row per variant."""
    found = rows(study)
    names = max((list(row) for row in found), key=len)  # the baseline has no difference
    file = io.StringIO()
    writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return file.getvalue()


def as_json(study: Collected) -> str:
    """Writes JSON with the values of all seeds."""
    metric = primary_metric(study.plan)
    found = [
        row | {"values": study.values(row["setting"], metric).get(row["variant"], {})}
        for row in rows(study)
    ]
    return json.dumps(found, indent=2) + "\n"


FORMATS: Mapping[str, Callable[[Collected], str]] = {
    "markdown": markdown,
    "latex": latex,
    "csv": as_csv,
    "json": as_json,
}
"""Name -> function that writes a table."""


def headings(metric: Metric) -> tuple[str, ...]:
    """Returns the headings of :func:`cells`."""
    return (
        "Setting",
        "Variant",
        f"{metric.heading}: mean ± std (n)",
        "Difference [95 % simultaneous]",
        "Pairs",
        "p",
        "Verdict",
    )


def cells(row: Mapping[str, Any], metric: Metric) -> tuple[str, ...]:
    """Formats a row of :func:`rows`."""
    spec, signed = f".{metric.digits}f", f"+.{metric.digits}f"
    spread = "" if row["std"] is None else f" ± {row['std']:{spec}}"
    difference, p = "–", "–"
    if "difference" in row:
        difference = f"{row['difference']:{signed}}"
    if row.get("p") is not None:
        difference += f" [{row['low']:{signed}}, {row['high']:{signed}}]"
        p = _p(row["p"])
    return (
        row["setting"],
        row["variant"],
        "–" if row["mean"] is None else f"{row['mean']:{spec}}{spread} ({row['n']})",
        difference,
        str(row.get("pairs", "–")),
        p,
        row["verdict"],
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
