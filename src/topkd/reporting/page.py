"""Reports of finished runs: Markdown tables and a self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

import topkd
from topkd._io import files
from topkd._io.progress import Progress
from topkd.config.terms import Term
from topkd.evaluation.metrics import METRICS, Metric, displayed
from topkd.evaluation.results import MADE_WITH, Study, TeacherResult, collect
from topkd.evaluation.statistics import Paired, Sample, holm
from topkd.models import checkpoint
from topkd.reporting import plots, sections
from topkd.reporting.escaping import for_markdown
from topkd.reporting.sections import Picture, Section, count, fixed
from topkd.reporting.templating import render

__all__ = ["collect", "formula", "html", "markdown", "rows", "write_report"]

ALPHA = 0.05  # significance level
ABSENT = "–"
INPUTS = (
    *("result.json", "metrics.jsonl", "examples.safetensors", "recipe.yaml"),
    *("*net-*.safetensors", checkpoint.WEIGHTS),
)
"""File names that a page is built from."""


Row = dict[str, str]
"""A row of the table, for a teacher or a variant: column -> text."""


def headings(studies: Sequence[Study] = ()) -> Row:
    """Lists the columns of the table: the metrics of these studies and what describes a run."""
    measured = {name: metric.heading for name, metric in _metrics(studies).items()}
    measured = {name: heading[:1].upper() + heading[1:] for name, heading in measured.items()}
    return {
        "run": "Run",
        "losses": "Losses",
        "top1": "",  # the headline comes first
        "difference": "Difference to baseline [95 % interval]",
        "mean_of_last_10": "Mean of last 10 epochs, %",
        "best": "Best epoch, % (recorded only)",
        **measured,
        "seconds": "Training, s",
    }


def _metrics(studies: Sequence[Study]) -> dict[str, Metric]:
    """Selects the metrics to show: without those on request that no run has."""
    return displayed(lambda name: any(any(study.metric(name).values()) for study in studies))


SCHEDULE = ("share", "start", "stop", "warmup", "decay", "batch")  # keys shown with a term


def formula(losses: list[Term]) -> str:
    """Formats losses as a weighted sum.

    Examples:
        >>> formula([Term(name="ce"), Term(name="kd", weight=2.0, temperature=4.0)])
        'ce + 2 kd (temperature 4)'
        >>> formula([Term(name="ce", start=4), Term(name="topkd", share=0.05)])
        'ce (start 4) + topkd (share 0.05)'
    """
    summands = []
    for term in losses:
        weight = "" if term.weight == 1 else f"{term.weight:g} "
        changed = term.model_dump(include=set(SCHEDULE), exclude_defaults=True)
        options = {name: changed[name] for name in SCHEDULE if name in changed}
        listed = ", ".join(_options(options | term.options))
        summands.append(f"{weight}{term.name}" + (f" ({listed})" if listed else ""))
    return " + ".join(summands)


def _options(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    listed = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            listed += _options(value, f"{prefix}{name}.")
        else:
            listed.append(f"{prefix}{name} {f'{value:g}' if _is_number(value) else value}")
    return listed


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rows(study: Study) -> list[Row]:
    """Builds the table: the teacher, the controls, then the recipe's own losses."""
    differences, teachers = study.compare(), _teachers(study)
    empty = dict.fromkeys((*headings(), *METRICS), ABSENT)
    table = []
    if teachers:
        models = ", ".join(dict.fromkeys(teacher.model for teacher in teachers))
        values = {
            name: _sample([teacher.value(name) for teacher in teachers], metric.digits)
            for name, metric in METRICS.items()
            if not metric.needs_teacher
        }
        table.append(empty | {"run": f"teacher: {models}"} | values)
    for variant, seeds in study.variants.items():
        results = [run.result for run in seeds.values()]
        row = {
            "run": f"{variant} (baseline)" if variant == study.baseline else variant,
            "losses": formula(results[0].losses),
            "mean_of_last_10": _sample([result.mean_of_last_10 for result in results]),
            "best": _sample([result.best.top1 for result in results]),
            "seconds": _sample([result.train_seconds for result in results], 1),
        }
        for name, metric in METRICS.items():
            row[name] = _sample([result.metric(name) for result in results], metric.digits)
        if variant in differences:
            row["difference"] = _difference(differences[variant])
        table.append(empty | row)
    return table


def _sample(values: Sequence[float | None], digits: int = 2) -> str:
    known = tuple(value for value in values if value is not None)
    return format(Sample(known), f".{digits}f") if known else ABSENT


