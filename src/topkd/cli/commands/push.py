"""``topkd push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topkd.cli.options import Endpoint

PANEL = "Export and share"


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Export to upload.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.")],
    endpoint: Endpoint = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
) -> None:
    """Upload an export to the Hugging Face hub with a hash of every file."""
    from topkd.export import hub

    typer.echo(f"commit: {hub.push(folder, repository, endpoint=endpoint, private=private)}")
