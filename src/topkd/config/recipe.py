"""What to run: recipes in YAML, checked strictly, and changed by ``key=value``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from topkd.config.validation import (
    RecipeError,
    Section,
    change_by,
    near,
    read_yaml,
    validated,
    write_yaml,
)

STUDENT = "student"  # the name of the run with the recipe's own losses, beside its controls


class _Open(Section):
    """A section with options of its own, which belong to whatever it names."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """Everything that is not a field of the section."""
        return dict(self.model_extra or {})


class RandAugment(Section):
    """How strongly images are changed by operations chosen at random."""

    operations: Annotated[int, Field(ge=1)] = 2
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9


class DataSection(_Open):
    """Which images; other keys are options of the data set."""

    name: str
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training images to judge by instead of the test set, to choose settings."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Train on so many images only."""
    randaugment: RandAugment | None = None
    """Of the training images; where there are two views, of the second."""
    augmentation_seed: Annotated[int, Field(ge=0)] | None = None
    """Of crops, mirrors and all else that is done to training images; the run's own if not told."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of the Beta distribution by which training images are mixed in pairs; 0 for none."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """The same for pairs of which one covers a box of the other; with mixup too, each batch draws
    which of the two it is."""
    views: Literal[1, 2] = 1
    """2 shows every image of a batch twice: weakly augmented, and strongly (RandAugment, and a
    square erased)."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Processes that read training images, each with its own memory; 0 reads in threads. No number
    depends on it."""


class StudentSection(Section):
    """Which network learns."""

    model: str
    """Ours by name, torchvision:NAME, timm:NAME or the user's MODULE:CALLABLE."""
    maps: tuple[str, ...] | None = None
    """Modules that give the feature maps, shallow to deep, in place of those of its family."""
    head: str | None = None
    """The module that makes logits of embeddings, in place of that of its family."""
    preactivations: tuple[str, ...] | None = None
    """Taps of the maps before their activation, in place of those of its family."""
    pretrained: bool = False
    """Whether to begin with the weights that torchvision or timm publish."""

    classifier: Literal["own", "teacher"] = "own"
    """Of a student: "teacher" keeps the teacher's, behind a projector, in place of its own."""

    @property
    def taps(self) -> dict[str, Any]:
        """What replaces the taps of its family."""
        told = {"maps": self.maps, "head": self.head, "preactivations": self.preactivations}
        return {name: value for name, value in told.items() if value is not None}


class TeacherSection(StudentSection):
    """Which network teaches, and where its weights come from: a file, or else a recipe.

    In place of both, ``pretrained`` takes those that torchvision or timm publish.
    """

    checkpoint: str | None = None
    weights: Literal["plain", "ema"] = "plain"
    """Of a checkpoint with both: weights as they were trained, or their running mean."""
    recipe: str | None = None
    mean: tuple[float, float, float] | None = None
    """Of the images its weights were trained on, if they were normalized in another way."""
    std: tuple[float, float, float] | None = None
    size: Annotated[int, Field(gt=0)] | None = None
    """Pixels on a side of the images it sees, if not that of the student's; they are scaled."""

    cache: bool = False
    """Keep logits and embeddings of every augmented image, for all students and seeds to come."""

    @model_validator(mode="after")
    def _has_weights(self) -> TeacherSection:
        if self.classifier != "own":
            raise ValueError("classifier is an option of the student")
        is_told = self.checkpoint is not None or self.recipe is not None
        if not is_told and not self.pretrained:
            raise ValueError(
                "needs a checkpoint (a file) or a recipe that trains it, or pretrained: true"
            )
        if is_told and self.pretrained:
            raise ValueError("is pretrained, or has a checkpoint or a recipe; give one of them")
        if self.weights == "ema" and self.checkpoint is None:
            raise ValueError("weights: ema is of a checkpoint, which is not given")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together")
        return self


class View(Section):
    """Which taps of one network a term reads, in place of those that all terms read."""

    maps: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    preactivations: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    embedding: str | None = None
    """A tap; of a map, every channel is averaged."""


class Taps(Section):
    """What a term reads of both networks."""

    student: View = View()
    teacher: View = View()


