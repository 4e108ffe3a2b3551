"""``topkd teacher``."""

from __future__ import annotations

from pathlib import Path

import typer

from topkd.cli.options import Changes, Out, Quiet, RecipeName, Track, experiment_of

PANEL = "Train"


def teacher(
    recipe: RecipeName,
    changes: Changes = None,
    out: Out = Path("runs"),
    track: Track = None,
    quiet: Quiet = False,
) -> None:
    """Train only the teacher of a recipe."""
    experiment = experiment_of(recipe, changes, out, quiet, track)
    section = experiment.recipe.teacher
    if section is None:
        raise ValueError(f"{experiment.recipe.name} has no teacher; `topkd run` trains its network")
    path = experiment.train_teacher()
    if path is None:
        typer.echo(f"teacher: {section.model}, with published weights; nothing to train")
        return
    assert experiment.teacher is not None  # its weights can be read
    typer.echo(f"teacher: {path}")
