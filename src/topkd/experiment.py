"""Recipes carried out: teacher, RipsNet, student, evaluation, each skipped when it is done."""

from __future__ import annotations

import inspect
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import save as save_safetensors

import topkd
from topkd import checkpoint, evaluate, files
from topkd import recipe as recipes
from topkd.answers import Answers
from topkd.data import DATA, Augmentation, Data, same_order, training_batches, with_augmentation
from topkd.features import Batch, Features, Tapped, Teacher
from topkd.losses import LOSSES, Loss, Source
from topkd.models import foreign
from topkd.models.reused import Reused, rebuild, reuse
from topkd.progress import Progress
from topkd.recipe import (
    STUDENT,
    DataSection,
    Recipe,
    RecipeError,
    StudentSection,
    TeacherSection,
    Term,
    View,
)
from topkd.terms import Weighted, seen, taps
from topkd.train import Device, Trainer

SHOWN = 1000  # test images whose embeddings are kept for pictures


def check(recipe: Recipe) -> None:
    """Checks every name and option of a recipe before any work is done.

    Raises:
        RecipeError: If one is wrong; the message says where, what was got and what would be right.
    """
    _named(DATA, recipe.data.name, "data.name")
    recipes.parse_options(DATA[recipe.data.name], recipe.data.options, "data")
    _check_network(recipe.student, "student")
    for arm, terms in recipe.arms.items():
        place = "losses" if arm == STUDENT else f"controls.{arm}"
        for number, term in enumerate(terms):
            _check_term(term, f"{place}[{number}]", recipe)
    if recipe.teacher is None and recipe.student.classifier == "teacher":
        raise RecipeError("student.classifier: there is no teacher to take it from")
    if recipe.teacher is not None:
        if recipe.teacher.cache and (
            recipe.data.views == 2 or recipe.data.mixup or recipe.data.cutmix
        ):
            raise RecipeError(
                "teacher.cache: answers are kept image by image, which mixed images and two views "
                "are not; leave out data.mixup, data.cutmix and data.views, or the cache"
            )
        _check_network(recipe.teacher, "teacher")
        if recipe.teacher.checkpoint is None and not recipe.teacher.pretrained:
            _teacher_recipe(recipe)


def _check_network(section: StudentSection, where: str) -> None:
    with torch.random.fork_rng(devices=[]), _told(where):
        with _told("model"):
            foreign.find(section.model)
        if section.pretrained:
            foreign.published(section.model)
        if section.taps:
            foreign.build(section.model, 2, **section.taps)  # finds names that are not there


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Says in an error where in the recipe it comes from."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{where}.{error}") from error
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def _check_term(term: Term, where: str, recipe: Recipe) -> None:
    _named(LOSSES, term.name, f"{where}.name")
    loss = LOSSES[term.name].loss
    if loss.needs_teacher and recipe.teacher is None:
        raise RecipeError(f"{where}: {term.name} cannot be computed without a teacher")
    options = _parsed(term, where)
    if loss.replaces_classifier and recipe.student.classifier != "teacher":
        raise RecipeError(f"{where}: {term.name} needs student.classifier=teacher")
    if not _is_built_from_features(loss):
        try:
            loss(**options)
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from error


def _parsed(term: Term, where: str) -> dict[str, Any]:
    """Parses the options of a term by the signature of what takes them."""
    loss = LOSSES[term.name].loss
    names_them = "options" not in inspect.signature(loss.between).parameters
    function = loss.between if names_them else loss.__init__
    options: dict[str, Any] = recipes.parse_options(function, term.options, where)
    return options


def _is_built_from_features(loss: type[Loss]) -> bool:
    """Tells whether a loss needs features to be built, so that it cannot be tried before."""
    return loss.between.__func__ is not Loss.between.__func__  # type: ignore[attr-defined]


def _named(catalogue: Mapping[str, Any], name: str, where: str) -> None:
    if name not in catalogue:
        raise RecipeError(f"{where}: there is no {name!r}{recipes.near(name, list(catalogue))}")


