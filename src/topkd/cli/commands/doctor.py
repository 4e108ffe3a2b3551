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
    """Try a recipe for a minute, and tell what to change before hours are spent on it.

    Does the teacher reach its recorded accuracy on these images? Are they normalized and
    cropped as it knows them, and its classes in the same order? Do the taps give every loss what it
    needs, and is a term too light to matter? How good is an approximator? How long does an epoch
    take here, in how much memory?

    `good` is as it should be, `look` deserves a thought, `wrong` spoils the runs; if anything is
    wrong, the exit status is 1. Nothing is written. `topkd check` looks at the words of a recipe
    alone, and needs no data.

    Example: `topkd doctor cifar100/resnet20-resnet8 data.root=~/data/cifar100
    teacher.checkpoint=resnet20.pth`
    """
    from dataclasses import asdict

    from topkd.training.preflight import examine

    findings = [asdict(finding) for finding in examine(experiment_of(recipe, changes, out, quiet))]
    wrong = sum(finding["verdict"] == "wrong" for finding in findings)
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        print_findings(findings)
        typer.echo(f"{wrong} wrong: to be changed first" if wrong else "nothing is wrong")
    raise typer.Exit(1 if wrong else 0)
