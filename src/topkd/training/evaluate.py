"""Evaluation of a weights file, of a run or of anybody else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topkd._io.progress import Progress
from topkd._runtime import processes
from topkd.config.recipe import DataSection
from topkd.config.validation import RecipeError
from topkd.data import DATA
from topkd.data.trust import changed
from topkd.evaluation import metrics
from topkd.evaluation.loading import build_network
from topkd.models import checkpoint, factory
from topkd.training.build import evaluate_once, load_data, side, taking
from topkd.training.check import named, told


def evaluate_file(
    target: Path,
    model: str | None,
    data: Sequence[str],
    progress: Progress,
    *,
    weights: checkpoint.Which = "plain",
    head: str | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Evaluates the network in a file on test images, in float32.

    Args:
        target: The folder of a run, a file of ours, or a checkpoint of others.
        model: Which network it is; a file of ours tells by itself.
        data: Name of a data set, or changes ``key=value`` to the section in the file.
        progress: Tells the user.
        weights: Which to take of a file with plain and averaged ones.
        head: Name of the classifier, where it is neither known nor found.
        trust: Whether the file may name code, paths and addresses.

    Raises:
        FileNotFoundError: If there is no such run or file.
        RecipeError: If a name is missing or unknown.
        ValueError: If the weights do not fit the network, or the file asks for code.
    """
    path = checkpoint.weights_file(target)
    about = checkpoint.read_about(path)
    if model is None and not trust:
        factory.refuse_code(about.get("model", ""), str(path))
    model = model or about.get("model")
    tree = changed(about.get("data") or {}, data, str(path), trust=trust)
    if model is None or "name" not in tree:
        raise RecipeError(f"{path} does not tell which network it is: give --model and --data")
    with told("--model"):
        factory.find(model)
    named(DATA, tree["name"], "--data")
    section = DataSection.model_validate(tree)
    loaded = checkpoint.load_weights(path)
    images = load_data(section)
    own = about if about.get("model") == model else {}
    size, taps = own.get("size", side(images)), dict(own.get("taps", {}))
    if head is not None:
        taps["head"] = head
    described = {
        "model": model,
        "classes": images.classes,
        "size": size,
        "taps": taps,
        "reused": own.get("reused"),
    }
    with taking(model, side(images)):
        network = build_network(described)
        evaluate_once(network, side(images), model, images)
    note = checkpoint.fill(network.network, loaded, str(path), weights)
    if note:
        progress.say(f"{path}: {note} (--weights)")
    if network.found:
        progress.say(network.found)
    device = processes.accelerator().device
    network.to(device).eval()
    with progress.bar("Evaluating", len(images.test.target), "images") as advance:
        predictions = metrics.predict(network, images.test, device, advance)
    evaluated = {"model": model, "data": images.name, "images": len(images.test.target)}
    return evaluated | metrics.prediction_metrics(predictions)
