"""The model card of an export: ``README.md``, as the Hugging Face hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from topkd.config.validation import write_yaml
from topkd.evaluation.metrics import METRICS
from topkd.evaluation.results import Result


def card(
    about: Mapping[str, Any], run: Result | None, recipe: Any, config: Mapping[str, Any]
) -> str:
    """Writes a model card.

    Args:
        about: Metadata of the weights.
        run: Result of the run, if there is one.
        recipe: Recipe of the run with all defaults, if there is one.
        config: The content of ``config.json``.

    References:
        Model Cards for Model Reporting (Mitchell et al., FAT* 2019)
        https://arxiv.org/abs/1810.03993
    """
    import jinja2

    # Not ModelCard.from_template: it leaves out what is undefined, without an error.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("topkd.export"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  (Markdown)
    )
    return environment.get_template("model-card.md").render(
        header=write_yaml(_header(run, config)).rstrip(),
        about=about,
        run=run,
        metrics=METRICS.values(),
        config=config,
        recipe=recipe and write_yaml(recipe).rstrip(),
    )


# Not ModelCardData, which takes as many lines and would make every export need huggingface_hub.
def _header(run: Result | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the metadata of the model card."""
    formats = {file["format"] for file in config["files"].values()}
    tags = ["topkd", "image-classification", config["model"]]
    if run is not None and run.teacher is not None:
        tags.append("knowledge-distillation")
    if formats & {"onnx", "onnx-int8"}:
        tags.append("onnx")
    header: dict[str, Any] = {"license": config["license"]} if config["license"] else {}
    header |= {"library_name": "topkd", "pipeline_tag": "image-classification", "tags": tags}
    if run is None:
        return header
    where = f"last epoch, {run.eval_split} images, n = 1 seed"
    measured = [
        {
            "type": "accuracy" if name == "top1" else name,
            "value": float(metric.format(run.metric(name))),
            "name": f"{metric.title}{metric.unit and f' ({metric.unit})'}, {where}",
        }
        for name, metric in METRICS.items()
        if run.metric(name) is not None
    ]
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"type": run.data, "name": run.data, "split": run.eval_split},
        "metrics": measured,
    }
    return header | {"model-index": [{"name": f"{run.recipe} {run.variant}", "results": [result]}]}
