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
        Path, typer.Argument(metavar="RUN", help="Folder of a run, or a weights file of topkd.")
    ],
    to: Annotated[
        list[str],
        typer.Option(help="`safetensors`, `onnx`, `torch-export`, `onnx-int8`, or several: `a,b`."),
    ],
    out: Annotated[Path, typer.Option(help="Output folder.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Overrides of the data section, e.g. `root=FOLDER`."
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Image size in pixels, to verify without data."),
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="License of the weights, for the model card.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Number of images to verify on. Defaults to all.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Maximum difference of a logit, except for int8.")
    ] = 1e-4,
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Export a student with a model card and verify every file.

    Example: `topkd export runs/digits/kd+topkd/seed0 --to safetensors,onnx,onnx-int8 --out mine`
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
