"""Arguments and options shared by several commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

# Commands import the package when called, so that `topkd --help` does not load torch.
if TYPE_CHECKING:
    from topkd.training.experiment import Experiment

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A file, or a name from `topkd list recipes`."),
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides of the recipe, e.g. `optimizer.lr=0.1` or `losses.kd.weight=1`.",
    ),
]
Seeds = Annotated[str, typer.Option(help="Seeds to run: `0 1 2`, `0,1,2` or `0-2`.")]
Out = Annotated[Path, typer.Option(help="Parent of the recipe's folder of runs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress.")]
Endpoint = Annotated[str | None, typer.Option(help="URL of the hub, if not the default.")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Allow the file to name code to run and paths to open."),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Experiment tracker: `tensorboard` (by default, where installed), `wandb`, `mlflow`, "
        "`trackio`, ...",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def experiment_of(
    recipe: str,
    changes: list[str] | None,
    out: Path,
    quiet: bool,
    track: list[str] | None = None,
) -> Experiment:
    """Loads a recipe and creates its experiment."""
    from topkd._io.progress import Progress
    from topkd.config import recipe as recipes
    from topkd.training.experiment import Experiment

    loaded, progress = recipes.load(recipe, changes or []), Progress(quiet=quiet)
    return Experiment(loaded, out, progress, trackers=track or ["auto"])


def is_first_process() -> bool:
    """Returns whether this process prints; with several processes, only the first does."""
    return os.environ.get("RANK", "0") == "0"


def numbers(seeds: str) -> tuple[int, ...]:
    """Parses the value of ``--seeds``."""
    from topkd.config.seeds import read_seeds

    try:
        return read_seeds(seeds)
    except ValueError as error:
        raise ValueError(f"--seeds: {error}") from None
