"""Recipes carried out: teacher, RipsNet, student, evaluation, each skipped when it is done."""

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
from topkd.config.recipe import STUDENT, Recipe, Term
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
from topkd.training.check import check, configured, named, teacher_recipe
from topkd.training.outcome import Outcome, TaughtBy
from topkd.training.precision import Runtime
from topkd.training.teacher_cache import TeacherCache
from topkd.training.tracking import check_trackers
from topkd.training.trainer import Trainer
from topkd.training.trial import try_losses


class Experiment:
    """The stages of a recipe: teacher, fitted losses, students. Completed stages are skipped.

    Nothing is computed by the constructor: call :meth:`train_teacher`, :meth:`fit_losses`,
    :meth:`train_student`, or :meth:`run` for all of them in order.

    Args:
        recipe: The recipe.
        out: Parent of the folder of the runs, which is named after the recipe.
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
        own = shown = self.data.mean, self.data.std
        if section.pretrained:
            known = published_for(section, self.data)
            own = known.mean, known.std
        if self.objects.teacher is not None:
            pixels = section.size or side(self.data)
            shape = (3, pixels, pixels)
            network = factory.wrap(self.objects.teacher, section.model, shape, **section.taps)
        else:
            network = network_of(section, self.data, section.size)
        if self.objects.teacher is None and not section.pretrained:
            noted = self._fill_teacher(network)
            own = noted.get("mean", shown[0]), noted.get("std", shown[1])
        own = section.mean or own[0], section.std or own[1]
        self._say_where(network, "teacher")
        teacher = Teacher(network, *own, *shown, size=section.size)
        return teacher.to(self.device.device)

    def _fill_teacher(self, network: FeatureExtractor) -> dict[str, Any]:
        """Fills a teacher with the weights in its file, and returns the file's metadata."""
        section, path = self.recipe.teacher, self.teacher_file
        assert section is not None
        weights, noted = processes.by_first(
            lambda: (checkpoint.load_weights(path), checkpoint.read_about(path))
        )
        said = checkpoint.fill(network.network, weights, str(path), section.weights)
        if said:
            self.progress.say(f"teacher: {said} (teacher.weights)")
        same_order(self.data.classes, noted.get("classes", self.data.classes), str(path))
        return noted

    def _say_where(self, network: FeatureExtractor, role: str) -> None:
        """Says where a network is read if that was found by a trial."""
        if network.found:
            self.progress.say(f"{network.found}; {role}.head and {role}.maps overrule it")

    @property
    def teacher_file(self) -> Path:
        """Where the teacher's weights are, or will be once it is trained."""
        section = self.recipe.teacher
        assert section is not None
        if section.pretrained:
            raise RecipeError(f"teacher: {section.model} is pretrained, no file here is it")
        if section.checkpoint is not None:
            return Path(section.checkpoint).expanduser()
        name = teacher_recipe(self.recipe).name
        return self.out / name / STUDENT / "seed0" / "student.safetensors"

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
        """Where the teacher's predictions on evaluation images are kept, if the recipe says so."""
        section = self.recipe.teacher
        if section is None or not section.cache:
            return None
        about = json.dumps(self._cache_key(), sort_keys=True).encode()
        return self.out / "answers" / f"predictions-{files.sha256(about)[:12]}.safetensors"

    def cache_teacher(self) -> None:
        """Computes the teacher's predictions on evaluation images, which all runs then share."""
        with cpu_threads(self.recipe.threads):
            assert self.teacher is None or self._teacher_predictions is not None

    def train_teacher(self) -> Path | None:
        """Trains the teacher by its recipe, unless that is done or its weights are given.

        Returns:
            The file of its weights; None if there is no teacher, or it comes without a file.
        """
        section = self.recipe.teacher
        if section is None or section.pretrained or self.objects.teacher is not None:
            return None
        if section.recipe is not None and section.checkpoint is None:
            if self.objects == NO_OBJECTS:
                try_losses(self.recipe)  # an invalid option should not cost a teacher
            recipe, objects = teacher_recipe(self.recipe), Objects(data=self.objects.data)
            is_new = not self.teacher_file.exists()
            training = Experiment(recipe, self.out, self.progress, objects, self.trackers)
            result = training.train_student(STUDENT, 0)
            if is_new:
                self.progress.say(f"teacher: {section.model}, top-1 {result['last']['top1']:.2f} %")
        return self.teacher_file

    def losses(self, variant: str, student: FeatureExtractor, seed: int) -> list[LossTerm]:
        """Builds the losses of one run, learning from the teacher what they need.

        Args:
            variant: Which of the recipe's runs.
            student: The network that will learn.
            seed: Of the weights that losses bring; they do not touch the student's random numbers.
        """
        return self.build(self.recipe.variants[variant], self.context(student), seed)

    def build(self, terms: Sequence[Term], context: LossContext, seed: int) -> list[LossTerm]:
        """Configures some losses and binds them to the networks; see :meth:`losses`."""
        shown = torch.arange(self.recipe.batch_size).repeat(self.recipe.data.views)
        images = self.data.train.read(shown, None)  # as many as a batch of training has
        images = images.to(self.device.device)
        student, teacher = context.student, context.teacher
        for term in terms:
            student.also(needed_taps(term.taps.student))
            if teacher is not None:
                teacher.network.also(needed_taps(term.taps.teacher))
        with torch.no_grad():
            made = student.to(self.device.device).eval()(images)
            answer = made if teacher is None else teacher(images)
        built = []
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            for term in terms:
                given = self.objects.losses.get(term.title)
                loss = deepcopy(given) or configured(term, located(term.title))
                built.append(LossTerm(term, loss))
                built[-1].setup(made, answer, context)
        return built

    def context(self, student: FeatureExtractor) -> LossContext:
        """Gathers what losses may ask for before a student is trained."""
        return LossContext(
            self.answers,
            self.data.train.target,
            student,
            self.teacher,
            "" if self.teacher is None else self._teacher_hash,
            self.folder,
            self.progress,
        )

    def answers(self, epoch: int) -> Iterator[tuple[Batch, Features]]:
        """Computes what the teacher makes of the augmented training images, batch by batch."""
        assert self.teacher is not None
        for batch in training_batches(self.data.train, self.recipe.batch_size, 0, epoch):
            with self.device.autocast():
                answer = self.teacher(batch.images.to(self.device.device))
            yield batch, answer.apply(lambda t: t.float().cpu())

    def new_student(self) -> FeatureExtractor:
        """Builds the student, untrained."""
        learner = self.recipe.student
        if self.objects.student is None:
            student = network_of(learner, self.data)
        else:
            network = self.objects.student(len(self.data.classes))
            shape = (3, side(self.data), side(self.data))
            student = factory.wrap(network, learner.model, shape, **learner.taps)
        if learner.classifier == "own":
            return student
        assert self.teacher is not None
        images = self.data.test.read(torch.arange(2), None).to(self.device.device)
        section, taught_by = self.recipe.teacher, self.teacher.network
        named = section.maps if section else None
        if not named and taught_by.found:  # nothing says that it has a module avgpool
            named = taught_by.maps
        tap = named[-1] if named else "avgpool:in"
        return reuse(student.to(self.device.device), self.teacher, images, teacher_tap=tap)

    def fit_losses(self) -> None:
        """Fits every loss that needs it to the teacher, such as a RipsNet.

        Raises:
            ValueError: If the folder holds runs of another recipe, or a batch has more images than
                the training set.
        """
        with cpu_threads(self.recipe.threads):
            self.train_teacher()
            refuse_large_batches(self.recipe, self.data)
            self._claim_folder()
            for variant in self.recipe.variants:
                self.losses(variant, self.new_student(), 0)

    def train_student(self, variant: str, seed: int) -> dict[str, Any]:
        """Trains and evaluates one student, or reads its result if that is done.

        The teacher is trained first, where its recipe has not been run.

        Args:
            variant: Name of the run: a control, or ``"student"`` for the recipe's own losses.
            seed: Of the weights, the order of the images and their augmentation.

        Returns:
            The content of ``result.json``.

        Raises:
            RecipeError: If the recipe has no such run.
            ValueError: If the folder holds runs of another recipe.
        """
        named(self.recipe.variants, variant, "variant")
        self._claim_folder()
        folder = self.folder / variant / f"seed{seed}"
        with self._working_alone(folder), cpu_threads(self.recipe.threads):
            done = processes.by_first(lambda: finished(folder))
            return self._train_student(variant, seed, folder) if done is None else done

    def run(self, seeds: Iterable[int]) -> list[dict[str, Any]]:
        """Carries out all stages: the teacher, fitted losses, and every run with every seed."""
        return [
            self.train_student(variant, seed) for seed in seeds for variant in self.recipe.variants
        ]

    @contextmanager
    def _working_alone(self, folder: Path) -> Iterator[None]:
        """Locks the folder of a run, and deletes what killed processes have left in it."""
        if processes.rank() != 0:
            yield
            return
        with self.progress.alone(folder):
            files.sweep(folder)
            yield

    def _train_student(self, variant: str, seed: int, folder: Path) -> dict[str, Any]:
        refuse_large_batches(self.recipe, self.data)
        self.train_teacher()
        teacher = self.teacher  # loaded before the student's random numbers begin
        torch.manual_seed(seed)
        student = self.new_student()
        losses = self.losses(variant, student, seed)
        self._say_where(student, "student")
        trainer = Trainer(
            student,
            teacher,
            losses,
            self.data,
            self.recipe,
            seed,
            self.device,
            self.progress,
            self._kept_answers(seed),
            self._identity(),
            self.trackers,
        )
        processes.by_first(lambda: files.refuse_deleted(self.folder))
        history = trainer.run(folder)
        predictions = metrics.predict(student.eval(), self.data.test, self.device.device)
        processes.merge(self.data.faults.unreadable)
        taught_by = None
        if self.recipe.teacher is not None and self._teacher_predictions is not None:
            taught_by = TaughtBy(self._teacher_hash, self._teacher_predictions)
        outcome = Outcome(self.recipe, self.data, student, losses, predictions, history, taught_by)
        result = outcome.result(variant, seed, self.device)
        if processes.rank() == 0:
            files.refuse_deleted(folder)
            result = outcome.write(folder, result)
        trainer.accelerator.wait_for_everyone()
        return result

    def _identity(self) -> dict[str, str]:
        """What a run depends on and must find again when it is resumed."""
        taught = {} if self.teacher is None else {"teacher": self._teacher_hash[:12]}
        return {"recipe": self.recipe.hash} | taught

    def _kept_answers(self, seed: int) -> TeacherCache | None:
        """Where the teacher's answers are kept, if the recipe says so."""
        section, data = self.recipe.teacher, self.recipe.data
        if section is None or not section.cache:
            return None
        assert self.teacher is not None
        assert self._teacher_predictions is not None
        drawn = seed if data.augmentation_seed is None else data.augmentation_seed
        about = self._cache_key() | {
            "augmentation_seed": drawn,
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
        """What a teacher's features of these images depend on."""
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
        """Writes the recipe into an empty folder, and refuses one with runs of another recipe."""
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
                    "give this one another name with name=NAME, or another place with --out"
                )
        else:
            files.write(path, recipes.write(self.recipe))

    def _has_runs(self) -> bool:
        """Tests whether a run has a result or a state; a command that failed early leaves none."""
        kept = ("*/seed*/result.json", "*/seed*/checkpoint/latest.json")
        return any(True for pattern in kept for _ in self.folder.glob(pattern))
