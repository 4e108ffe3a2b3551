"""Runs the stages of a recipe: teacher, fitted losses, students, evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from topkd._io import files
from topkd._io.progress import Progress
from topkd._runtime import processes
from topkd._runtime.processor import cpu_threads
from topkd.config import recipe as recipes
from topkd.config.recipe import Recipe, Term
from topkd.config.validation import RecipeError
from topkd.data import Data, same_order, training_batches
from topkd.evaluation import metrics
from topkd.evaluation.results import finished
from topkd.features import Batch, FeatureExtractor, Features, Teacher
from topkd.losses.base import LossContext, LossTerm, located, needed_taps
from topkd.models import checkpoint, factory
from topkd.models.reused import reuse
from topkd.training.build import (
    NO_OBJECTS,
    Objects,
    load_data,
    network_of,
    published_for,
    refuse_large_batches,
    side,
)
from topkd.training.check import check, check_name, configured, teacher_recipe
from topkd.training.outcome import Outcome, TeacherOfRun
from topkd.training.precision import Runtime
from topkd.training.teacher_cache import TeacherCache
from topkd.training.tracking import check_trackers
from topkd.training.trainer import Trainer
from topkd.training.trial import try_losses


class Experiment:
    """The stages of a recipe: teacher, fitted losses, students. Completed stages are skipped.

    The constructor computes nothing: call :meth:`train_teacher`, :meth:`fit_losses`,
    :meth:`train_student`, or :meth:`run` for all of them in order.

    Args:
        recipe: The recipe.
        out: Parent folder. Runs are written to a subfolder named after the recipe.
        progress: Shows progress and messages.
        objects: Objects in place of names in the recipe.
        trackers: Names of experiment trackers, see :class:`~topkd.training.tracking.Trackers`.

    Raises:
        RecipeError: If a name or an option in the recipe is invalid.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        progress: Progress,
        objects: Objects = NO_OBJECTS,
        trackers: Sequence[str] = ("auto",),
    ) -> None:
        check(recipe, objects)
        check_trackers(trackers)
        self.trackers = tuple(trackers)
        self.recipe, self.out, self.progress, self.objects = recipe, out, progress, objects
        self.folder = out / recipe.name

    @cached_property
    def data(self) -> Data:
        """The data set, loaded once."""
        return load_data(self.recipe.data, self.objects.data)

    @cached_property
    def device(self) -> Runtime:
        """Device, autocast dtype and compilation settings."""
        return Runtime.of(self.recipe, len(self.data.train.target))

    @cached_property
    def teacher(self) -> Teacher | None:
        """The teacher, loaded once; None if the recipe has none.

        Raises:
            FileNotFoundError: If its weights are missing; :meth:`train_teacher` trains them.
        """
        section = self.recipe.teacher
        if section is None:
            return None
        of_teacher = of_data = self.data.mean, self.data.std
        if section.pretrained:
            published = published_for(section, self.data)
            of_teacher = published.mean, published.std
        if self.objects.teacher is not None:
            pixels = section.size or side(self.data)
            shape = (3, pixels, pixels)
            network = factory.wrap(self.objects.teacher, section.model, shape, **section.taps)
        else:
            network = network_of(section, self.data, section.size)
        if self.objects.teacher is None and not section.pretrained:
            about = self._fill_teacher(network)
            of_teacher = about.get("mean", of_data[0]), about.get("std", of_data[1])
        of_teacher = section.mean or of_teacher[0], section.std or of_teacher[1]
        self._report_taps(network, "teacher")
        teacher = Teacher(network, *of_teacher, *of_data, size=section.size)
        return teacher.to(self.device.device)

    def _fill_teacher(self, network: FeatureExtractor) -> dict[str, Any]:
        """Loads the weights of the teacher and returns the metadata of their file."""
        section, path = self.recipe.teacher, self.teacher_file
        assert section is not None
        weights, about = processes.by_first(
            lambda: (checkpoint.load_weights(path), checkpoint.read_about(path))
        )
        note = checkpoint.fill(network.network, weights, str(path), section.weights)
        if note:
            self.progress.say(f"teacher: {note} (teacher.weights)")
        same_order(self.data.classes, about.get("classes", self.data.classes), str(path))
        return about

    def _report_taps(self, network: FeatureExtractor, role: str) -> None:
        """Prints the taps of a network if they were detected automatically."""
        if network.found:
            self.progress.say(f"{network.found}; {role}.head and {role}.maps override it")

    @property
    def teacher_file(self) -> Path:
        """Path of the teacher's weights, which may not be trained yet."""
        section = self.recipe.teacher
        assert section is not None
        if section.pretrained:
            raise RecipeError(f"teacher: {section.model} is pretrained and has no weights file")
        if section.checkpoint is not None:
            return Path(section.checkpoint).expanduser()
        recipe = teacher_recipe(self.recipe)
        return self.out / recipe.name / recipe.main / "seed0" / "student.safetensors"

    @cached_property
    def _teacher_hash(self) -> str:
        assert self.teacher is not None
        return checkpoint.hash_of(self.teacher.network.network)

    @cached_property
    def _teacher_predictions(self) -> metrics.Predictions | None:
        if self.teacher is None:
            return None
        path = self._predictions_file()
        if path is not None and files.is_complete(path):
            kept = load_safetensors(files.read_checked(path))
            return metrics.Predictions(kept["logits"], kept["embedding"], self.data.test.target)
        predictions = metrics.predict(self.teacher, self.data.test, self.device.device)
        if path is not None and processes.rank() == 0:
            kept = {"logits": predictions.logits, "embedding": predictions.embedding}
            files.write_checked(path, save_safetensors(kept))
        return predictions

    def _predictions_file(self) -> Path | None:
        """Returns the file of the teacher's cached predictions; None if the cache is disabled."""
        section = self.recipe.teacher
        if section is None or not section.cache:
            return None
        about = json.dumps(self._cache_key(), sort_keys=True).encode()
        return self.out / "answers" / f"predictions-{files.sha256(about)[:12]}.safetensors"

    def cache_teacher(self) -> None:
        """Computes the teacher's predictions on evaluation images, which all runs share."""
        with cpu_threads(self.recipe.threads):
            assert self.teacher is None or self._teacher_predictions is not None

    def train_teacher(self) -> Path | None:
        """Trains the teacher with its recipe, unless it is trained or its weights are given.

        Returns:
            The weights file; None if there is no teacher or it has no file.
        """
        section = self.recipe.teacher
        if section is None or section.pretrained or self.objects.teacher is not None:
            return None
        if section.recipe is not None and section.checkpoint is None:
            if self.objects == NO_OBJECTS:
                try_losses(self.recipe)  # finds invalid options before the teacher is trained
            recipe, objects = teacher_recipe(self.recipe), Objects(data=self.objects.data)
            is_new = not self.teacher_file.exists()
            training = Experiment(recipe, self.out, self.progress, objects, self.trackers)
            result = training.train_student(0)
            if is_new:
                self.progress.say(f"teacher: {section.model}, top-1 {result['last']['top1']:.2f} %")
        return self.teacher_file

    def losses(self, variant: str, student: FeatureExtractor, seed: int) -> list[LossTerm]:
        """Builds the losses of one run and fits them to the teacher where necessary.

        Args:
            variant: Variant of the recipe.
            student: The student.
            seed: Seed of adapter weights. It does not affect the student's random numbers.
        """
        return self.build(self.recipe.variants[variant], self.context(student), seed)

    def build(self, terms: Sequence[Term], context: LossContext, seed: int) -> list[LossTerm]:
        """Builds losses and sets them up with the networks; see :meth:`losses`."""
        index = torch.arange(self.recipe.batch_size).repeat(self.recipe.data.views)
        images = self.data.train.read(index, None)  # size of a training batch
        images = images.to(self.device.device)
        student, teacher = context.student, context.teacher
        for term in terms:
            student.also(needed_taps(term.taps.student))
            if teacher is not None:
                teacher.network.also(needed_taps(term.taps.teacher))
        with torch.no_grad():
            student_output = student.to(self.device.device).eval()(images)
            teacher_output = student_output if teacher is None else teacher(images)
        built = []
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            for term in terms:
                given = self.objects.losses.get(term.title)
                loss = deepcopy(given) or configured(term, located(term.title))
                built.append(LossTerm(term, loss))
                built[-1].setup(student_output, teacher_output, context)
        return built

    def context(self, student: FeatureExtractor) -> LossContext:
        """Returns the context that losses may use in their setup."""
        return LossContext(
            self.teacher_features,
            self.data.train.target,
            student,
            self.teacher,
            "" if self.teacher is None else self._teacher_hash,
            self.folder,
            self.progress,
        )

    def teacher_features(self, epoch: int) -> Iterator[tuple[Batch, Features]]:
        """Computes the teacher's features of the augmented training images, batch by batch."""
        assert self.teacher is not None
        for batch in training_batches(self.data.train, self.recipe.batch_size, 0, epoch):
            with self.device.autocast():
                teacher_output = self.teacher(batch.images.to(self.device.device))
            yield batch, teacher_output.apply(lambda t: t.float().cpu())

    def new_student(self) -> FeatureExtractor:
        """Builds a new student."""
        described = self.recipe.student
        if self.objects.student is None:
            student = network_of(described, self.data)
        else:
            network = self.objects.student(len(self.data.classes))
            shape = (3, side(self.data), side(self.data))
            student = factory.wrap(network, described.model, shape, **described.taps)
        if described.classifier == "own":
            return student
        assert self.teacher is not None
        images = self.data.test.read(torch.arange(2), None).to(self.device.device)
        section, teacher_network = self.recipe.teacher, self.teacher.network
        maps = section.maps if section else None
        if not maps and teacher_network.found:  # may lack a module named avgpool
            maps = teacher_network.maps
        tap = maps[-1] if maps else "avgpool:in"
        return reuse(student.to(self.device.device), self.teacher, images, teacher_tap=tap)

    def fit_losses(self) -> None:
        """Fits losses such as RipsNet to the teacher.

        Raises:
            ValueError: If the folder has runs of another recipe, or a batch is larger than the
                training set.
        """
        with cpu_threads(self.recipe.threads):
            self.train_teacher()
            refuse_large_batches(self.recipe, self.data)
            self._claim_folder()
            for variant in self.recipe.variants:
                self.losses(variant, self.new_student(), 0)

    def train_student(self, seed: int, variant: str | None = None) -> dict[str, Any]:
        """Trains and evaluates one student, or returns its result if it is finished.

        The teacher is trained first if its recipe has not been run.

        Args:
            seed: Seed of the weights, of the order of the images and of their augmentation.
            variant: Name of a control. Defaults to the recipe's ``losses``.

        Returns:
            The content of ``result.json``.

        Raises:
            RecipeError: If the recipe has no such variant.
            ValueError: If the folder has runs of another recipe.
        """
        variant = variant or self.recipe.main
        check_name(self.recipe.variants, variant, "variant")
        self._claim_folder()
        folder = self.folder / variant / f"seed{seed}"
        with self._locked(folder), cpu_threads(self.recipe.threads):
            done = processes.by_first(lambda: finished(folder))
            return self._train_student(variant, seed, folder) if done is None else done

    def run(self, seeds: Iterable[int]) -> list[dict[str, Any]]:
        """Runs all stages: the teacher, fitted losses, and every variant with every seed."""
        variants = self.recipe.variants
        return [self.train_student(seed, variant) for seed in seeds for variant in variants]

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        """Locks the folder of a run and deletes temporary files of killed processes."""
        if processes.rank() != 0:
            yield
            return
        with self.progress.alone(folder):
            files.sweep(folder)
            yield

    def _train_student(self, variant: str, seed: int, folder: Path) -> dict[str, Any]:
        refuse_large_batches(self.recipe, self.data)
        self.train_teacher()
        teacher = self.teacher  # loaded before the random numbers of the student are seeded
        torch.manual_seed(seed)
        student = self.new_student()
        losses = self.losses(variant, student, seed)
        self._report_taps(student, "student")
        trainer = Trainer(
            student,
            teacher,
            losses,
            self.data,
            self.recipe,
            seed,
            self.device,
            self.progress,
            self._teacher_cache(seed),
            self._identity(),
            self.trackers,
        )
        processes.by_first(lambda: files.refuse_deleted(self.folder))
        history = trainer.run(folder)
        predictions = metrics.predict(student.eval(), self.data.test, self.device.device)
        processes.merge(self.data.faults.unreadable)
        trained_by = None
        if self.recipe.teacher is not None and self._teacher_predictions is not None:
            trained_by = TeacherOfRun(self._teacher_hash, self._teacher_predictions)
        outcome = Outcome(self.recipe, self.data, student, losses, predictions, history, trained_by)
        result = outcome.result(variant, seed, self.device)
        if processes.rank() == 0:
            files.refuse_deleted(folder)
            result = outcome.write(folder, result)
        trainer.accelerator.wait_for_everyone()
        return result

    def _identity(self) -> dict[str, str]:
        """Returns the dependencies that must be unchanged to resume a run."""
        teacher = {} if self.teacher is None else {"teacher": self._teacher_hash[:12]}
        return {"recipe": self.recipe.hash} | teacher

    def _teacher_cache(self, seed: int) -> TeacherCache | None:
        """Returns the cache of the teacher's features; None if it is disabled."""
        section, data = self.recipe.teacher, self.recipe.data
        if section is None or not section.cache:
            return None
        assert self.teacher is not None
        assert self._teacher_predictions is not None
        augmentation_seed = seed if data.augmentation_seed is None else data.augmentation_seed
        about = self._cache_key() | {
            "augmentation_seed": augmentation_seed,
            "precision": str(self.device.dtype),
        }
        return TeacherCache(
            self.out / "answers",
            about,
            images=len(self.data.train.target),
            classes=len(self.data.classes),
            width=self._teacher_predictions.embedding.shape[1],
        )

    def _cache_key(self) -> dict[str, Any]:
        """Returns everything that the teacher's features depend on."""
        section, data = self.recipe.teacher, self.recipe.data
        assert section is not None
        assert self.teacher is not None
        return {
            "teacher": self._teacher_hash,
            "normalization": [self.teacher.mean, self.teacher.std],
            "seen": section.model_dump(include={"size", "head"}),
            "images": data.model_dump(mode="json", exclude={"workers"}),
        }

    def _claim_folder(self) -> None:
        """Writes the recipe to the folder; rejects a folder with runs of another recipe."""
        processes.by_first(self._claim)

    def _claim(self) -> None:
        path = self.folder / "recipe.yaml"
        if path.exists() and self._has_runs():
            try:
                there = recipes.load(str(path))
            except RecipeError as error:
                raise RecipeError(f"{path} was altered: {error}") from error
            if there.hash != self.recipe.hash:
                differs = recipes.difference(there, self.recipe)
                raise ValueError(
                    f"{self.folder} holds runs of another recipe: {differs}; "
                    "choose another name with name=NAME, or another folder with --out"
                )
        else:
            files.write(path, recipes.write(self.recipe))

    def _has_runs(self) -> bool:
        """Tests whether a run has a result or a state."""
        patterns = ("*/seed*/result.json", "*/seed*/checkpoint/latest.json")
        return any(True for pattern in patterns for _ in self.folder.glob(pattern))