def _teacher_recipe(recipe: Recipe) -> Recipe:
    """The recipe that trains the teacher, on the student's images."""
    section = recipe.teacher
    assert section is not None
    assert section.recipe is not None
    teacher = recipes.load(section.recipe).model_copy(update={"data": recipe.data})
    if teacher.student.model != section.model:
        raise RecipeError(
            f"teacher.recipe: {teacher.name} trains {teacher.student.model}, "
            f"teacher.model is {section.model}"
        )
    return teacher


def _network(section: StudentSection, data: Data, size: int | None = None) -> Tapped:
    """Builds a network for the images of a data set, or for those of another size."""
    shown = _side(data) if size is None else size
    return foreign.build(
        section.model, len(data.classes), shown, pretrained=section.pretrained, **section.taps
    )


def _published(section: TeacherSection, data: Data) -> foreign.Published:
    """What is known of the weights of a teacher that nobody here trains."""
    told = foreign.published(section.model)
    if told.classes != len(data.classes):
        raise RecipeError(
            f"teacher.pretrained: {section.model} tells {told.classes} classes apart, "
            f"{data.name} has {len(data.classes)}; train it on them, and give the checkpoint"
        )
    if section.size is None and told.size != _side(data):
        raise RecipeError(
            f"teacher.size: {section.model} was trained on images of {told.size} px, {data.name} "
            f"has {_side(data)}; say which size it shall see, such as {told.size}"
        )
    return told


def _side(data: Data) -> int:
    """Pixels on a side of what networks are shown."""
    return data.test.read(torch.arange(1), None).shape[-1]


def load_data(section: DataSection) -> Data:
    """Loads the images of a recipe.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If a file or an image cannot be read, or a label is out of range.
    """
    options = recipes.parse_options(DATA[section.name], section.options, "data")
    data = DATA[section.name](**options)
    if section.validation:
        data = data.with_validation(section.validation)
    if section.limit is not None:
        data = data.with_limit(section.limit)
    changes = section.randaugment
    randaugment = None if changes is None else (changes.operations, changes.magnitude)
    augmentation = Augmentation(randaugment, section.mixup, section.cutmix, section.views)
    workers = None if section.workers == "auto" else section.workers
    return with_augmentation(data, augmentation, workers)


