"""``topkd show``."""

from __future__ import annotations

import typer

from topkd.cli.options import Changes, RecipeName

PANEL = "Recipes"


def show(recipe: RecipeName, changes: Changes = None) -> None:
    """Print a recipe with all defaults filled in."""
    from topkd.config import recipe as recipes

    typer.echo(recipes.write(recipes.load(recipe, changes or [])), nl=False)
