"""``topkd tune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from topkd.cli.options import AsJson, Out, Quiet, RecipeName, is_first_process, numbers
from topkd.cli.printing import print_trials

PANEL = "Train"


def tune(
    recipe: RecipeName,
    keys: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUES...",
            help="Options and the values to try: `optimizer.lr=0.05,0.1`, `topkd.share=0.02,0.1`, "
            "or a range, `kd.weight=0.5..8`. Options of a term are set in every control with it.",
        ),
    ],
    trials: Annotated[int, typer.Option(min=1, help="Maximum number of trials.")] = 20,
    seeds: Annotated[
        str, typer.Option(help="Seeds of each trial; final runs should use others.")
    ] = "100",
    metric: Annotated[
        str, typer.Option(help="Metric to optimize, by its name in `result.json`.")
    ] = "top1",
    validation: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Fraction of the training images to hold out, 0.2 by default."
        ),
    ] = None,
    out: Out = Path("runs"),
    to: Annotated[
        Path | None,
        typer.Option(help="File of the tuned recipe.", show_default="OUT/NAME-tuned.yaml"),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Search for the best values of a recipe's options, and write the recipe that has them.

    Trials are evaluated on held-out training images, never on the test images. Completed trials are
    skipped; rerun the command to resume.

    Example: `topkd tune digits losses.topkd.share=0.02,0.05,0.1,0.3 optimizer.lr=0.05,0.1
    --trials 8`
    """
    from topkd._io import files
    from topkd._io.progress import Progress
    from topkd.config import recipe as recipes
    from topkd.config.search import read_space
    from topkd.studies import tune as tuning

    loaded, space = recipes.load(recipe), read_space(keys)
    file = to or out / f"{loaded.name}-tuned.yaml"
    tuning.refuse_other_file(file)
    tuned = tuning.tune(
        loaded,
        space,
        out,
        Progress(quiet=quiet),
        trials=trials,
        seeds=numbers(seeds),
        metric=metric,
        validation=validation,
    )
    if not is_first_process():
        return
    files.write(file, tuned.text())
    if as_json:
        typer.echo(json.dumps(tuned.as_json() | {"file": str(file)}, indent=2))
        return
    print_trials(tuned)
    typer.echo(f"tuned recipe: {file}")
