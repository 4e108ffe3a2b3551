"""``topkd student``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def student(
    recipe: RecipeName,
    changes: Changes = None,
    variant: Annotated[
        str | None,
        typer.Option(help="Name of a control.", show_default="the recipe's own losses"),
    ] = None,
    seeds: Seeds = "0",
    out: Out = Path("runs"),
    track: Track = None,
    quiet: Quiet = False,
) -> None:
    """Train and evaluate one variant of a recipe: its own losses or a control."""
    from topkd.reporting.page import findings

    experiment = experiment_of(recipe, changes, out, quiet, track)
    results = [experiment.train_student(seed, variant) for seed in numbers(seeds)]
    if is_first_process():
        print_results(results, findings(experiment.folder, experiment.recipe.name))
