"""Output of a finished run: result, weights and example embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from topkd._io import files
from topkd._runtime import processes
from topkd._runtime.environment import environment
from topkd.config.recipe import Recipe
from topkd.data import Data
from topkd.evaluation import metrics
from topkd.evaluation.per_class import PER_CLASS, per_class
from topkd.evaluation.results import Result
from topkd.features import FeatureExtractor
from topkd.losses.base import LossTerm
from topkd.models import checkpoint
from topkd.models.reused import ReusedClassifierStudent
from topkd.training.build import side
from topkd.training.precision import Runtime

RUN_FILES = ("student.safetensors", "metrics.jsonl", "examples.safetensors")
SHOWN = 1000  # evaluation images whose embeddings are kept for plots


@dataclass(frozen=True)
class TeacherOfRun:
    """The teacher of a run."""

    hash: str
    predictions: metrics.Predictions
    file: str | None = None
    """Hash of its weights file, if it has one."""
    recipe_hash: str | None = None
    """Hash of the recipe that trained it, if one did."""


@dataclass(frozen=True)
class Outcome:
    """A trained student with its predictions on the evaluation images."""

    recipe: Recipe
    data: Data
    student: FeatureExtractor
    terms: Sequence[LossTerm]
    predictions: metrics.Predictions
    history: Sequence[Mapping[str, Any]]
    teacher: TeacherOfRun | None

    def result(self, variant: str, seed: int, runtime: Runtime) -> dict[str, Any]:
        """Computes the content of ``result.json``, without the hashes of files."""
        recipe, split, history = self.recipe, self.data.eval_split, self.history
        key = f"{split}_top1"
        accuracies = {entry["epoch"]: entry[key] for entry in history if key in entry}
        best, recent = max(accuracies, key=accuracies.__getitem__), [*accuracies.values()][-10:]
        metadata = {term.title: term.loss.metadata() for term in self.terms if term.loss.metadata()}
        described = asdict(runtime) | {"memory_format": self.student.memory_format}
        evaluation = self._evaluation(runtime.device)
        return Result.model_validate(
            {
                "recipe": recipe.name,
                "recipe_hash": recipe.hash,
                "variant": variant,
                "seed": seed,
                "model": recipe.student.model,
                "data": recipe.data.name,
                "losses": list(recipe.variants[variant]),
                "epochs": recipe.epochs,
                "eval_split": split,
                "last": metrics.prediction_metrics(self.predictions)
                | metrics.requested_metrics(recipe.evaluation, evaluation, needs_teacher=False),
                "mean_of_last_10": sum(recent) / len(recent),
                "best": {"epoch": best, "top1": accuracies[best]},
                "gradient_share": history[-1]["gradient_share"],
                "gradient_at": history[-1].get("gradient_at", "embedding"),
                "loss_metadata": metadata,
                "data_issues": self.data.faults.facts(),
                "train_seconds": round(sum(entry["seconds"] for entry in history), 1),
                "processes": processes.count(),
                "environment": environment() | _as_text(described),
                **self._comparison(evaluation),
                "per_class": self._per_class(),
            }
        ).as_json()

    def _evaluation(self, device: torch.device) -> metrics.Evaluation:
        teacher = None if self.teacher is None else self.teacher.predictions
        return metrics.Evaluation(self.student, self.data, device, self.predictions, teacher)

    def _per_class(self) -> dict[str, Any] | None:
        if PER_CLASS not in self.recipe.evaluation:
            return None
        return per_class(self.predictions.logits, self.predictions.target, self.data.classes)

    def _comparison(self, evaluation: metrics.Evaluation) -> dict[str, Any]:
        """Returns the metrics of the teacher and the student's similarity to it."""
        if self.teacher is None or self.recipe.teacher is None:
            return {}
        described = {"model": self.recipe.teacher.model, "hash": self.teacher.hash}
        if self.teacher.file is not None:
            described["file"] = self.teacher.file
        if self.teacher.recipe_hash is not None:
            described["recipe_hash"] = self.teacher.recipe_hash
        return {
            "teacher": described | metrics.prediction_metrics(self.teacher.predictions),
            "teacher_similarity": metrics.teacher_similarity(
                self.predictions, self.teacher.predictions, cloud_size=self.recipe.batch_size
            )
            | metrics.requested_metrics(self.recipe.evaluation, evaluation, needs_teacher=True),
        }

    def write(self, folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the files of the run. ``result.json`` comes last and marks the run as finished.

        Returns:
            The result, with the hashes of the run's files.
        """
        files.write(folder / "examples.safetensors", self._examples())
        path, network = folder / "student.safetensors", self.student.network
        checkpoint.save_weights(path, network, self._metadata())
        complete = dict(result) | {"files": files.hashes(folder, RUN_FILES)}
        files.write_sealed(folder / "result.json", complete)
        return complete

    def _examples(self) -> bytes:
        tensors = {"student": self.predictions.embedding, "target": self.predictions.target}
        if self.teacher is not None:
            tensors["teacher"] = self.teacher.predictions.embedding
        return save_safetensors({name: t[:SHOWN].contiguous() for name, t in tensors.items()})

    def _metadata(self) -> dict[str, Any]:
        """Returns the metadata for loading the weights."""
        network = self.student.network
        reused = network.description if isinstance(network, ReusedClassifierStudent) else None
        return {
            "reused": reused,
            "model": self.recipe.student.model,
            "size": side(self.data),
            "taps": self.recipe.student.taps,
            "classes": list(self.data.classes),
            "mean": list(self.data.mean),
            "std": list(self.data.std),
            "data": self.recipe.data.model_dump(mode="json"),
        }


def _as_text(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value).removeprefix("torch.") for name, value in values.items()}
