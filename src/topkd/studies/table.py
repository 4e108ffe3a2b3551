"""Tables of a study: Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from topkd.studies.analysis import Comparison
from topkd.studies.collect import Collected

HEADINGS = (
    "Setting",
    "Variant",
    "n",
    "Mean ± std",
    "Difference [95 % simultaneous]",
    "p",
    "Verdict",
)


def rows(study: Collected) -> list[dict[str, Any]]:
    """Returns a row per variant and setting, as plain values; the baseline comes first."""
    metric, baseline = study.plan.file.primary.metric, study.plan.file.baseline
    found = []
    for setting in study.plan.settings:
        values = study.values(setting, metric)
        if baseline not in values:
            continue
        base = list(values[baseline].values())
        spread = Comparison(setting, baseline, values[baseline], {}, 0, 0, 0, "undecided", None)
        found.append(
            {
                "setting": setting,
                "variant": baseline,
                "n": len(base),
                "mean": spread.mean,
                "std": spread.deviation,
                "verdict": "baseline",
            }
        )
        found += [_row(each) for each in study.comparisons(setting)]
    if not found:
        raise ValueError(f"{study.plan.file.name}: no run of the baseline is finished")
    return found


def _row(comparison: Comparison) -> dict[str, Any]:
    verdict: str = comparison.verdict
    if comparison.needed is not None:
        verdict += f" (about {comparison.needed} seeds would decide)"
    return {
        "setting": comparison.setting,
        "variant": comparison.variant,
        "n": len(comparison.differences),
        "mean": comparison.mean,
        "std": comparison.deviation,
        "difference": comparison.difference,
        "low": comparison.low,
        "high": comparison.high,
        "p": comparison.p,
        "verdict": verdict,
    }


def markdown(study: Collected) -> str:
    """Writes a Markdown table."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|--:|--:|--:|--:|---|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows(study)]
    return "\n".join(lines) + "\n"


def latex(study: Collected) -> str:
    """Writes a LaTeX table for the package booktabs; bold where a difference is decided."""
    lines = [
        r"\begin{tabular}{llrrrrl}",
        r"\toprule",
        " & ".join(_escaped(heading) for heading in HEADINGS) + r" \\",
        r"\midrule",
    ]
    before = None
    for row in rows(study):
        if before not in (None, row["setting"]):
            lines.append(r"\midrule")
        before = row["setting"]
        cells = [_escaped(cell) for cell in _cells(row)]
        if row["verdict"] == "better":
            cells[3] = rf"\textbf{{{cells[3]}}}"
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_csv(study: Collected) -> str:
    """Writes CSV, one row per variant."""
    found = rows(study)
    names = list(dict.fromkeys(name for row in found for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, restval="")
    writer.writeheader()
    writer.writerows(found)
    return file.getvalue()


def as_json(study: Collected) -> str:
    """Writes JSON with the values of all seeds."""
    metric = study.plan.file.primary.metric
    found = rows(study)
    for row in found:
        row["values"] = study.values(row["setting"], metric)[row["variant"]]
    plain = [{name: _plain(value) for name, value in row.items()} for row in found]
    return json.dumps(plain, indent=2) + "\n"


FORMATS: Mapping[str, Callable[[Collected], str]] = {
    "markdown": markdown,
    "latex": latex,
    "csv": as_csv,
    "json": as_json,
}
"""Name -> function that writes a table."""


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    spread = "" if math.isnan(row["std"]) else f" ± {row['std']:.2f}"
    compared = "difference" in row and not math.isnan(row["low"])
    interval = (
        f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" if compared else "–"
    )
    return (
        row["setting"],
        row["variant"],
        str(row["n"]),
        f"{row['mean']:.2f}{spread}",
        interval,
        _p(row["p"]) if compared else "–",
        row["verdict"],
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _escaped(text: str) -> str:
    for character, written in (
        ("\\", r"\textbackslash "),
        ("&", r"\&"),
        ("%", r"\%"),
        ("_", r"\_"),
        ("#", r"\#"),
        ("±", r"$\pm$"),
        ("–", "--"),
        ("<", "$<$"),
    ):
        text = text.replace(character, written)
    return text


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
