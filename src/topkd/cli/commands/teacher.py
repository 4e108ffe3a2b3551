"""``topkd teacher``."""

from __future__ import annotations

from pathlib import Path

import typer

from topkd.cli.options import Changes, Out, Quiet, RecipeName, experiment_of

PANEL = "Train"


def teacher(
    recipe: RecipeName, changes: Changes = None, out: Out = Path("runs"), quiet: Quiet = False
) -> None:
    """Train only the teacher of a recipe."""
    experiment = experiment_of(recipe, changes, out, quiet)
    section = experiment.recipe.teacher
    if section is not None and section.pretrained:
        typer.echo(f"teacher: {section.model}, with published weights; nothing to train")
        return
    if experiment.teacher is None:
        raise ValueError(f"{experiment.recipe.name} has no teacher; `topkd run` trains its network")
    typer.echo(f"teacher: {experiment.teacher_file}")