class Term(_Open):
    """One summand of the loss; other keys are options of the loss it names."""

    name: str
    label: str | None = None
    """What results call the term; its name if not told. Two terms of one loss need two labels."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """In place of a weight: the fraction of the gradient at the student's embedding, measured as
    the sum of the norms of all terms, that this term shall carry."""
    start: Annotated[int, Field(gt=0)] = 1
    """The first epoch in which the term counts."""
    stop: Annotated[int, Field(gt=0)] | None = None
    """The last epoch in which the term counts."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Epochs over which the weight grows from 0, from ``start`` on."""
    decay: Annotated[int, Field(ge=0)] = 0
    """Epochs over which the weight falls to 0, up to ``stop`` or the last one."""
    batch: Literal["local", "gathered"] = "local"
    """With several processes, whether a loss sees the images of its own process or of all."""
    taps: Taps = Taps()

    @model_validator(mode="after")
    def _weighs_in_one_way(self) -> Term:
        if self.share is not None and "weight" in self.model_fields_set and self.weight != 1:
            raise ValueError("share stands in place of weight; give one of them")
        if self.stop is not None and self.stop < self.start:
            raise ValueError(f"stop ({self.stop}) comes before start ({self.start})")
        return self

    @property
    def title(self) -> str:
        """What results call the term."""
        return self.label or self.name

    def schedule(self, epoch: int, epochs: int) -> float:
        """What the weight is multiplied by in an epoch, counted from 1, of so many.

        Examples:
            >>> term = Term(name="kd", start=2, stop=5, warmup=2, decay=2)
            >>> [term.schedule(epoch, epochs=6) for epoch in range(1, 7)]
            [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
        """
        last = epochs if self.stop is None else min(self.stop, epochs)
        if not self.start <= epoch <= last:
            return 0.0
        rise = (epoch - self.start + 1) / max(1, self.warmup)
        fall = (last - epoch + 1) / max(1, self.decay)
        return min(1.0, rise, fall)


class Optimizer(Section):
    """What changes the weights, and how its rate changes."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1e6)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of AdamW, the first beta; the second is 0.999."""
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["milestones", "cosine", "one-cycle"] = "milestones"
    milestones: tuple[int, ...] = (150, 180, 210)
    """Epochs after which the rate is multiplied by ``factor``."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of a one-cycle schedule in which the rate rises."""

    @model_validator(mode="after")
    def _nesterov_is_of_sgd(self) -> Optimizer:
        if self.nesterov and self.name != "sgd":
            raise ValueError("nesterov is an option of sgd")
        return self


class Recipe(Section):
    """Everything that changes the outcome of a run, except for its seed."""

    name: str = ""
    data: DataSection
    teacher: TeacherSection | None = None
    student: StudentSection
    losses: Annotated[tuple[Term, ...], Field(min_length=1)]
    controls: Mapping[str, Annotated[tuple[Term, ...], Field(min_length=1)]] = {}
    """Other losses to train the same student with; all runs are compared with the first control."""
    epochs: Annotated[int, Field(gt=0)] = 240
    evaluate_every: Annotated[int, Field(gt=0)] = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    batch_size: Annotated[int, Field(gt=1)] = 64
    optimizer: Optimizer = Optimizer()
    gradient_clip: Annotated[float, Field(gt=0)] | None = None
    """Greatest norm of the gradient."""
    sync_batchnorm: bool = False
    """With several processes, whether the student normalizes batches by the images of all."""
    threads: Annotated[int, Field(gt=0)] | None = None
    """Of the CPU, all if not told; small networks gain from one, which other work does not slow."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the networks; auto is bfloat16 where the device gains from it."""
    compile: Literal["auto", True, False] = "auto"
    """Whether to compile the networks; auto does so for long runs on a GPU."""

    @model_validator(mode="after")
    def _name_is_a_folder(self) -> Recipe:
        if self.name and not re.fullmatch(r"\w[\w .+-]*(/\w[\w .+-]*)*", self.name):
            raise ValueError(
                f"name: {self.name!r} cannot name a folder below --out; use letters, digits, "
                "' ', '.', '+', '-' and '_', with '/' between folders"
            )
        return self

    @model_validator(mode="after")
    def _control_names_are_folders(self) -> Recipe:
        for name in self.controls:
            if name == STUDENT or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
                raise ValueError(
                    f"controls: {name!r} cannot name a run; use letters, digits, '.', '-' and '_', "
                    f"and not {STUDENT!r}"
                )
        return self

    @model_validator(mode="after")
    def _terms_leave_no_gap(self) -> Recipe:
        for name, terms in self.variants.items():
            variant = "losses" if name == STUDENT else f"controls.{name}"
            titles = [term.title for term in terms]
            doubled = sorted({title for title in titles if titles.count(title) > 1})
            if doubled:
                raise ValueError(
                    f"{variant}: {', '.join(doubled)} appears twice; give a label to each"
                )
            if sum(term.share or 0 for term in terms) >= 1 or all(term.share for term in terms):
                raise ValueError(f"{variant}: shares must leave something to a term with a weight")
            ends = [term.stop for term in terms if term.stop is not None]
            changes = {1, *(term.start for term in terms), *(end + 1 for end in ends)}
            for epoch in sorted(epoch for epoch in changes if epoch <= self.epochs):
                if not any(t.weight * t.schedule(epoch, self.epochs) for t in terms if not t.share):
                    raise ValueError(f"{variant}: no term with a weight counts in epoch {epoch}")
        return self

    @property
    def variants(self) -> dict[str, tuple[Term, ...]]:
        """The runs of this recipe: its controls and its own losses."""
        return {**self.controls, STUDENT: self.losses}

    @property
    def hash(self) -> str:
        """Twelve digits by which equal recipes are recognized, whatever they are called.

        Settings at their default do not count: a key that a later version adds leaves the hashes
        of earlier recipes as they are. So the default of a setting never changes its meaning.
        """
        content = self.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def names() -> list[str]:
    """Lists the recipes that ship with the package."""
    top = resources.files("topkd") / "recipes"
    with resources.as_file(top) as folder:
        return sorted(
            p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml")
        )


