"""``topkd ripsnet``."""

from __future__ import annotations

from pathlib import Path

import typer

from topkd.cli.options import Changes, Out, Quiet, RecipeName, experiment_of

PANEL = "Train"


def ripsnet(
    recipe: RecipeName, changes: Changes = None, out: Out = Path("runs"), quiet: Quiet = False
) -> None:
    """Fit everything that losses learn from the teacher, which is trained first if necessary.

    These are RipsNets (`via: ripsnet`), DistanceNets (`via: distancenet`) and the paraphraser of
    factor transfer.
    """
    experiment = experiment_of(recipe, changes, out, quiet)
    experiment.fit_losses()
    made = sorted(experiment.folder.glob("*-*.safetensors"))
    if not made:
        raise ValueError(
            f"no loss of {experiment.recipe.name} is fitted to the teacher: none is computed "
            "`via: ripsnet` or `via: distancenet`, and none has a pre-training stage"
        )
    for path in made:
        typer.echo(f"fitted to the teacher: {path}")
