"""What to run: recipes in YAML, checked strictly, and changed by ``key=value``."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

STUDENT = "student"  # the name of the run with the recipe's own losses, beside its controls


class RecipeError(ValueError):
    """A recipe that cannot be used; it says where, what was got and what would be right."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class _Open(_Section):
    """A section with options of its own, which belong to whatever it names."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """Everything that is not a field of the section."""
        return dict(self.model_extra or {})


class RandAugment(_Section):
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


class StudentSection(_Section):
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
    recipe: str | None = None
    mean: tuple[float, float, float] | None = None
    """Of the images its weights were trained on, if they were normalised in another way."""
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
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together")
        return self


class View(_Section):
    """Which taps of one network a term reads, in place of those that all terms read."""

    maps: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    preactivations: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    embedding: str | None = None
    """A tap; of a map, every channel is averaged."""


class Taps(_Section):
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


class Optimizer(_Section):
    """SGD and how its rate changes."""

    lr: Annotated[float, Field(gt=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    schedule: Literal["milestones", "cosine", "one-cycle"] = "milestones"
    milestones: tuple[int, ...] = (150, 180, 210)
    """Epochs after which the rate is multiplied by ``factor``."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of a one-cycle schedule in which the rate rises."""


class Recipe(_Section):
    """Everything that changes the outcome of a run, except for its seed."""

    name: str = ""
    data: DataSection
    teacher: TeacherSection | None = None
    student: StudentSection
    losses: Annotated[tuple[Term, ...], Field(min_length=1)]
    controls: Mapping[str, Annotated[tuple[Term, ...], Field(min_length=1)]] = {}
    """Other losses to train the same student with; all runs are compared with the first control."""
    epochs: Annotated[int, Field(gt=0)] = 240
    batch_size: Annotated[int, Field(gt=1)] = 64
    optimizer: Optimizer = Optimizer()
    gradient_clip: Annotated[float, Field(gt=0)] | None = None
    """Greatest norm of the gradient."""
    threads: Annotated[int, Field(gt=0)] | None = None
    """Of the CPU, all if not told; small networks gain from one, which other work does not slow."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the networks; auto is bfloat16 where the device gains from it."""
    compile: Literal["auto", True, False] = "auto"
    """Whether to compile the networks; auto does so for long runs on a GPU."""

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
        for name, terms in self.arms.items():
            arm = "losses" if name == STUDENT else f"controls.{name}"
            titles = [term.title for term in terms]
            doubled = sorted({title for title in titles if titles.count(title) > 1})
            if doubled:
                raise ValueError(f"{arm}: {', '.join(doubled)} appears twice; give a label to each")
            if sum(term.share or 0 for term in terms) >= 1 or all(term.share for term in terms):
                raise ValueError(f"{arm}: shares must leave something to a term with a weight")
            for epoch in range(1, self.epochs + 1):
                if not any(t.weight * t.schedule(epoch, self.epochs) for t in terms if not t.share):
                    raise ValueError(f"{arm}: no term with a weight counts in epoch {epoch}")
        return self

    @property
    def arms(self) -> dict[str, tuple[Term, ...]]:
        """The runs of this recipe: its controls and its own losses."""
        return {**self.controls, STUDENT: self.losses}

    @property
    def hash(self) -> str:
        """Twelve digits by which equal recipes are recognised, whatever they are called."""
        content = self.model_dump(mode="json", exclude={"name"})
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
        RecipeError: If there is no such file or name.
    """
    if Path(name).is_file():
        return Path(name).read_text()
    if name in names():
        return (resources.files("topkd") / "recipes" / f"{name}.yaml").read_text()
    raise RecipeError(f"there is no recipe {name!r}{near(name, names())}")


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
    try:
        tree = yaml.load(text(name), _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{name}: a recipe is a mapping of keys to values")
    default = Path(name).stem if Path(name).is_file() else name
    tree.setdefault("name", default)
    for change in changes:
        _change(tree, change)
    return parse(tree)


def parse(tree: Mapping[str, Any]) -> Recipe:
    """Makes a recipe of plain values.

    Raises:
        RecipeError: If a key or a value is wrong; the message tells all that are.
    """
    return _validated(Recipe, tree, "recipe")


def write(recipe: Recipe) -> str:
    """Writes a recipe so that reading it gives the same again."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_options(function: Callable[..., Any], options: Mapping[str, Any], where: str) -> Any:
    """Checks options against the keyword-only arguments of a function.

    Args:
        function: What will be called with them.
        options: From a recipe.
        where: Their place in the recipe, for messages.

    Returns:
        The options as keyword arguments, parsed.

    Raises:
        RecipeError: If an option is unknown, missing or of the wrong type.
    """
    hints = typing.get_type_hints(function)
    fields: dict[str, Any] = {
        parameter.name: (
            hints[parameter.name],
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    model = create_model("Options", __base__=_Section, **fields)
    parsed = _validated(model, options, where)
    return {name: getattr(parsed, name) for name in parsed.model_fields_set}


def _validated(model: type[BaseModel], tree: Mapping[str, Any], where: str) -> Any:
    try:
        # As JSON, strict checking takes lists for tuples and mappings for dataclasses.
        return model.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A list whose only item is wrong counts as empty: the item's own message is enough.
        inner = [e for e in errors if e["type"] != "too_short"] or errors
        lines = [_explain(model, tree, where, dict(e)) for e in inner]
        raise RecipeError("\n".join(lines)) from None


def _explain(model: Any, tree: Any, where: str, error: dict[str, Any]) -> str:
    """Says where an error is, what was got and what would be right."""
    path, known, got = ("" if where == "recipe" else where), _fields(model), tree
    steps = list(error["loc"])
    for number, step in enumerate(steps):
        if _has(got, step):
            last = number == len(steps) - 1
            path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
            got = got[step]
            if not last:
                model = _inside(model, step)
                known = _fields(model)
        elif error["type"] == "missing":
            path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{path}: unknown key{near(str(steps[-1]), known)}"
    if error["type"] == "missing":
        return f"{path}: missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path or 'recipe'}: expected {message.removeprefix('a valid ')}, got {got!r}"


def _has(got: Any, step: Any) -> bool:
    if isinstance(got, Mapping):
        return step in got
    return isinstance(got, list) and isinstance(step, int) and step < len(got)


def _fields(model: Any) -> list[str]:
    if isinstance(model, type) and issubclass(model, BaseModel):
        return list(model.model_fields)
    return list(getattr(model, "__dataclass_fields__", ()))


def _inside(model: Any, step: Any) -> Any:
    """Finds the type of one part of a type: of a field, or of the items of a container."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        model = model.model_fields[step].annotation if step in model.model_fields else None
    else:
        model = next((a for a in typing.get_args(model)[::-1] if a is not ...), None)
    while typing.get_origin(model) is Annotated:
        model = typing.get_args(model)[0]
    options = [a for a in typing.get_args(model) if isinstance(a, type) and _fields(a)]
    is_union = type(None) in typing.get_args(model)
    return options[0] if is_union and options else model


def near(word: str, words: Sequence[str]) -> str:
    """Ends a message about a wrong word with the right one, or with all there are."""
    near = get_close_matches(word, words, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(words)}" if words else ""


def _change(tree: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    steps = re.findall(r"[^.\[\]]+", key)
    if not equals or not steps:
        raise RecipeError(f"a change is written key=value, got {change!r}")
    try:
        new = yaml.load(value, _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{change}: the value is not YAML: {error}") from error
    here: Any = tree
    for step in steps[:-1]:
        if isinstance(here, list):
            here = here[_place(here, step, change)]
        else:
            if here.get(step) is None:
                here[step] = {}
            here = here[step]
        if not isinstance(here, dict | list):
            raise RecipeError(f"{change}: {step} has no keys, it is {here!r}")
    if isinstance(here, list):
        here[_place(here, steps[-1], change)] = new
    else:
        here[steps[-1]] = new


def _place(items: list[Any], step: str, change: str) -> int:
    """Finds an item of a list by its number or by its name."""
    found = [item.get("name") if isinstance(item, dict) else item for item in items]
    if step in found:
        return found.index(step)
    if step.isdigit() and int(step) < len(items):
        return int(step)
    raise RecipeError(f"{change}: there is no {step!r}; there are {', '.join(map(str, found))}")


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-4 as a number, as people mean it, and takes no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        doubled = [key for number, key in enumerate(keys) if key in keys[:number]]
        if doubled:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(
                f"the key {doubled[0]!r} stands twice in what begins in line {line}"
            )
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
