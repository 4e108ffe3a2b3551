"""``topkd pull``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topkd.cli.options import Endpoint, Quiet

PANEL = "Export and share"


def pull(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Output folder.")],
    endpoint: Endpoint = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit. Defaults to `main`.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Download an export from the Hugging Face hub and verify the hash of every file."""
    from topkd._io.progress import Progress
    from topkd.export import hub

    paths = hub.pull(
        repository, folder, Progress(quiet=quiet), endpoint=endpoint, revision=revision
    )
    typer.echo(f"{folder}: {len(paths)} files, all hashes match")
