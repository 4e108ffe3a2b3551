"""``topkd list``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from topkd.cli.options import AsJson
from topkd.cli.printing import catalog

PANEL = "Recipes"
CATALOGS = ("recipes", "models", "losses", "data")


def list_(
    what: Annotated[
        str,
        typer.Argument(
            metavar="{recipes|models|losses|data}",
            help="The catalog to list.",
            autocompletion=lambda: list(CATALOGS),
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """List the recipes, models, losses or data sets that are available."""
    if what not in CATALOGS:
        from topkd.config.validation import near

        raise ValueError(f"there is no catalog {what!r}{near(what, CATALOGS)}")
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
        typer.echo("also torchvision:NAME, timm:NAME, and MODULE:CALLABLE for your own models")