def text(name: str) -> str:
    """Reads a recipe as it is written, comments included: a file, or one of :func:`names`.

    Raises:
        RecipeError: If there is no such file or name, or it is not UTF-8.
    """
    if Path(name).is_file():
        try:
            return Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{name} is not UTF-8: {error}") from error
    if name in names():
        return (resources.files("topkd") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    if Path(name).suffix in (".yaml", ".yml"):
        raise RecipeError(f"there is no file {name}")
    raise RecipeError(
        f"there is no recipe {name!r}{near(name, names(), '; `topkd list recipes` lists them')}"
    )


def about(name: str) -> str:
    """Reads what the first comment of a recipe says, its first line."""
    first = text(name).splitlines()[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def load(name: str, changes: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and changes it.

    Args:
        name: A file, or one of :func:`names`.
        changes: As ``key=value``, the key with dots (``optimizer.lr=0.1``,
            ``losses.kd.weight=2``), the value in YAML.

    Raises:
        RecipeError: If the recipe or a change is wrong.
    """
    tree = read_yaml(text(name), name)
    if not isinstance(tree, dict):
        raise RecipeError(f"{name}: a recipe is a mapping of keys to values")
    default = Path(name).stem if Path(name).is_file() else name
    tree.setdefault("name", default)
    for change in changes:
        change_by(tree, change)
    _find_beside(tree, Path(name))
    return parse(tree)


def _find_beside(tree: dict[str, Any], file: Path) -> None:
    """Lets ``teacher.recipe`` name a file that lies beside the recipe's own."""
    teacher = tree.get("teacher")
    named = teacher.get("recipe") if isinstance(teacher, dict) else None
    if isinstance(named, str) and file.is_file() and (file.parent / named).is_file():
        tree["teacher"] = {**tree["teacher"], "recipe": str(file.parent / named)}


def parse(tree: Mapping[str, Any]) -> Recipe:
    """Makes a recipe of plain values.

    Raises:
        RecipeError: If a key or a value is wrong; the message tells all that are.
    """
    return validated(Recipe, tree, "recipe")


def write(recipe: Recipe) -> str:
    """Writes a recipe so that reading it gives the same again."""
    return write_yaml(recipe.model_dump(mode="json"))


def difference(there: Recipe, here: Recipe) -> str:
    """Names the first key at which two recipes differ, with both values."""

    def leaf(key: str, a: Any, b: Any) -> str | None:
        if a == b:
            return None
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            a, b = dict(enumerate(a)), dict(enumerate(b))
        if isinstance(a, dict) and isinstance(b, dict):
            inner = (leaf(f"{key}.{k}", a.get(k), b.get(k)) for k in dict.fromkeys((*a, *b)))
            return next(found for found in inner if found is not None)
        return f"{key.removeprefix('.')}: {_shown(a)} there, {_shown(b)} here"

    exclude = {"name"}
    trees = (recipe.model_dump(mode="json", exclude=exclude) for recipe in (there, here))
    return leaf("", *trees) or "nothing differs"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
