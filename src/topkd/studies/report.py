"""Report of a study: one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from topkd._io import files
from topkd._io.progress import Progress
from topkd.evaluation.metrics import METRICS
from topkd.evaluation.results import MADE_WITH, read
from topkd.evaluation.statistics import Sample
from topkd.reporting.page import formula
from topkd.reporting.plots.interactive import variable
from topkd.reporting.plots.style import DARK
from topkd.reporting.plots.variants import looks
from topkd.reporting.sections import count, fixed
from topkd.reporting.templating import render
from topkd.studies import figures, sentences
from topkd.studies.analysis import Comparison, Verdict
from topkd.studies.collect import Collected, primary_metric
from topkd.studies.figures import Runs, Style, element
from topkd.studies.overall import over_settings
from topkd.studies.plan import Place
from topkd.studies.sentences import SYMBOLS, counted, listed
from topkd.studies.table import cells, headings, setting_rows

ABSENT = "–"
NO_CURVES = "No learning curves: there is no metrics.jsonl beside the results."
GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}  # markers in the legend


@dataclass(frozen=True)
class Table:
    """A table of the page; the first column names a variant."""

    headings: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    """Variant -> other cells."""


@dataclass(frozen=True)
class SettingPart:
    """The part of the page on one setting."""

    name: str
    jobs: str
    comparisons: Table | None
    forest: Markup | None
    metrics: Table
    pictures: Sequence[Markup]
    curves: Mapping[str, Markup]
    terms: Mapping[str, str]
    cautions: Sequence[str]
    recipes: Table
    provenance: Mapping[str, str]
    missing: Sequence[str]


def html(study: Collected, place: Place, progress: Progress | None = None) -> str:
    """Renders a study as one self-contained page.

    Args:
        study: Its finished jobs.
        place: Their folders.
        progress: Shows progress. Silent by default.

    Raises:
        ValueError: If no job is finished, or a file of a run was altered.
    """
    if not study.results:
        raise ValueError(f"{study.plan.file.name}: no job is finished, so there is no report")
    style = Style(
        primary_metric(study.plan),
        study.plan.file.baseline,
        study.plan.file.primary.margin,
        looks(study.plan.variants, study.plan.file.baseline),
    )
    compared = _compared(study)
    parts, progress = [], progress or Progress(quiet=True)
    with progress.bar("Report", len(study.plan.settings), "settings") as advance:
        for number, setting in enumerate(study.plan.settings):
            parts.append(_setting(study, setting, compared.get(setting, []), style, f"s{number}"))
            advance(1, setting)
    values = {
        "name": study.plan.file.name,
        "style": style,
        "complete": all(finished == jobs for finished, jobs in _counts(study)),
        "progress": sentences.progress(study, place),
        "selection": sentences.selection(study.plan),
        "findings": [sentences.finding(study, setting) for setting in study.plan.settings],
        "legend": {
            name: (variable(look.color), GLYPHS[look.marker])
            for name, look in style.looks.items()
            if any(variant == name for _, variant in study.results)
        },
        "overall": _overall(study, compared, style),
        "first": next((part for part in parts if part.forest), parts[0]),
        "parts": parts,
        "metrics": [
            metric
            for metric in METRICS.values()
            if any(study.values(setting, metric) for setting in study.plan.settings)
        ],
        "symbols": SYMBOLS,
        "dark": DARK,
    }
    return render("study.html", values)


def write_report(study: Collected, place: Place, path: Path, progress: Progress) -> None:
    """Writes the page of :func:`html` to a file.

    Raises:
        ValueError: If no job is finished, or a file of a run was altered.
        OSError: If the file cannot be written.
    """
    files.write(path, html(study, place, progress))


def _counts(study: Collected) -> list[tuple[int, int]]:
    return [sentences.done(study, setting) for setting in study.plan.settings]


def _compared(study: Collected) -> dict[str, list[Comparison]]:
    """Returns the comparisons of all settings in which the baseline is finished."""
    return {
        setting: study.comparisons(setting)
        for setting in study.plan.settings
        if not study.without_baseline(setting)
    }


@dataclass(frozen=True)
class OverallPart:
    """The summary over several settings."""

    forest: Markup | None
    table: Table


def _overall(
    study: Collected, compared: Mapping[str, list[Comparison]], style: Style
) -> OverallPart | None:
    """Builds the table of variants x settings with the means over settings."""
    found = {setting: each for setting, each in compared.items() if each}
    if len(found) < 2:
        return None
    averages = over_settings(
        found,
        margin=style.margin,
        higher_is_better=style.metric.higher_is_better,
        compared=study.plan.compared,
    )
    name = f"Mean over {len(found)} settings"
    differences: dict[str, dict[str, str]] = {variant: {} for variant in study.plan.variants}
    for each in (each for comparisons in found.values() for each in comparisons):
        mean = each.differences.mean
        differences[each.variant][each.setting] = _cell(mean, each.interval, each.verdict, style)
    for average in averages:
        cell = _cell(average.mean, average.interval, average.verdict, style)
        differences[average.variant][name] = cell
    columns = [*study.plan.settings, name]
    rows = {
        variant: [cell.get(column, ABSENT) for column in columns]
        for variant, cell in differences.items()
        if cell
    }
    chart = None
    if averages:
        figure = figures.overall_forest(averages, name, style)
        chart = element(figure, "overall", f"{name} of the differences to {style.baseline}")
    return OverallPart(chart, Table(["Variant", *columns], rows))


def _cell(mean: float, interval: tuple[float, float] | None, verdict: Verdict, style: Style) -> str:
    spec = f"+.{style.metric.digits}f"
    ends = "" if interval is None else f" [{fixed(interval[0], spec)}, {fixed(interval[1], spec)}]"
    return f"{fixed(mean, spec)}{ends} {SYMBOLS[verdict]}"


def _setting(
    study: Collected, setting: str, compared: list[Comparison], style: Style, name: str
) -> SettingPart:
    runs = {
        variant: {seed: read(folder) for seed, folder in sorted(folders.items())}
        for variant in study.plan.variants
        if (folders := study.folders.get((setting, variant)))
    }
    done, jobs = sentences.done(study, setting)
    forest = None
    if compared:
        chart = figures.setting_forest(setting, compared, style)
        forest = element(chart, f"{name}-forest", f"differences to {style.baseline}, {setting}")
    curves = _curves(runs, style, name)
    pictures, terms = _pictures(runs, style, name)
    return SettingPart(
        name=setting,
        jobs=f"{done} of {count(jobs, 'job')}",
        comparisons=_comparisons(study, setting),
        forest=forest,
        metrics=_metrics(study, setting, runs),
        pictures=pictures,
        curves=curves,
        terms=terms,
        cautions=sentences.cautions(study, setting),
        recipes=_recipes(study, setting),
        provenance=_provenance(runs),
        missing=[] if curves else [NO_CURVES if runs else "No job of this setting is finished."],
    )


def _curves(runs: Runs, style: Style, name: str) -> dict[str, Markup]:
    return {
        variant: element(chart, f"{name}-c{number}", f"accuracy over the epochs of {variant}")
        for number, (variant, chart) in enumerate(figures.curves(runs, style).items())
    }


def _pictures(runs: Runs, style: Style, name: str) -> tuple[list[Markup], dict[str, str]]:
    """Draws the figures of a setting besides forest and curves; returns the colors of terms too."""
    if not runs:
        return [], {}
    charts = {"accuracy against training time": figures.cost(runs, style)}
    distance = figures.distance(runs, style)
    if distance is not None:
        charts["accuracy against topological distance"] = distance
    charts["gradient shares of the loss terms"], colors = figures.shares(runs)
    elements = [
        element(chart, f"{name}-p{number}", alt)
        for number, (alt, chart) in enumerate(charts.items())
    ]
    return elements, {term: variable(color) for term, color in colors.items()}


def _comparisons(study: Collected, setting: str) -> Table | None:
    if study.without_baseline(setting):
        return None
    rows = setting_rows(study, setting)
    metric = primary_metric(study.plan)
    found = {}
    for row in rows:
        _, variant, *others, verdict = cells(row, metric)
        symbol = next((s for name, s in SYMBOLS.items() if verdict.startswith(name)), "")
        numbers = [text.replace("-", "\u2212") for text in others]
        found[variant] = [*numbers, f"{symbol} {verdict}".strip()]
    return Table(headings(metric)[1:], found)


def _metrics(study: Collected, setting: str, runs: Runs) -> Table:
    """Tabulates all metrics of a setting, and the training time."""
    measured = {
        metric: values for metric in METRICS.values() if (values := study.values(setting, metric))
    }
    found = {}
    for variant, seeds in runs.items():
        seconds = Sample(tuple(run.result.train_seconds for run in seeds.values()))
        found[variant] = [
            format(Sample(tuple(values[variant].values())), f".{metric.digits}f")
            if variant in values
            else ABSENT
            for metric, values in measured.items()
        ] + [format(seconds, ".1f")]
    return Table(["Variant", *(metric.heading for metric in measured), "training, s"], found)


def _recipes(study: Collected, setting: str) -> Table:
    found = {}
    for variant in study.plan.variants:
        recipe = study.plan.recipes[setting, variant]
        done = len(study.results.get((setting, variant), {}))
        jobs = len(study.plan.file.all_seeds)
        found[variant] = [formula(list(recipe.losses)), recipe.hash, f"{done} of {jobs}"]
    return Table(["Variant", "Losses", "Recipe hash", "Jobs done"], found)


def _provenance(runs: Runs) -> dict[str, str]:
    """Describes where results come from: name -> values; numbers of runs if they differ."""
    results = [run.result for seeds in runs.values() for run in seeds.values()]
    teachers = [result.teacher for result in results if result.teacher is not None]
    described = {
        "student": counted(result.model for result in results),
        "teacher": counted(f"{each.model} ({each.hash[:12]})" for each in teachers),
        "data": counted(result.data for result in results),
        "evaluated on": counted(result.eval_split for result in results),
        "epochs": counted(result.epochs for result in results),
    }
    names = dict.fromkeys([*MADE_WITH, *(name for r in results for name in r.environment)])
    for name in names:
        described[name] = counted(result.environment.get(name) for result in results)
    return {name: listed(values) for name, values in described.items() if values}
