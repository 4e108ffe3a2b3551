"""Tables that the commands print."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topkd.studies.tune import Tuned


def catalog(what: str) -> list[dict[str, str]]:
    """Lists the entries of a catalog: ``recipes``, ``models``, ``losses`` or ``data``."""
    if what == "recipes":
        from topkd.config import recipe as recipes

        groups = sorted((name.rpartition("/")[0], name) for name in recipes.names())
        return [
            {"name": name, "about": recipes.about(name), "group": group} for group, name in groups
        ]
    if what == "losses":
        from topkd.losses import LOSSES

        about = {
            name: f"{loss.info.compares} ({loss.info.paper}); costs {loss.info.cost}"
            for name, loss in LOSSES.items()
        }
    elif what == "models":
        from topkd.models import MODELS

        about = {name: model.about for name, model in MODELS.items()}
    else:
        from topkd.data import DATA

        about = {name: _first_line(load) for name, load in DATA.items()}
    return [{"name": name, "about": text} for name, text in about.items()]


def print_findings(findings: Sequence[dict[str, str]]) -> None:
    """Prints the findings of `topkd doctor`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "warning": "yellow", "error": "bold red"}
    table = Table(box=None, pad_edge=False)
    for title in ("part", "found", "verdict", "what to change"):
        table.add_column(title, overflow="fold", no_wrap=title == "verdict")
    for finding in findings:
        verdict = Text(finding["verdict"], colors[finding["verdict"]])
        part, found, advice = (Text(finding[key]) for key in ("part", "found", "advice"))
        table.add_row(part, found, verdict, advice)
    Console(highlight=False).print(table)


def _first_line(function: object) -> str:
    """Returns the first line of a docstring without markup."""
    return re.sub(r":\w+:|`", "", str(function.__doc__).splitlines()[0])


def print_results(results: Sequence[dict[str, Any]], findings: Sequence[str] = ()) -> None:
    """Prints the metrics of finished runs and of their teacher.

    With several seeds, mean and standard deviation follow the runs of each variant.

    Args:
        results: The contents of ``result.json`` files of one recipe.
        findings: Sentences that compare the variants with the baseline.
    """
    from topkd.evaluation.metrics import displayed
    from topkd.evaluation.results import Result
    from topkd.evaluation.statistics import Sample

    read = [Result.model_validate(result) for result in results]
    metrics = displayed(lambda name: any(run.metric(name) is not None for run in read))
    rows: list[tuple[str, ...]] = []
    teacher = read[0].teacher
    if teacher is not None:
        values = [metric.format(teacher.value(name)) for name, metric in metrics.items()]
        rows.append(("teacher", "", *values))
    for variant in dict.fromkeys(result.variant for result in read):
        runs = [result for result in read if result.variant == variant]
        for run in runs:
            values = [metric.format(run.metric(name)) for name, metric in metrics.items()]
            rows.append((variant, str(run.seed), *values))
        if len(runs) < 2:
            continue
        means, spreads = [], []
        for name, metric in metrics.items():
            known = [value for run in runs if (value := run.metric(name)) is not None]
            sample = Sample(tuple(known)) if known else None
            means.append(metric.format(None if sample is None else sample.mean))
            spreads.append(metric.format(None if sample is None else sample.std))
        rows += [(variant, "mean", *means), (variant, "± std", *spreads)]
    print(f"last epoch, on the {read[0].eval_split} images")
    titles = ("run", "seed", *(metric.heading for metric in metrics.values()))
    print(*_table(titles, rows, left=2), *findings, sep="\n")


def print_predictions(predictions: Sequence[dict[str, Any]]) -> None:
    """Prints the most probable classes of pictures, one per line, the most probable first."""
    rows = [
        (prediction["picture"] if place == 0 else "", entry["class"], f"{entry['probability']:.4f}")
        for prediction in predictions
        for place, entry in enumerate(prediction["classes"])
    ]
    print(*_table(("picture", "class", "probability"), rows, left=2), sep="\n")


def print_trials(tuned: Tuned) -> None:
    """Prints the values and the result of every trial of `topkd tune`, the best one marked."""
    keys = list(tuned.best.values)
    rows = [
        (
            str(number),
            *(json.dumps(trial.values[key]) for key in keys),
            tuned.metric.format(trial.score),
            "best" if trial is tuned.best else f"{trial.state} {trial.note}".rstrip(),
        )
        for number, trial in enumerate(tuned.trials, start=1)
    ]
    seeds = f"{len(tuned.seeds)} seed" + ("s" if len(tuned.seeds) > 1 else "")
    print(f"last epoch, on {tuned.validation:g} of the training images, held out; {seeds}")
    print(*_table(("trial", *keys, tuned.metric.heading, "state"), rows, left=1), sep="\n")


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Formats a table whose headings wrap to the width of their columns.

    Args:
        titles: Headings.
        rows: Cells, which never wrap.
        left: Number of left-aligned columns.
    """
    widths = [
        max(map(len, (*title.split(), *(row[place] for row in rows))))
        for place, title in enumerate(titles)
    ]
    wrapped = [textwrap.wrap(title, width) for title, width in zip(titles, widths, strict=True)]
    height = max(map(len, wrapped))
    heading = zip(*([""] * (height - len(part)) + part for part in wrapped), strict=True)
    return [
        "  ".join(
            f"{cell:<{width}}" if place < left else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (*heading, *rows)
    ]


def print_files(config: dict[str, Any]) -> None:
    """Prints the files of an export and their deviation from the network."""
    from topkd.evaluation.metrics import METRICS

    top1, agreement = METRICS["top1"], METRICS["agreement"]
    titles = ("file", "bytes", top1.heading, agreement.heading, "largest difference")
    rows, checked_on = [titles], ""
    for name, file in config["files"].items():
        if file["checked_on"] != checked_on:
            checked_on = file["checked_on"]
            rows.append(("", "", "", "", ""))
            reference = top1.format(file["network_top1"])
            rows.append((f"the network, on {checked_on}", "", reference, "", ""))
        numbers = top1.format(file["top1"]), agreement.format(file["agreement"])
        rows.append((name, f"{file['bytes']:,}", *numbers, f"{file['largest_difference']:.1e}"))
    widths = [max(len(row[place]) for row in rows) for place in range(len(titles))]
    for row in rows:
        rest = "  ".join(
            f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)
        )
        print(f"{row[0]:<{widths[0]}}  {rest}".rstrip())
