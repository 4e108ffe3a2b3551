"""``topkd ripsnet``."""

from __future__ import annotations

from pathlib import Path

import typer

from topkd.cli.options import Changes, Out, Quiet, RecipeName, experiment_of

PANEL = "Train"


def ripsnet(
    recipe: RecipeName, changes: Changes = None, out: Out = Path("runs"), quiet: Quiet = False
) -> None:
    """Make clouds and persistence images and train RipsNet, and before it the teacher.

    The same for a DistanceNet, where a loss is computed `via: distancenet`, and for the paraphraser
    of factor transfer.
    """
    experiment = experiment_of(recipe, changes, out, quiet)
    experiment.fit_losses()
    made = sorted(experiment.folder.glob("*-*.safetensors"))
    if not made:
        raise ValueError(
            f"no loss of {experiment.recipe.name} is computed `via: ripsnet` or "
            "`via: distancenet`, or learns from its teacher first in another way"
        )
    for path in made:
        typer.echo(f"learned from the teacher: {path}")
