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
        ValueError: If no run of the baseline is finished.
    """
    found = [row for setting in study.plan.settings for row in setting_rows(study, setting)]
    if not found:
        raise ValueError(f"{study.plan.file.name}: no run of the baseline is finished")
    return found


def setting_rows(study: Collected, setting: str) -> list[dict[str, Any]]:
    """Returns the rows of one setting; none if no run of the baseline is finished."""
    values, baseline = study.values(setting, primary_metric(study.plan)), study.plan.file.baseline
    if baseline not in values:
        return []
    sample = Sample(tuple(values[baseline].values()))
    first = _summary(setting, baseline, sample) | {"verdict": "baseline"}
    return [first, *(_row(each) for each in study.comparisons(setting))]


def _summary(setting: str, variant: str, sample: Sample) -> dict[str, Any]:
    return {
        "setting": setting,
        "variant": variant,
        "n": sample.n,
        "mean": sample.mean,
        "std": sample.std,
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
        row | {"values": study.values(row["setting"], metric)[row["variant"]]}
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
        f"{row['mean']:{spec}}{spread} ({row['n']})",
        difference,
        str(row.get("pairs", "–")),
        p,
        row["verdict"],
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
