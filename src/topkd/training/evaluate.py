"""Evaluation of a weights file from a run or another source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topkd._io.progress import Progress
from topkd._runtime import processes
from topkd.config.sections import DataSection
from topkd.config.validation import RecipeError, validated
from topkd.data import DATA
from topkd.data.trust import changed
from topkd.evaluation import metrics
from topkd.evaluation.loading import build_network
from topkd.evaluation.per_class import PER_CLASS, per_class
from topkd.models import checkpoint, factory
from topkd.training.build import evaluate_once, load_data, locating_size_errors, side
from topkd.training.check import check_metric, check_name, locating_errors


def evaluate_file(
    target: Path,
    model: str | None,
    data: Sequence[str],
    progress: Progress,
    *,
    weights: checkpoint.Which = "plain",
    head: str | None = None,
    requested: Sequence[str] = (),
    trust: bool = False,
) -> dict[str, Any]:
    """Evaluates the network of a weights file on the evaluation images, in float32.

    These are the test images, or the held-out training images if the data section has
    ``validation``; ``eval_split`` names the split.

    Args:
        target: Folder of a run, a weights file of topkd, or another checkpoint.
        model: Name of the network. Weights files of topkd record it.
        data: Name of a data set, or changes ``key=value`` to the section in the file.
        progress: Shows progress and messages.
        weights: Which weights to load from a file with plain and averaged ones.
        head: Name of the classifier, if it is neither known nor detected.
        requested: Names of metrics on request, see :data:`topkd.evaluation.metrics.METRICS`.
        trust: Whether the file may specify code, paths and URLs.

    Raises:
        FileNotFoundError: If the run or file does not exist.
        RecipeError: If a name is missing or unknown.
        ValueError: If the weights do not fit the network, or the file requires code to run.
    """
    for name in requested:
        check_metric(name, "--metric", has_teacher=False)
    path = checkpoint.weights_file(target)
    about = checkpoint.read_about(path)
    if model is None and not trust:
        factory.refuse_code(about.get("model", ""), str(path))
    model = model or about.get("model")
    tree = changed(about.get("data") or {}, data, str(path), trust=trust)
    if model is None or "name" not in tree:
        raise RecipeError(f"{path} does not record network and data set: pass --model and --data")
    with locating_errors("--model"):
        factory.find(model)
    check_name(DATA, tree["name"], "--data")
    section = validated(DataSection, tree, "data")
    loaded = checkpoint.load_weights(path)
    images = load_data(section)
    recorded = about if about.get("model") == model else {}
    size, taps = recorded.get("size", side(images)), dict(recorded.get("taps", {}))
    if head is not None:
        taps["head"] = head
    described = {
        "model": model,
        "classes": images.classes,
        "size": size,
        "taps": taps,
        "reused": recorded.get("reused"),
    }
    with locating_size_errors(model, side(images)):
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
    evaluated: dict[str, Any] = {"model": model, "data": images.name}
    evaluated |= {"eval_split": images.eval_split, "images": len(images.test.target)}
    evaluated |= metrics.prediction_metrics(predictions)
    evaluation = metrics.Evaluation(network, images, device, predictions)
    evaluated |= metrics.requested_metrics(requested, evaluation, needs_teacher=False)
    classes = per_class(predictions.logits, predictions.target, images.classes)
    return evaluated | ({} if classes is None else {PER_CLASS: classes})
