"""``topkd doctor``."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from topkd.cli.options import AsJson, Changes, Out, Quiet, RecipeName, experiment_of
from topkd.cli.printing import print_findings

PANEL = "Recipes"


def doctor(
    recipe: RecipeName,
    changes: Changes = None,
    out: Out = Path("runs"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Test a recipe for a minute and report problems before training.

    It checks that the teacher reaches its recorded accuracy, that normalization, crop and class
    order match, that every loss gets the features it needs and has a measurable gradient, and how
    accurate an approximator is. It estimates time per epoch and memory.

    `ok` passes, `warning` deserves attention, `error` invalidates the runs and sets the exit
    status to 1. Nothing is written. `topkd check` only validates the recipe and needs no data.

    Example: `topkd doctor cifar100/resnet20-resnet8 data.root=~/data/cifar100
    teacher.checkpoint=resnet20.pth`
    """
    from dataclasses import asdict

    from topkd.training.preflight import examine

    findings = [asdict(finding) for finding in examine(experiment_of(recipe, changes, out, quiet))]
    errors = sum(finding["verdict"] == "error" for finding in findings)
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        print_findings(findings)
        typer.echo(f"errors to fix before training: {errors}" if errors else "no errors found")
    raise typer.Exit(1 if errors else 0)
