"""``topkd predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from topkd.cli.options import AsJson, Trust
from topkd.cli.printing import print_predictions

PANEL = "Evaluate and report"


def predict(
    target: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run, an export, or a weights file of topkd.")
    ],
    pictures: Annotated[
        list[Path], typer.Argument(metavar="PICTURES...", help="Picture files, or folders of them.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Number of classes shown per picture.")] = 3,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Classify pictures: the most probable classes with their probabilities.

    Pictures are cropped, resized and normalized as for evaluation. Folders are searched at any
    depth.

    Example: `topkd predict runs/mine/kd+topkd/seed0 pictures --top 5`
    """
    from topkd.data.pictures import find_pictures
    from topkd.evaluation.loading import load

    classifier = load(target, trust=trust)
    paths = find_pictures(pictures)
    probabilities, classes = classifier.predict(paths).topk(min(top, len(classifier.classes)))
    predictions = [
        {
            "picture": str(path),
            "classes": [
                {"class": classifier.classes[number], "probability": probability}
                for number, probability in zip(numbers, values, strict=True)
            ],
        }
        for path, numbers, values in zip(
            paths, classes.tolist(), probabilities.tolist(), strict=True
        )
    ]
    if as_json:
        typer.echo(json.dumps(predictions, indent=2))
        return
    print_predictions(predictions)
