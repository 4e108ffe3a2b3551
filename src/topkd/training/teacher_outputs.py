"""Outputs of a teacher that all runs of a recipe share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from topkd._io import files
from topkd._runtime import processes
from topkd.config.sections import DataSection, TeacherSection
from topkd.data import Data
from topkd.evaluation import metrics
from topkd.features import Teacher
from topkd.models import checkpoint
from topkd.training.precision import Runtime
from topkd.training.teacher_cache import TeacherCache


@dataclass(frozen=True)
class TeacherOutputs:
    """Predictions and cached features of a teacher for the images of a recipe.

    Args:
        teacher: The teacher.
        section: The recipe's ``teacher``; its ``cache`` decides whether files are written.
        images: The recipe's ``data``.
        data: The loaded data.
        runtime: Device and precision.
        folder: Folder of the cache.
        is_object: Whether the teacher was given as a module, so that its name does not determine
            its architecture.
    """

    teacher: Teacher
    section: TeacherSection
    images: DataSection
    data: Data
    runtime: Runtime
    folder: Path
    is_object: bool = False

    @cached_property
    def hash(self) -> str:
        """Hash of the teacher's weights."""
        return checkpoint.hash_of(self.teacher.network.network)

    @cached_property
    def predictions(self) -> metrics.Predictions:
        """Predictions for the evaluation images, read from the cache or computed once."""
        path = self._file() if self.section.cache else None
        if path is not None and files.is_complete(path):
            kept = load_safetensors(files.read_checked(path))
            return metrics.Predictions(kept["logits"], kept["embedding"], self.data.test.target)
        predictions = metrics.predict(self.teacher, self.data.test, self.runtime.device)
        if path is not None and processes.rank() == 0:
            kept = {"logits": predictions.logits, "embedding": predictions.embedding}
            files.write_checked(path, save_safetensors(kept))
        return predictions

    def cache(self, seed: int) -> TeacherCache | None:
        """Returns the cache of the features for a run's images; None if it is disabled.

        Args:
            seed: Seed of the run, which augments the images unless the data have their own seed.
        """
        if not self.section.cache:
            return None
        own = self.images.augmentation_seed
        about = self._key() | {
            "augmentation_seed": seed if own is None else own,
            "precision": str(self.runtime.dtype),
        }
        return TeacherCache(
            self.folder,
            about,
            images=len(self.data.train.target),
            classes=len(self.data.classes),
            width=self.predictions.embedding.shape[1],
        )

    def _file(self) -> Path:
        about = json.dumps(self._key(), sort_keys=True).encode()
        return self.folder / f"predictions-{files.sha256(about)[:12]}.safetensors"

    def _key(self) -> dict[str, Any]:
        """Returns everything that the teacher's features depend on."""
        network = self.teacher.network
        given = {"object": checkpoint.object_hash(network)} if self.is_object else {}
        return given | {
            "teacher": self.hash,
            "normalization": [self.teacher.mean, self.teacher.std],
            "seen": self.section.model_dump(include={"size", "head"}),
            "images": self.images.model_dump(
                mode="json", exclude={"workers"}, exclude_defaults=True
            ),
        }
