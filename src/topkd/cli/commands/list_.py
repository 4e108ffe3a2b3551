"""``topkd list``."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from topkd.cli.options import AsJson
from topkd.cli.printing import catalog

PANEL = "Recipes"


def list_(
    what: Annotated[
        Literal["recipes", "models", "losses", "data"], typer.Argument(help="Which catalog.")
    ],
    as_json: AsJson = False,
) -> None:
    """List what recipes can name."""
    entries = catalog(what)
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    width, group = max(len(entry["name"]) for entry in entries), ""
    for entry in entries:
        if entry.get("group", "") != group:
            group = entry["group"]
            typer.echo(f"{group}/")
        indent = "  " if group else ""
        typer.echo(f"{indent}{entry['name']:<{width}}  {entry['about']}".rstrip())
    if what == "models":
        typer.echo("and torchvision:NAME, timm:NAME, or MODULE:CALLABLE for one of your own")
