"""``topkd evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from topkd.cli.options import AsJson, Quiet, Trust

PANEL = "Evaluate and report"


def evaluate(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Folder of a run, or a weights file.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Model name, if the file does not record it.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|KEY=VALUE",
            help="Evaluation data set, or an override of the one in the file, e.g. `root=FOLDER`.",
        ),
    ] = None,
    root: Annotated[str | None, typer.Option(help="Short for `--data root=FOLDER`.")] = None,
    weights: Annotated[
        Literal["plain", "ema"],
        typer.Option(help="Weights to load from a file with both: as trained, or averaged."),
    ] = "plain",
    head: Annotated[
        str | None,
        typer.Option(help="Name of the classifier module, if it is not detected."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Additional metric, e.g. `knn`; can be repeated."),
    ] = None,
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a network in float32 on the test images, or on those its run held out.

    `--json` adds accuracy and errors by class.

    Example: `topkd evaluate resnet20.pth --model resnet20 --data cifar100 --root ~/data/cifar100`
    """
    from topkd._io.progress import Progress
    from topkd.evaluation.metrics import metric_lines
    from topkd.training.evaluate import evaluate_file

    changes = [*(data or []), *([f"root={json.dumps(root)}"] if root else [])]
    progress = Progress(quiet=quiet)
    result = evaluate_file(
        target,
        model,
        changes,
        progress,
        weights=weights,
        head=head,
        requested=metric or (),
        trust=trust,
    )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    images = f"{result['images']:,} {result['eval_split']} images of {result['data']}"
    typer.echo(f"{result['model']} on the {images}")
    for line in metric_lines(result):
        typer.echo(line)