def _teachers(study: Study) -> list[TeacherResult]:
    """Returns the distinct teachers of a study, normally one."""
    found = [run.result.teacher for run in study.runs if run.result.teacher is not None]
    return list({teacher.hash: teacher for teacher in found}.values())


def _difference(found: Paired | None) -> str:
    if found is None:
        return "no common seed"
    mean = fixed(found.mean, "+.2f")
    if found.interval is None:
        return f"{mean} ({count(found.n, 'seed')})"
    low, high = (fixed(end, "+.2f") for end in found.interval)
    return f"{mean} [{low}, {high}] ({found.n})"


def statements(study: Study) -> list[str]:
    """Summarizes the comparison of each variant with the baseline in one sentence."""
    if study.baseline is None:
        return []
    found = study.compare()
    p_values = {
        variant: p.t_p for variant, p in found.items() if p is not None and p.t_p is not None
    }
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [
        _statement(variant, study.baseline, result, corrected.get(variant))
        for variant, result in found.items()
    ]


def findings(folder: Path, recipe: str) -> list[str]:
    """Compares the variants of one recipe with its baseline, for variants with several seeds.

    Args:
        folder: Searched for finished runs at any depth.
        recipe: Name of the recipe; the runs of other recipes are ignored.
    """
    study = next(study for study in collect(folder) if study.recipe == recipe)
    several = any(len(seeds) > 1 for seeds in study.variants.values())
    return statements(study) if several else []


def _statement(variant: str, baseline: str, found: Paired | None, p: float | None) -> str:
    both = f"{variant} and {baseline}"
    if found is None:
        return f"No common seed: no comparison of {both} is possible."
    side = f"{abs(found.mean):.2f} percentage points {'above' if found.mean > 0 else 'below'}"
    if round(found.mean, 2) == 0:
        side = "level"
    if found.n == 1:
        return f"One seed: no statistical comparison of {both} is possible. {variant} is {side}."
    if found.interval is None or p is None:
        return (
            f"No statistical comparison of {both} is possible: {variant} is {side} with each of "
            f"{found.n} seeds, so the spread of the differences is unknown."
        )
    low, high = found.interval
    tests = f"p = {p:.2g}"
    if found.flip_p is not None:
        tests += f"; sign-flip test, p = {found.flip_p:.2g}"
    numbers = (
        f"{variant} is {side} on average over {found.n} seeds "
        f"(95 % interval {fixed(low, '+.2f')} to {fixed(high, '+.2f')}; {tests})."
    )
    if p < ALPHA:
        return f"Significant difference between {both}: {numbers}"
    return (
        f"No significant difference between {both} at this number of seeds: {numbers} A true "
        f"difference below about {(high - low) / 2:.1f} points may remain undetected."
    )


def setting(study: Study) -> list[str]:
    """Describes evaluation split, tests, data, networks and environment of a study."""
    result = study.first.result
    split = "the test set" if result.eval_split == "test" else f"the {result.eval_split} split"
    networks = f"student {result.model}"
    if result.teacher is not None:
        networks = f"teacher {result.teacher.model}, {networks}"
    env = _environment(study)
    threads = "1 thread" if env["threads"] == "1" else f"{env['threads']} threads"
    versions = ", ".join(f"{name} {env[name]}" for name in ("topkd", "torch", "python"))
    tests = sum(p is not None and p.t_p is not None for p in study.compare().values())
    tested = "p-values are from t-tests paired by seed"
    if tests > 1:
        tested += f", corrected for {tests} comparisons (Holm); sign-flip p-values are uncorrected"
    return [
        f"Evaluated on {split} at the last epoch; mean ± standard deviation (number of seeds). "
        "The best epoch is recorded only.",
        *([f"{tested}."] if tests else []),
        f"Data {result.data}, {networks}, {count(result.epochs, 'epoch')}.",
        f"Run on {env['processor']}, {threads}, {env['device']}, {env['dtype']}; "
        f"{versions}, commit {env['commit']}.",
    ]


def _environment(study: Study) -> dict[str, str]:
    """Describes the environment of the runs; differing values are joined by a slash."""
    environments = [run.result.environment for run in study.runs]
    names = dict.fromkeys([*MADE_WITH, *(name for env in environments for name in env)])
    described = {}
    for name in names:
        values = [env.get(name) for env in environments]
        texts = ["unknown" if value is None else str(value) for value in values]
        described[name] = " / ".join(dict.fromkeys(texts))
    return described


def cautions(study: Study) -> list[str]:
    """Lists reasons why the runs of a study may not be comparable."""
    found = []
    if len(_teachers(study)) > 1:
        found.append(f"These runs have {len(_teachers(study))} different teachers.")
    environment = _environment(study)
    for name in MADE_WITH:
        if " / " in environment[name]:
            found.append(f"These runs differ in {name}: {environment[name]}.")
    if study.baseline is not None and study.text is None:
        found.append(
            f"There is no recipe.yaml with these results; {study.baseline} is used as the baseline "
            "because its losses are the most similar to the student's."
        )
    return found


