"""``topkd report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PANEL = "Evaluate and report"


def report(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="A folder with finished runs.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Output file. Defaults to `report.html` in RUNS."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown instead.")
    ] = False,
) -> None:
    """Build a self-contained HTML report of finished runs."""
    from topkd._io.progress import Progress
    from topkd.reporting import page as reports

    if markdown:
        typer.echo(reports.markdown(runs))
        return
    page = out or runs / "report.html"
    reports.write_report(runs, page, Progress())
    typer.echo(f"report: {page}")
