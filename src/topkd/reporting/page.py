"""Finished runs as a Markdown table and as one page of HTML with everything in it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from topkd._io import files
from topkd._io.progress import Progress
from topkd.config.recipe import Term
from topkd.evaluation.results import Result, Study, Taught, collect
from topkd.evaluation.statistics import Paired, Sample, holm
from topkd.reporting import plots, sections
from topkd.reporting.sections import Chapter, Picture, count, fixed

__all__ = ["collect", "formula", "html", "markdown", "rows", "write_report"]

ALPHA = 0.05  # p below which a difference is said to be there
ABSENT = "–"
MADE_WITH = ("processor", "threads", "device", "dtype", "topkd", "commit", "torch", "python")


@dataclass(frozen=True)
class Row:
    """A line of the table: a teacher or an arm."""

    run: str
    losses: str
    last: str = ABSENT
    difference: str = ABSENT
    mean_of_last_10: str = ABSENT
    best: str = ABSENT
    agreement: str = ABSENT
    topological_distance: str = ABSENT
    seconds: str = ABSENT


HEADINGS = Row(
    run="Run",
    losses="Losses",
    last="Accuracy, last epoch, %",
    difference="Difference to control [95 % interval]",
    mean_of_last_10="Mean of last 10 epochs, %",
    best="Best epoch, % (recorded only)",
    agreement="Agreement with teacher, %",
    topological_distance="Topological distance to teacher",
    seconds="Training, s",
)


TOLD = ("share", "start", "stop", "warmup", "decay", "batch")  # of a term, beside its weight


def formula(losses: list[Term]) -> str:
    """Writes losses as the sum that they are.

    Examples:
        >>> formula([Term(name="ce"), Term(name="kd", weight=2.0, temperature=4.0)])
        'ce + 2 kd (temperature 4)'
        >>> formula([Term(name="ce", start=4), Term(name="topkd", share=0.05)])
        'ce (start 4) + topkd (share 0.05)'
    """
    summands = []
    for term in losses:
        weight = "" if term.weight == 1 else f"{term.weight:g} "
        told = term.model_dump(include=set(TOLD), exclude_defaults=True)
        options = {name: told[name] for name in TOLD if name in told}
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
    """Makes the lines of the table: the teacher, the controls, the recipe's own losses."""
    differences = _compared(study)
    taught = _teachers(study)
    lines = []
    if taught:
        accuracies = Sample(tuple(teacher.top1 for teacher in taught))
        models = ", ".join(dict.fromkeys(teacher.model for teacher in taught))
        lines.append(Row(run=f"teacher: {models}", losses=ABSENT, last=str(accuracies)))
    for arm, seeds in study.arms.items():
        name = f"{arm} (control)" if arm == study.control else arm

        def over_seeds(
            read: Callable[[Result], float | None], spec: str = ".2f", arm: str = arm
        ) -> str:
            values = study.over_seeds(arm, read)
            return format(Sample(tuple(values.values())), spec) if values else ABSENT

        lines.append(
            Row(
                run=name,
                losses=formula(next(iter(seeds.values())).result.losses),
                last=over_seeds(sections.accuracy),
                difference=_difference(differences[arm]) if arm in differences else ABSENT,
                mean_of_last_10=over_seeds(lambda r: r.mean_of_last_10),
                best=over_seeds(lambda r: r.best.top1),
                agreement=over_seeds(lambda r: r.likeness.agreement if r.likeness else None),
                topological_distance=over_seeds(sections.distance, ".3f"),
                seconds=over_seeds(lambda r: r.train_seconds, ".1f"),
            )
        )
    return lines


def _compared(study: Study) -> dict[str, Paired | None]:
    return study.compare(sections.accuracy)


def _teachers(study: Study) -> list[Taught]:
    """The teachers of a study: one, unless runs were put together that had others."""
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
    """Says what the comparison with the control shows and what it does not, arm by arm."""
    if study.control is None:
        return []
    found = _compared(study)
    p_values = {arm: p.t_p for arm, p in found.items() if p is not None and p.t_p is not None}
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [
        _statement(arm, study.control, result, corrected.get(arm)) for arm, result in found.items()
    ]


def _statement(arm: str, control: str, found: Paired | None, p: float | None) -> str:
    both = f"{arm} and {control}"
    if found is None:
        return f"No seed in common: no statement possible about {both}."
    side = f"{abs(found.mean):.2f} percentage points {'above' if found.mean > 0 else 'below'}"
    if round(found.mean, 2) == 0:
        side = "level"
    if found.n == 1:
        return f"One seed: no statement possible about {both}. With it, {arm} is {side}."
    if found.interval is None or p is None:
        return (
            f"No statement possible about {both}: {arm} is {side} with each of {found.n} seeds, "
            "which does not tell how differences spread."
        )
    low, high = found.interval
    tests = f"p = {p:.2g}"
    if found.flip_p is not None:
        tests += f"; by sign flips alone, p = {found.flip_p:.2g}"
    numbers = (
        f"{arm} is {side} on average over {found.n} seeds "
        f"(95 % interval {fixed(low, '+.2f')} to {fixed(high, '+.2f')}; {tests})."
    )
    if p < ALPHA:
        return f"A detectable difference between {both}: {numbers}"
    return (
        f"No detectable difference between {both} at this number of seeds: {numbers} A true "
        f"difference of less than about {(high - low) / 2:.1f} points could well go unnoticed."
    )