class Experiment:
    """One recipe and the folder in which its runs are kept.

    Args:
        recipe: What to run.
        out: Above the folder, which is called like the recipe.
        progress: Tells the user.

    Raises:
        RecipeError: If the recipe names or asks for what there is not.
    """

    def __init__(self, recipe: Recipe, out: Path, progress: Progress) -> None:
        check(recipe)
        self.recipe, self.out, self.progress = recipe, out, progress
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.folder = out / recipe.name

    @cached_property
    def data(self) -> Data:
        """The images, loaded once."""
        return load_data(self.recipe.data)

    @cached_property
    def device(self) -> Device:
        """Where and in which numbers networks are computed."""
        return Device.of(self.recipe, len(self.data.train.target))

    @cached_property
    def teacher(self) -> Teacher | None:
        """The teacher, trained first where its recipe has not been run; None if there is none."""
        section = self.recipe.teacher
        if section is None:
            return None
        own = shown = self.data.mean, self.data.std
        if section.pretrained:
            told = _published(section, self.data)
            own = told.mean, told.std
        network = _network(section, self.data, section.size)
        if section.recipe is not None and section.checkpoint is None:
            Experiment(_teacher_recipe(self.recipe), self.out, self.progress).student(STUDENT, 0)
        if not section.pretrained:
            path = self.teacher_file
            checkpoint.fill(network.network, checkpoint.load_weights(path), str(path))
            known = checkpoint.read_about(path).get("classes", self.data.classes)
            same_order(self.data.classes, known, str(path))
        own = section.mean or own[0], section.std or own[1]
        teacher = Teacher(network, *own, *shown, size=section.size)
        return teacher.to(self.device.device).to(memory_format=torch.channels_last)

    @property
    def teacher_file(self) -> Path:
        """Where the teacher's weights are, or will be once it is trained."""
        section = self.recipe.teacher
        assert section is not None
        if section.pretrained:
            raise RecipeError(f"teacher: {section.model} is pretrained, no file here is it")
        if section.checkpoint is not None:
            return Path(section.checkpoint).expanduser()
        name = _teacher_recipe(self.recipe).name
        return self.out / name / STUDENT / "seed0" / "student.safetensors"

    @cached_property
    def _teacher_hash(self) -> str:
        assert self.teacher is not None
        return checkpoint.hash_of(self.teacher.network.network)

    @cached_property
    def _teacher_predictions(self) -> evaluate.Predictions | None:
        if self.teacher is None:
            return None
        return evaluate.predict(self.teacher, self.data.test, self.device.device)

    def losses(self, arm: str, student: Tapped, seed: int) -> list[Weighted]:
        """Builds the losses of one run, learning from the teacher what they need.

        Args:
            arm: Which of the recipe's runs.
            student: The network that will learn.
            seed: Of the weights that losses bring; they do not touch the student's random numbers.
        """
        return self.build(self.recipe.arms[arm], self.source(student), seed)

    def build(self, terms: Sequence[Term], source: Source, seed: int) -> list[Weighted]:
        """Builds some losses; :meth:`losses` tells the rest."""
        images = self.data.train.read(torch.arange(self.recipe.batch_size), None)
        images = images.to(self.device.device)
        student, teacher = source.student, source.teacher
        for term in terms:
            student.also(taps(term.taps.student))
            if teacher is not None:
                teacher.network.also(taps(term.taps.teacher))
        with torch.no_grad():
            made = student.to(self.device.device).eval()(images)
            answer = made if teacher is None else teacher(images)
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            return [Weighted(term, self._loss(term, made, answer, source)) for term in terms]

    def _loss(self, term: Term, made: Features, answer: Features, source: Source) -> Loss:
        loss, options = LOSSES[term.name].loss, _parsed(term, term.name)
        views = term.taps
        source = replace(source, taps=views)
        if views.teacher != View():  # what a loss learns, it learns of what it will see
            told = source.teacher_hash + views.teacher.model_dump_json()
            source = replace(
                source,
                answers=lambda epoch: (
                    (batch, seen(answer, views.teacher)) for batch, answer in self.answers(epoch)
                ),
                teacher_hash=files.sha256(told.encode()),
            )
        return loss.between(
            seen(made, views.student), seen(answer, views.teacher), source, **options
        )

    def source(self, student: Tapped) -> Source:
        """Gathers what losses may ask for before a student is trained."""
        return Source(
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

    def new_student(self) -> Tapped:
        """Builds the student, untrained."""
        student = _network(self.recipe.student, self.data)
        if self.recipe.student.classifier == "own":
            return student
        assert self.teacher is not None
        images = self.data.test.read(torch.arange(2), None).to(self.device.device)
        return reuse(student.to(self.device.device), self.teacher, images)

    def prepare(self) -> None:
        """Carries out everything that comes before the first student is trained.

        Raises:
            ValueError: If the folder holds runs of another recipe.
        """
        self._claim_folder()
        for arm in self.recipe.arms:
            self.losses(arm, self.new_student(), 0)

    def student(self, arm: str, seed: int) -> dict[str, Any]:
        """Trains and evaluates one student, or reads the result where that is done.

        Args:
            arm: Which of the recipe's runs: a control, or ``"student"`` for its own losses.
            seed: Of the weights, the order of the images and their augmentation.

        Returns:
            What ``result.json`` holds.

        Raises:
            RecipeError: If the recipe has no such run.
            ValueError: If the folder holds runs of another recipe.
        """
        _named(self.recipe.arms, arm, "arm")
        self._claim_folder()
        folder = self.folder / arm / f"seed{seed}"
        if (folder / "result.json").exists():
            result: dict[str, Any] = files.read_json(folder / "result.json")
            return result
        teacher = self.teacher  # trained before the student's random numbers begin
        torch.manual_seed(seed)
        student = self.new_student()
        losses = self.losses(arm, student, seed)
        trainer = Trainer(
            student,
            teacher,
            losses,
            self.data,
            self.recipe,
            seed,
            self.device,
            self.progress,
            self._kept_answers(losses, seed),
        )
        history = trainer.run(folder)
        predictions = evaluate.predict(student.eval(), self.data.test, self.device.device)
        result = self._result(arm, seed, predictions, losses, history)
        if trainer.accelerator.is_main_process:
            self._keep_examples(predictions, folder)
            checkpoint.save_weights(
                folder / "student.safetensors", student.network, self._about(student)
            )
            files.write_json(folder / "result.json", result)  # last: it says that all is done
        trainer.accelerator.wait_for_everyone()
        return result

    def _kept_answers(self, losses: Sequence[Weighted], seed: int) -> Answers | None:
        """Where the teacher's answers are kept, if the recipe says so.

        Raises:
            RecipeError: If a loss needs more of the teacher than is kept.
        """
        section, data = self.recipe.teacher, self.recipe.data
        if section is None or not section.cache:
            return None
        for weighted in losses:
            if weighted.loss.reads_maps or taps(weighted.term.taps.teacher):
                raise RecipeError(
                    f"teacher.cache keeps logits and embeddings; {weighted.term.title} reads maps"
                )
        assert self._teacher_predictions is not None
        drawn = seed if data.augmentation_seed is None else data.augmentation_seed
        about = {
            "teacher": self._teacher_hash,
            "images": data.model_dump(mode="json", exclude={"workers"}),
            "augmentation_seed": drawn,
            "precision": str(self.device.dtype),
        }
        return Answers(
            self.out / "answers",
            about,
            images=len(self.data.train.target),
            classes=len(self.data.classes),
            width=self._teacher_predictions.embedding.shape[1],
        )

    def _about(self, student: Tapped) -> dict[str, Any]:
        """What is needed to use the weights of a student."""
        reused = student.network.description if isinstance(student.network, Reused) else None
        return {
            "reused": reused,
            "model": self.recipe.student.model,
            "size": _side(self.data),
            "taps": self.recipe.student.taps,
            "classes": list(self.data.classes),
            "mean": list(self.data.mean),
            "std": list(self.data.std),
            "data": self.recipe.data.model_dump(mode="json"),
        }

    def _result(
        self,
        arm: str,
        seed: int,
        predictions: evaluate.Predictions,
        losses: list[Weighted],
        history: list[dict[str, Any]],
    ) -> dict[str, Any]:
        recipe, judged_on = self.recipe, self.data.judged_on
        accuracies = [entry[f"{judged_on}_top1"] for entry in history]
        best = max(range(len(accuracies)), key=accuracies.__getitem__)
        result: dict[str, Any] = {
            "recipe": recipe.name,
            "recipe_hash": recipe.hash,
            "arm": arm,
            "seed": seed,
            "model": recipe.student.model,
            "data": recipe.data.name,
            "losses": [term.model_dump(mode="json") for term in recipe.arms[arm]],
            "epochs": recipe.epochs,
            "judged_on": judged_on,
            "last": evaluate.quality(predictions),
            "mean_of_last_10": sum(accuracies[-10:]) / len(accuracies[-10:]),
            "best": {"epoch": best + 1, "top1": accuracies[best]},
            "gradient_share": history[-1]["gradient_share"],
            "facts": {w.term.title: w.loss.facts() for w in losses if w.loss.facts()},
            "faults": self.data.faults.facts(),
            "train_seconds": round(sum(entry["seconds"] for entry in history), 1),
            "environment": environment() | _as_text(asdict(self.device)),
        }
        if recipe.teacher is not None and self._teacher_predictions is not None:
            taught_by = self._teacher_predictions
            result["teacher"] = {"model": recipe.teacher.model, "hash": self._teacher_hash}
            result["teacher"] |= evaluate.quality(taught_by)
            result["likeness"] = evaluate.likeness(
                predictions, taught_by, cloud_size=recipe.batch_size
            )
        return result

    def _keep_examples(self, predictions: evaluate.Predictions, folder: Path) -> None:
        """Keeps some embeddings, from which the report draws pictures."""
        tensors = {"student": predictions.embedding, "target": predictions.target}
        if self._teacher_predictions is not None:
            tensors["teacher"] = self._teacher_predictions.embedding
        kept = {name: tensor[:SHOWN].contiguous() for name, tensor in tensors.items()}
        files.write(folder / "examples.safetensors", save_safetensors(kept))

    def _claim_folder(self) -> None:
        path = self.folder / "recipe.yaml"
        if not path.exists():
            files.write(path, recipes.write(self.recipe))
            return
        there = recipes.parse(yaml.safe_load(path.read_text()))
        if there.hash == self.recipe.hash:
            return
        theirs, ours = there.model_dump(mode="json"), self.recipe.model_dump(mode="json")
        key = next(key for key in ours if ours[key] != theirs[key])
        raise ValueError(
            f"{self.folder} holds runs of another recipe: {key} is {theirs[key]} there and "
            f"{ours[key]} here; choose another place with --out, or delete the folder"
        )


def evaluate_file(
    target: Path,
    model: str | None,
    data: str | None,
    root: str | None,
    progress: Progress,
    *,
    trust: bool = False,
) -> dict[str, Any]:
    """Evaluates the network in a file on test images, in float32.

    Args:
        target: The folder of a run, a file of ours, or a checkpoint of others.
        model: Which network it is; a file of ours tells by itself.
        data: Which images; a file of ours tells by itself.
        root: Where the images are.
        progress: Tells the user.
        trust: Whether the file may ask for code of yours, as MODULE:CALLABLE.

    Raises:
        RecipeError: If a name is missing or unknown.
        ValueError: If the weights do not fit the network, or the file asks for code.
    """
    path = target / "student.safetensors" if target.is_dir() else target
    about = checkpoint.read_about(path)
    if not trust:
        foreign.refuse_code(about, str(path))
    model = model or about.get("model")
    tree = {"name": data} if data else about.get("data")
    if model is None or tree is None:
        raise RecipeError(f"{path} does not tell which network it is: give --model and --data")
    with _told("--model"):
        foreign.find(model)
    _named(DATA, tree["name"], "--data")
    section = DataSection.model_validate(tree | ({"root": root} if root else {}))
    weights = checkpoint.load_weights(path)
    images = load_data(section)
    own = about if about.get("model") == model else {}
    size, taps = own.get("size", _side(images)), own.get("taps", {})
    network = foreign.build(model, len(images.classes), size, **taps)
    if own.get("reused"):
        network = rebuild(network, own["reused"])
    checkpoint.fill(network.network, weights, str(path))
    device = Accelerator().device
    network.to(device).eval()
    with progress.bar("Evaluating", len(images.test.target), "images") as advance:
        predictions = evaluate.predict(network, images.test, device, advance)
    described = {"model": model, "data": images.name, "images": len(images.test.target)}
    return described | evaluate.quality(predictions)


def environment() -> dict[str, Any]:
    """Describes the machine and the versions that numbers were made with."""
    return {
        "topkd": topkd.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def _as_text(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value).removeprefix("torch.") for name, value in values.items()}


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source, if it is used from a git checkout."""
    folder = Path(__file__).resolve().parent
    if not any((parent / ".git").exists() for parent in folder.parents[:2]):
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