def markdown(folder: Path) -> str:
    """Renders the finished runs below a folder as Markdown, one table per recipe.

    Raises:
        ValueError: If there is no finished run, or a file is broken; see :func:`collect`.
    """
    parts = []
    for study in collect(folder):
        lines = [f"### {for_markdown(study.recipe)}", ""]
        titles = headings([study])
        cells = [[row[column] for column in titles] for row in (titles, *rows(study))]
        table = [f"| {' | '.join(map(for_markdown, row))} |" for row in cells]
        lines += [table[0], "|---|---" + "|--:" * (len(titles) - 2) + "|", *table[1:]]
        sentences = [*statements(study), *setting(study)]
        warnings = [
            *cautions(study),
            *sections.faint_terms(study),
            *sections.poor_approximators(study),
        ]
        lines += ["", *(f"- {for_markdown(text)}" for text in sentences)]
        lines += [
            line for text in warnings for line in ("", f"> **Warning:** {for_markdown(text)}")
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


@dataclass(frozen=True)
class _Recipe:
    """The template's data for one recipe."""

    study: Study
    rows: list[Row]
    statements: list[str]
    setting: list[str]
    cautions: list[str]
    sections: list[Section]
    environment: dict[str, str]


def html(folder: Path, progress: Progress | None = None) -> str:
    """Renders the finished runs below a folder as one self-contained page.

    Args:
        folder: Searched for finished runs at any depth.
        progress: Shows progress. Silent by default.

    Raises:
        ValueError: If there is no finished run, or a file is broken; see :func:`collect`.
    """
    studies, recipes = collect(folder), []
    progress = progress or Progress(quiet=True)
    with progress.bar("Report", len(studies) * len(sections.SECTIONS), "sections") as advance:
        for study in studies:
            written = []
            for write in sections.SECTIONS:
                written.append(write(study))
                advance(1, "")
            recipes.append(_recipe(study, [section for section in written if section is not None]))
    values = {
        "recipes": recipes,
        "headings": headings(studies),
        "metrics": _metrics(studies).values(),
        "element": _element,
    }
    return render("report.html", values)


def _recipe(study: Study, written: list[Section]) -> _Recipe:
    return _Recipe(
        study,
        rows(study),
        statements(study),
        setting(study),
        cautions(study),
        written,
        _environment(study),
    )


def _element(picture: Picture, name: str) -> Markup:
    """Builds the HTML element of a picture; the name must be unique on the page."""
    if not picture.raster:
        return Markup(plots.to_svg(picture.figure, prefix=name, alt=picture.alt))  # noqa: S704
    content = base64.b64encode(plots.to_png(picture.figure)).decode()
    width = round(96 * picture.figure.get_figwidth())
    element = Markup('<img src="data:image/png;base64,{}" width="{}" alt="{}">')
    return element.format(content, width, picture.alt)


def write_report(folder: Path, path: Path, progress: Progress) -> None:
    """Writes the page of :func:`html` to a file, unless the file was built from the same inputs.

    The page stores a hash of its inputs: the files of the runs, the metrics and this package.

    Args:
        folder: Searched for finished runs at any depth.
        path: The file to write.
        progress: Shows progress.

    Raises:
        ValueError: If there is no finished run, or a file is broken; see :func:`collect`.
        OSError: If the file cannot be written.
    """
    mark = f'<meta name="topkd-inputs" content="{_inputs_hash(folder)}">'
    if path.is_file() and mark in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        progress.say(f"{path} is up to date: its inputs have not changed")
        return
    page = html(folder, progress)
    files.write(path, page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{mark}', 1))


def _inputs_hash(folder: Path) -> str:
    """Computes a hash of everything that determines a page, weights by size and time alone."""
    here, parts = Path(__file__).parent, [topkd.__version__]
    parts += [metric.heading for metric in METRICS.values()]
    for pattern in INPUTS:
        for file in sorted(folder.rglob(pattern)):
            name = file.relative_to(folder).as_posix()
            large = file.name == checkpoint.WEIGHTS
            state = file.stat()
            content = f"{state.st_size} {state.st_mtime_ns}" if large else files.sha256_of(file)
            parts.append(f"{name} {content}")
    code = (path for path in sorted(here.rglob("*")) if path.suffix in (".py", ".html"))
    parts += [files.sha256_of(path) for path in code]
    return files.sha256("\n".join(parts).encode())
