"""``topkd copy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topkd.cli.options import RecipeName

PANEL = "Recipes"


def copy_(
    recipe: RecipeName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
) -> None:
    """Copy a recipe, including its comments, to a file."""
    from topkd._io import files
    from topkd.config import recipe as recipes

    if file.exists():
        raise FileExistsError(f"{file} already exists; choose another name")
    files.write(file, recipes.text(recipe))
    typer.echo(f"{file}: edit it, then `topkd check {file}` and `topkd run {file}`")
