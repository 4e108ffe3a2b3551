"""Tables in the layout of published benchmarks: methods as rows, settings as columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topkd.config.terms import IMPLIED
from topkd.evaluation.metrics import Metric
from topkd.evaluation.statistics import Sample
from topkd.reporting.escaping import for_latex, for_markdown
from topkd.studies.analysis import compare
from topkd.studies.collect import Collected, primary_metric


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    name: str
    is_method: bool
    """False for the teacher, and for the student without a teacher."""
    cells: Mapping[str, Sample]
    """Setting -> values over seeds, without the settings that have no result."""
    best: frozenset[str] = frozenset()
    """Settings in which the method is better than all others."""


def lines(study: Collected) -> list[Line]:
    """Returns the rows of the table: teacher, student without a teacher, then the methods.

    The student is the one variant whose only loss is cross-entropy. A method is the best of a
    setting if all others are worse, in paired tests with a simultaneous confidence of 95 %. Where
    this is not decided, none is.

    Raises:
        ValueError: If no job is finished.
    """
    if not study.results:
        raise ValueError(f"{study.plan.file.name}: no job is finished")
    metric, settings = primary_metric(study.plan), study.plan.settings
    plain = [
        variant
        for variant in study.plan.variants
        if all(study.plan.recipes[setting, variant].main == IMPLIED for setting in settings)
    ]
    student = plain[0] if len(plain) == 1 else None
    values = {setting: study.values(setting, metric) for setting in settings}
    best = {setting: _best(each, student, metric) for setting, each in values.items()}
    teachers = {s: each for s in settings if (each := _teachers(study, s, metric)) is not None}
    found = [Line("teacher", False, teachers)]
    for variant in sorted(study.plan.variants, key=lambda name: name != student):
        cells = {s: Sample(tuple(v[variant].values())) for s, v in values.items() if variant in v}
        name = "student" if variant == student else variant
        won = frozenset(s for s in settings if best[s] == variant)
        found.append(Line(name, variant != student, cells, won))
    return [line for line in found if line.cells]


def _teachers(study: Collected, setting: str, metric: Metric) -> Sample | None:
    """Returns the metric of the distinct teachers of a setting, normally one."""
    found: dict[str, float] = {}
    for variant in study.plan.variants:
        for result in study.results.get((setting, variant), {}).values():
            teacher = result.get("teacher") or {}
            if metric.name in teacher:
                found[teacher["hash"]] = float(teacher[metric.name])
    return Sample(tuple(found.values())) if found else None


def _best(
    values: Mapping[str, Mapping[int, float]], student: str | None, metric: Metric
) -> str | None:
    """Returns the method that all others are worse than; None if that is not decided."""
    methods = {variant: runs for variant, runs in values.items() if variant != student}
    if len(methods) < 2:
        return None
    means = {variant: Sample(tuple(runs.values())).mean for variant, runs in methods.items()}
    best = (max if metric.higher_is_better else min)(means, key=lambda variant: means[variant])
    # Wrong only if the truly best method is found worse than this one, so that the choice of the
    # reference from the data needs no further correction.
    others = compare("", methods, best, higher_is_better=metric.higher_is_better)
    decided = len(others) == len(methods) - 1 and all(each.verdict == "worse" for each in others)
    return best if decided else None


def _texts(
    study: Collected, line: Line, escape: Callable[[str], str], bold: str
) -> tuple[str, ...]:
    """Formats a row; ``bold`` contains {} for the text."""
    spec, texts = f".{primary_metric(study.plan).digits}f", []
    for setting in study.plan.settings:
        text = escape(format(line.cells[setting], spec) if setting in line.cells else "–")
        texts.append(bold.replace("{}", text) if setting in line.best else text)
    return (escape(line.name), *texts)


def _head(study: Collected) -> list[str]:
    return [f"{primary_metric(study.plan).heading}: mean ± std (n)", *study.plan.settings]


def markdown(study: Collected) -> str:
    """Writes a Markdown table; bold where a method is better than all others."""
    head, found = (
        _head(study),
        [_texts(study, each, for_markdown, "**{}**") for each in lines(study)],
    )
    table = [map(for_markdown, head), ["---", *["--:"] * (len(head) - 1)], *found]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def latex(study: Collected) -> str:
    """Writes a LaTeX table for the package booktabs; bold where a method is better than all."""
    head, found = _head(study), lines(study)
    text = [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule"]
    text += [_row(map(for_latex, head)), r"\midrule"]
    networks = [line for line in found if not line.is_method]
    text += [_row(_texts(study, line, for_latex, r"\textbf{{}}")) for line in networks]
    text += [r"\midrule"] if networks else []
    methods = [line for line in found if line.is_method]
    text += [_row(_texts(study, line, for_latex, r"\textbf{{}}")) for line in methods]
    return "\n".join([*text, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _row(cells: Sequence[str] | map[str]) -> str:
    return " & ".join(cells) + r" \\"


def as_csv(study: Collected) -> str:
    """Writes CSV with a line per method and three columns per setting: mean, std and n."""
    names = [
        "method",
        *(f"{s} {what}" for s in study.plan.settings for what in ("mean", "std", "n")),
    ]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for line in lines(study):
        row: list[Any] = [line.name]
        for setting in study.plan.settings:
            sample = line.cells.get(setting)
            row += [""] * 3 if sample is None else [sample.mean, sample.std, sample.n]
        writer.writerow(row)
    return file.getvalue()


def as_json(study: Collected) -> str:
    """Writes JSON with one entry per method and setting."""
    entries = [
        {
            "method": line.name,
            "setting": setting,
            "n": sample.n,
            "mean": sample.mean,
            "std": sample.std,
            "best": setting in line.best,
        }
        for line in lines(study)
        for setting, sample in line.cells.items()
    ]
    return json.dumps(entries, indent=2) + "\n"


FORMATS: Mapping[str, Callable[[Collected], str]] = {
    "markdown": markdown,
    "latex": latex,
    "csv": as_csv,
    "json": as_json,
}
"""Name -> function that writes a table."""
