"""Runs the stages of a recipe: teacher, fitted losses, students, evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from topkd._io import files
from topkd._io.progress import Progress
from topkd._runtime import processes
from topkd._runtime.processor import cpu_threads
from topkd.config.recipe import Recipe
from topkd.config.terms import Term
from topkd.config.validation import RecipeError
from topkd.data import Data, training_batches
from topkd.evaluation import metrics
from topkd.evaluation.results import finished
from topkd.features import Batch, FeatureExtractor, Features, Teacher
from topkd.losses.base import LossContext, LossTerm, located, needed_taps
from topkd.models import factory
from topkd.models.reused import reuse
from topkd.training.build import (
    NO_OBJECTS,
    Objects,
    load_data,
    network_of,
    refuse_large_batches,
    side,
)
from topkd.training.check import check, check_name, configured, teacher_recipe
from topkd.training.load_teacher import load_teacher, report_taps
from topkd.training.outcome import Outcome, TeacherOfRun
from topkd.training.precision import Runtime
from topkd.training.run_folder import claim, locked
from topkd.training.teacher_outputs import TeacherOutputs
from topkd.training.tracking import check_trackers
from topkd.training.trainer import OnEpoch, Trainer, ignore_epoch
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
        on_epoch: Observes the epochs of students, see :class:`~topkd.training.trainer.Trainer`.

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
        on_epoch: OnEpoch = ignore_epoch,
    ) -> None:
        check(recipe, objects)
        check_trackers(trackers)
        self.trackers, self.on_epoch = tuple(trackers), on_epoch
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
        section, given = self.recipe.teacher, self.objects.teacher
        if section is None:
            return None
        has_file = given is None and not section.pretrained
        file = self.teacher_file if has_file else None
        teacher = load_teacher(section, self.data, self.progress, file=file, given=given)
        return teacher.to(self.device.device)

    @cached_property
    def teacher_outputs(self) -> TeacherOutputs | None:
        """The teacher's outputs that all runs share; None if there is no teacher."""
        if self.teacher is None or self.recipe.teacher is None:
            return None
        return TeacherOutputs(
            self.teacher,
            self.recipe.teacher,
            self.recipe.data,
            self.data,
            self.device,
            folder=self.out / "answers",
            is_object=self.objects.teacher is not None,
        )

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

    @property
    def _teacher_file_hash(self) -> str | None:
        """Hash of the teacher's weights file; None if there is none yet."""
        section = self.recipe.teacher
        if section is None or section.pretrained or self.objects.teacher is not None:
            return None
        return files.sha256_of(self.teacher_file) if self.teacher_file.exists() else None

    @property
    def _teacher_recipe_hash(self) -> str | None:
        """Hash of the recipe that trains the teacher; None if no recipe does."""
        section = self.recipe.teacher
        if section is None or section.recipe is None or section.checkpoint is not None:
            return None
        return None if self.objects.teacher is not None else teacher_recipe(self.recipe).hash

    def cache_teacher(self) -> None:
        """Computes the teacher's predictions on evaluation images, which all runs share."""
        with cpu_threads(self.recipe.threads):
            if self.teacher_outputs is not None and self.teacher_outputs.section.cache:
                _ = self.teacher_outputs.predictions

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
        images, student, teacher = context.sample, context.student, context.teacher
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
        index = torch.arange(self.recipe.batch_size).repeat(self.recipe.data.views)
        images = self.data.train.read(index, None)  # size of a training batch
        return LossContext(
            self.teacher_features,
            self.data.train.target,
            student,
            self.teacher,
            "" if self.teacher_outputs is None else self.teacher_outputs.hash,
            self.folder,
            self.progress,
            images.to(self.device.device),
        )

    def teacher_features(self, epoch: int) -> Iterator[tuple[Batch, Features]]:
        """Returns the teacher's features of the augmented training images, batch by batch.

        With ``teacher.cache``, they are cached as those of the run with seed 0.
        """
        assert self.teacher is not None
        assert self.teacher_outputs is not None
        teacher, cache = self.teacher, self.teacher_outputs.cache(0)
        own = self.recipe.data.augmentation_seed
        batches = training_batches(
            self.data.train, self.recipe.batch_size, 0, epoch, augmentation_seed=own
        )
        for batch in batches:
            shown = batch.apply(lambda t: t.to(self.device.device))
            with self.device.autocast():
                found = teacher(shown.images) if cache is None else cache(shown, epoch, teacher)
            yield batch, found.apply(lambda t: t.float().cpu())

    def new_student(self) -> FeatureExtractor:
        """Builds a new student."""
        described = self.recipe.student
        if self.objects.student is None:
            student = network_of(described, self.data)
        else:
            network = self.objects.student()
            shape = (3, side(self.data), side(self.data))
            student = factory.wrap(network, described.model, shape, **described.taps)
        if described.classifier == "own":
            return student
        assert self.teacher is not None
        images = self.data.test.read(torch.arange(2), None).to(self.device.device)
        return reuse(student.to(self.device.device), self.teacher, images)

    def fit_losses(self) -> None:
        """Fits losses such as RipsNet to the teacher.

        Raises:
            ValueError: If the folder has runs of another recipe, or a batch is larger than the
                training set.
        """
        with cpu_threads(self.recipe.threads):
            self.train_teacher()
            refuse_large_batches(self.recipe, self.data)
            claim(self.folder, self.recipe)
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
            ValueError: If the folder has runs of another recipe, or the finished run had another
                teacher.
        """
        variant = variant or self.recipe.main
        folder = self.run_folder(seed, variant)
        claim(self.folder, self.recipe)
        with locked(folder, self.progress), cpu_threads(self.recipe.threads):
            claim(self.folder, self.recipe, own=folder)  # again, now that no other run can
            done = processes.by_first(lambda: self.finished(seed, variant))
            return self._train_student(variant, seed, folder) if done is None else done

    def run_folder(self, seed: int, variant: str | None = None) -> Path:
        """Returns the folder of a run; the variant defaults to the recipe's ``losses``.

        Raises:
            RecipeError: If the recipe has no such variant.
        """
        variant = variant or self.recipe.main
        check_name(self.recipe.variants, variant, "variant")
        return self.folder / variant / f"seed{seed}"

    def finished(self, seed: int, variant: str | None = None) -> dict[str, Any] | None:
        """Reads the result of a run; returns None if it is not finished.

        Args:
            seed: Seed of the run.
            variant: Name of a control. Defaults to the recipe's ``losses``.

        Raises:
            RecipeError: If the recipe has no such variant.
            ValueError: If the run had another recipe or teacher, or a file of it was altered.
        """
        folder = self.run_folder(seed, variant)
        done = finished(folder)
        if done is None:
            return None
        if done["recipe_hash"] != self.recipe.hash:
            raise ValueError(
                f"{folder} is the run of another recipe ({done['recipe_hash']}, not "
                f"{self.recipe.hash}); choose another name with name=NAME, or --out"
            )
        self.refuse_other_teacher({folder: done})
        return done

    def refuse_other_teacher(self, results: Mapping[Path, Mapping[str, Any]]) -> None:
        """Compares the teacher of finished runs with the present one.

        Args:
            results: Folder of a run -> its result.

        Raises:
            ValueError: If the weights of the teacher, or the recipe that trains it, have changed.
        """
        file, recipe, section = (
            self._teacher_file_hash,
            self._teacher_recipe_hash,
            self.recipe.teacher,
        )
        for folder, result in results.items():
            used = result.get("teacher") or {}
            if file is not None and used.get("file", file) != file:
                raise ValueError(
                    f"{folder} was trained with another teacher than {self.teacher_file} now "
                    "holds; choose another name with name=NAME, or another folder with --out"
                )
            if recipe is not None and section is not None and self._recipe_of(used) != recipe:
                raise ValueError(
                    f"{folder} has a teacher of another recipe than {section.recipe} now is; undo "
                    "the change of teacher.recipe, or choose another folder with --out"
                )

    def _recipe_of(self, used: Mapping[str, Any]) -> str | None:
        """Returns the hash of the recipe that trained the teacher of a result."""
        if "recipe_hash" in used:
            recorded: str = used["recipe_hash"]
            return recorded
        beside = self.teacher_file.with_name("result.json")  # earlier versions did not record it
        found: str | None = self._teacher_recipe_hash
        if beside.exists():
            found = files.read_sealed(beside)["recipe_hash"]
        return found

    def run(self, seeds: Iterable[int]) -> list[dict[str, Any]]:
        """Runs all stages: the teacher, fitted losses, and every variant with every seed."""
        variants = self.recipe.variants
        return [self.train_student(seed, variant) for seed in seeds for variant in variants]

    def _train_student(self, variant: str, seed: int, folder: Path) -> dict[str, Any]:
        refuse_large_batches(self.recipe, self.data)
        for line in self.recipe.schedule_warnings(variant):
            self.progress.say(f"warning: {line}")
        self.train_teacher()
        # Loaded before the random numbers of the student are seeded.
        teacher, outputs = self.teacher, self.teacher_outputs
        torch.manual_seed(seed)
        student = self.new_student()
        losses = self.losses(variant, student, seed)
        report_taps(student, "student", self.progress)
        trainer = Trainer(
            student,
            teacher,
            losses,
            self.data,
            self.recipe,
            seed,
            self.device,
            self.progress,
            None if outputs is None else outputs.cache(seed),
            self._identity(),
            self.trackers,
            self.on_epoch,
        )
        processes.by_first(lambda: files.refuse_deleted(self.folder))
        history = trainer.run(folder)
        predictions = trainer.predictions
        if predictions is None:  # resumed after the last epoch
            predictions = metrics.predict(student.eval(), self.data.test, self.device.device)
        processes.merge(self.data.faults.unreadable)
        trained_by = None
        if outputs is not None:
            file = self._teacher_file_hash
            trained_by = TeacherOfRun(
                outputs.hash, outputs.predictions, file, self._teacher_recipe_hash
            )
        outcome = Outcome(self.recipe, self.data, student, losses, predictions, history, trained_by)
        result = outcome.result(variant, seed, self.device)
        if processes.rank() == 0:
            files.refuse_deleted(folder)
            result = outcome.write(folder, result)
        trainer.accelerator.wait_for_everyone()
        return result

    def _identity(self) -> dict[str, str]:
        """Returns the dependencies that must be unchanged to resume a run."""
        outputs = self.teacher_outputs
        teacher = {} if outputs is None else {"teacher": outputs.hash[:12]}
        return {"recipe": self.recipe.hash} | teacher
