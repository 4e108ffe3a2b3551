"""``topkd pull``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topkd.cli.options import Endpoint, Quiet

PANEL = "Export and share"


def pull(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where from.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write to.")],
    endpoint: Endpoint = None,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit, if not the newest.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Fetch an export from the Hugging Face hub and check the hash of every file."""
    from topkd._io.progress import Progress
    from topkd.export import hub

    paths = hub.pull(
        repository, folder, Progress(quiet=quiet), endpoint=endpoint, revision=revision
    )
    typer.echo(f"{folder}: {len(paths)} files, all as they were pushed")