def setting(study: Study) -> list[str]:
    """Says what the numbers of a study are: judged on what, of which data, made where."""
    result = study.first.result
    split = "the test set" if result.judged_on == "test" else f"the {result.judged_on} split"
    networks = f"student {result.model}"
    if result.teacher is not None:
        networks = f"teacher {result.teacher.model}, {networks}"
    env = _environment(study)
    threads = "1 thread" if env["threads"] == "1" else f"{env['threads']} threads"
    versions = ", ".join(f"{name} {env[name]}" for name in ("topkd", "torch", "python"))
    tests = sum(p is not None and p.t_p is not None for p in _compared(study).values())
    tested = "p-values are of t-tests paired by seed"
    if tests > 1:
        tested += f", corrected for {tests} comparisons (Holm); those of sign flips are not"
    return [
        f"Judged on {split}, and the headline is the last epoch; mean ± standard deviation "
        "(number of seeds). The best epoch is recorded and never the headline.",
        *([f"{tested}."] if tests else []),
        f"Data {result.data}, {networks}, {count(result.epochs, 'epoch')}.",
        f"Made on {env['processor']}, {threads}, {env['device']}, {env['dtype']}; "
        f"{versions}, commit {env['commit']}.",
    ]


def _environment(study: Study) -> dict[str, str]:
    """What the runs were made with, several values where they differ."""
    environments = [run.result.environment for run in study.runs]
    names = dict.fromkeys([*MADE_WITH, *(name for env in environments for name in env)])
    described = {}
    for name in names:
        values = [env.get(name) for env in environments]
        texts = ["unknown" if value is None else str(value) for value in values]
        described[name] = " / ".join(dict.fromkeys(texts))
    return described


def cautions(study: Study) -> list[str]:
    """Warns of what keeps the runs of a study from being comparable."""
    found = []
    if len(_teachers(study)) > 1:
        found.append(f"These runs were taught by {len(_teachers(study))} different teachers.")
    environment = _environment(study)
    for name in MADE_WITH:
        if " / " in environment[name]:
            found.append(f"These runs differ in {name}: {environment[name]}.")
    if study.control is not None and study.text is None:
        found.append(
            f"There is no recipe.yaml beside these results; {study.control} is taken for the "
            "control because its losses are most like the student's."
        )
    return found


def markdown(folder: Path) -> str:
    """Writes the finished runs below a folder as Markdown: a table for each recipe.

    Raises:
        ValueError: If there is no finished run, or a file is broken; see :func:`collect`.
    """
    parts = []
    for study in collect(folder):
        lines = [f"### {_plain(study.recipe)}", ""]
        table = [f"| {' | '.join(map(_plain, astuple(row)))} |" for row in (HEADINGS, *rows(study))]
        lines += [table[0], "|---|---" + "|--:" * 7 + "|", *table[1:]]
        sentences = [*statements(study), *setting(study)]
        warnings = [
            *cautions(study),
            *sections.faint_terms(study),
            *sections.poor_approximators(study),
        ]
        lines += ["", *(f"- {_plain(text)}" for text in sentences)]
        lines += [line for text in warnings for line in ("", f"> **Warning:** {_plain(text)}")]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Keeps a text from being taken for Markdown or HTML."""
    for mark in ("\\", "|", "*", "`"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


@dataclass(frozen=True)
class _Section:
    """What the template is told of one recipe."""

    study: Study
    rows: list[Row]
    statements: list[str]
    setting: list[str]
    cautions: list[str]
    chapters: list[Chapter]
    environment: dict[str, str]


def html(folder: Path, progress: Progress | None = None) -> str:
    """Writes the finished runs below a folder as one page that needs no other file.

    Args:
        folder: Searched for finished runs, however deep.
        progress: Tells the user; nobody if not given.

    Raises:
        ValueError: If there is no finished run, or a file is broken; see :func:`collect`.
    """
    import jinja2

    studies, pages = collect(folder), []
    progress = progress or Progress(quiet=True)
    with progress.bar("Report", len(studies) * len(sections.CHAPTERS), "chapters") as advance:
        for study in studies:
            written = []
            for write in sections.CHAPTERS:
                written.append(write(study))
                advance(1, "")
            pages.append(_section(study, [c for c in written if c is not None]))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("topkd.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html")
    return template.render(sections=pages, headings=HEADINGS, element=_element)


def _section(study: Study, written: list[Chapter]) -> _Section:
    return _Section(
        study,
        rows(study),
        statements(study),
        setting(study),
        cautions(study),
        written,
        _environment(study),
    )


def _element(picture: Picture, name: str) -> Markup:
    """Makes the element of a page that shows a picture; the name is like no other on the page."""
    if not picture.raster:
        return Markup(plots.to_svg(picture.figure, prefix=name, alt=picture.alt))  # noqa: S704
    content = base64.b64encode(plots.to_png(picture.figure)).decode()
    width = round(96 * picture.figure.get_figwidth())
    element = Markup('<img src="data:image/png;base64,{}" width="{}" alt="{}">')
    return element.format(content, width, picture.alt)


def write_report(folder: Path, path: Path, progress: Progress) -> None:
    """Writes the page of :func:`html` to a file.

    Args:
        folder: Searched for finished runs, however deep.
        path: The file.
        progress: Tells the user.

    Raises:
        ValueError: If there is no finished run, or a file is broken; see :func:`collect`.
        OSError: If the file cannot be written.
    """
    files.write(path, html(folder, progress))
