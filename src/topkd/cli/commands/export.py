"""``topkd export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from topkd.cli.options import AsJson, Quiet, Trust
from topkd.cli.printing import print_files

PANEL = "Export and share"


def export(
    target: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, or weights that topkd wrote.")
    ],
    to: Annotated[
        list[str],
        typer.Option(help="`safetensors`, `onnx`, `torch-export`, `onnx-int8`, or several: `a,b`."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Changes to the run's data, e.g. `root=FOLDER`."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels on a side, to check on random images if there are none."),
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="Of the weights, for the model card.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Check on so many test images instead of all.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of a logit, but for eight bits.")
    ] = 1e-4,
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a student for others to use, with a model card, and check every file.

    Example: `topkd export runs/digits/student/seed0 --to safetensors,onnx,onnx-int8 --out mine`
    """
    from topkd._io.progress import Progress
    from topkd.export.student import export as export_student

    formats = [name.strip() for part in to for name in part.split(",")]
    config = export_student(
        target,
        formats,
        out,
        Progress(quiet=quiet),
        data=data or [],
        size=size,
        license=license_,
        limit=images,
        tolerance=tolerance,
        trust=trust,
    )
    if as_json:
        typer.echo(json.dumps(config, indent=2))
        return
    print_files(config)
    typer.echo(f"export: {out}")
