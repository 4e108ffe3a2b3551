"""``topkd run``."""

from __future__ import annotations

from pathlib import Path

import typer

from topkd.cli.options import (
    Changes,
    Out,
    Quiet,
    RecipeName,
    Seeds,
    Track,
    experiment_of,
    is_first_process,
    numbers,
)
from topkd.cli.printing import print_results

PANEL = "Train"


def run(
    recipe: RecipeName,
    changes: Changes = None,
    seeds: Seeds = "0",
    out: Out = Path("runs"),
    track: Track = None,
    quiet: Quiet = False,
) -> None:
    """Run every stage of a recipe: teacher, fitted losses, students, evaluation, report.

    Completed stages are skipped; rerun the command to resume.

    Examples: `topkd run digits --seeds 0 1 2` · `topkd run cifar100/resnet56-resnet20
    data.root=~/data/cifar100`
    """
    from topkd.reporting.page import findings, write_report

    experiment = experiment_of(recipe, changes, out, quiet, track)
    results = experiment.run(numbers(seeds))
    if not is_first_process():
        return
    page = experiment.folder / "report.html"
    write_report(experiment.folder, page, experiment.progress)
    print_results(results, findings(experiment.folder, experiment.recipe.name))
    typer.echo(f"report: {page}")
