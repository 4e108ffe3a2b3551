"""``topkd env``."""

from __future__ import annotations

import json

import typer

from topkd.cli.options import AsJson

PANEL = "This machine"


def env(as_json: AsJson = False) -> None:
    """Print hardware, versions and the settings chosen for this machine, for bug reports."""
    from topkd._runtime.environment import environment
    from topkd.training.precision import choices

    described = environment() | choices()
    if as_json:
        typer.echo(json.dumps(described, indent=2))
        return
    for name, value in described.items():
        typer.echo(f"{name:<15} {value}")
