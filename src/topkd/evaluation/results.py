"""The result of a run, and finished runs grouped by recipe, variant and seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from topkd._io import files
from topkd.config.terms import Term, variant_name
from topkd.config.validation import read_yaml
from topkd.evaluation.statistics import Paired, paired

Value = TypeVar("Value")
GradientPlace = Literal["embedding", "backbone weights"]
"""Where the gradients of loss terms are measured and compared."""

MADE_WITH = ("processor", "threads", "device", "dtype", "topkd", "commit", "torch", "python")
"""What a result may depend on besides its recipe: keys of ``environment``."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class MetricValues(_Part):
    """Values of :data:`topkd.evaluation.metrics.METRICS`, by name."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, FiniteFloat]

    def value(self, name: str) -> float | None:
        """Returns the value of a metric, or None if it was not measured."""
        return getattr(self, name, None)


class LastEpoch(MetricValues):
    """Metrics at the last epoch."""

    top1: FiniteFloat


class BestEpoch(_Part):
    """The epoch with the highest accuracy. It is recorded and never reported as the headline."""

    epoch: int | None = None
    top1: FiniteFloat


class TeacherResult(_Part):
    """The teacher of a run and its metrics."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, FiniteFloat]

    model: str
    hash: str
    file: str | None = None  # hash of its weights file
    recipe_hash: str | None = None  # of the recipe that trained it
    top1: FiniteFloat

    def value(self, name: str) -> float | None:
        """Returns the value of a metric, or None if it was not measured."""
        return getattr(self, name, None)


class Fidelity(_Part):
    """The accuracy of an approximator of persistence."""

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="constants")

    r2: float
    gradient_cosine: float
    clouds: int


class LossMetadata(_Part):
    """Metadata of a loss beyond its options."""

    model_config = ConfigDict(frozen=True, extra="allow")

    fidelity: Fidelity | None = None


class PerClass(_Part):
    """Accuracy and confusion matrix by class, see :func:`topkd.evaluation.per_class`."""

    accuracy: dict[str, FiniteFloat]
    confusion: dict[str, dict[str, int]]


class Result(_Part):
    """The content of ``result.json``: written by a run, read by reports and exports."""

    recipe: str
    recipe_hash: str
    variant: str
    seed: int
    model: str
    data: str
    losses: list[Term]
    epochs: int
    eval_split: str
    last: LastEpoch
    mean_of_last_10: FiniteFloat
    best: BestEpoch
    gradient_share: dict[str, FiniteFloat]
    gradient_at: GradientPlace = "embedding"
    loss_metadata: dict[str, LossMetadata] = Field(default_factory=dict)
    data_issues: dict[str, Any] = Field(default_factory=dict)
    train_seconds: FiniteFloat
    processes: int = 1
    environment: dict[str, Any]
    teacher: TeacherResult | None = None
    teacher_similarity: MetricValues | None = None
    per_class: PerClass | None = None
    files: dict[str, str] = Field(default_factory=dict)  # of the run: name -> hash

    def metric(self, name: str) -> float | None:
        """Returns a metric of the last epoch, or None if it was not measured."""
        found = self.last.value(name)
        if found is None and self.teacher_similarity is not None:
            return self.teacher_similarity.value(name)
        return found

    def as_json(self) -> dict[str, Any]:
        """Converts to plain values, without the parts that were not measured.

        A place of the gradients is written if it is not the embedding.
        """
        optional = ("teacher", "teacher_similarity", "per_class")
        absent: dict[str, Any] = {name: True for name in optional if not getattr(self, name)}
        if self.teacher is not None:
            hashes = ("file", "recipe_hash")
            absent["teacher"] = {name for name in hashes if getattr(self.teacher, name) is None}
        if self.gradient_at == "embedding":
            absent["gradient_at"] = True
        return self.model_dump(mode="json", exclude=absent)


@dataclass(frozen=True)
class Run:
    """One finished run and the folder that it is in."""

    result: Result
    folder: Path

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The entries of ``metrics.jsonl``, one per epoch; empty if the file is absent.

        Raises:
            ValueError: If ``metrics.jsonl`` is broken.
        """
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        needed = {"losses", "gradient_share"}
        try:
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise ValueError(f"{path} is broken: {error}") from error
        for number, entry in enumerate(entries, start=1):
            lacking = sorted(needed - set(entry)) if isinstance(entry, dict) else sorted(needed)
            if lacking:
                raise ValueError(f"{path} is broken: line {number} lacks {', '.join(lacking)}")
        return entries

    @cached_property
    def examples(self) -> dict[str, Tensor]:
        """Embeddings and labels of some evaluation images; empty if the file is absent.

        Raises:
            ValueError: If ``examples.safetensors`` is broken.
        """
        path = self.folder / "examples.safetensors"
        if not path.exists():
            return {}
        try:
            tensors = load_safetensors(path.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{path} is broken: {error}") from error
        for name in ("student", "target"):
            if name not in tensors:
                raise ValueError(f"{path} is broken: the tensor {name!r} is missing")
        return tensors


@dataclass(frozen=True)
class Study:
    """All finished runs of one recipe."""

    recipe: str
    variants: Mapping[str, Mapping[int, Run]]  # variant -> seed -> run; controls first
    baseline: str | None  # the reference variant; None if there is only one
    text: str | None  # content of recipe.yaml, if the file exists

    @property
    def first(self) -> Run:
        """The run of the first variant and its lowest seed."""
        return next(iter(self.runs))

    @property
    def runs(self) -> list[Run]:
        """All runs, ordered by variant and seed."""
        return [run for seeds in self.variants.values() for run in seeds.values()]

    @property
    def folder(self) -> Path:
        """The folder of the recipe, which also holds fitted approximators."""
        return self.first.folder.parent.parent

    @property
    def cloud_size(self) -> int:
        """Number of points in a cloud: the batch size of the recipe."""
        size = _tree(self.text, "recipe.yaml").get("batch_size", 64)
        return size if isinstance(size, int) and size > 1 else 64

    def over_seeds(self, variant: str, read: Callable[[Result], Value | None]) -> dict[int, Value]:
        """Reads a value from every run of a variant: seed -> value, without absent values."""
        values = {seed: read(run.result) for seed, run in self.variants[variant].items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def metric(self, name: str) -> dict[str, dict[int, float]]:
        """Returns a metric of the last epoch: variant -> seed -> value."""
        return {v: self.over_seeds(v, lambda result: result.metric(name)) for v in self.variants}

    def compare(self, name: str = "top1") -> dict[str, Paired | None]:
        """Compares every other variant with the baseline, paired by seed.

        Args:
            name: The metric to compare.

        Returns:
            Variant -> comparison, None if the two have no seed in common.
        """
        if self.baseline is None:
            return {}
        measured, found = self.metric(name), dict[str, Paired | None]()
        baseline = measured[self.baseline]
        for variant, values in measured.items():
            if variant != self.baseline:
                common = values.keys() & baseline.keys()
                found[variant] = paired(values, baseline) if common else None
        return found


def collect(folder: Path) -> list[Study]:
    """Finds all finished runs below a folder.

    The baseline of comparisons is the first control in ``recipe.yaml``. If that file is absent,
    the variant named after the most losses counts as the recipe's own, and the baseline is the
    variant most similar to it: the one that shares the most losses and has the fewest others.

    Args:
        folder: Searched for ``result.json`` at any depth.

    Returns:
        One study per recipe. Recipes with a teacher come first.

    Raises:
        ValueError: If there is no result, one is broken, a seed of a variant appears twice, or runs
            of one name had different recipes; the message names the file.
    """
    found: dict[str, dict[str, dict[int, Run]]] = {}
    for path in sorted(folder.rglob("result.json")):
        result = _read(path)
        variants = found.setdefault(result.recipe, {})
        seeds = variants.setdefault(result.variant, {})
        if result.seed in seeds:
            raise ValueError(
                f"{path}: seed {result.seed} of variant {result.variant!r} of {result.recipe!r} "
                f"appears twice, the other is in {seeds[result.seed].folder}"
            )
        earlier = next(iter(next(iter(variants.values())).values()), None)
        if earlier is not None and earlier.result.recipe_hash != result.recipe_hash:
            raise ValueError(
                f"{path}: this is not the recipe {result.recipe!r} of {earlier.folder}, they only "
                "share the name; report their folders separately"
            )
        seeds[result.seed] = Run(result, path.parent)
    if not found:
        raise ValueError(f"there is no result.json below {folder}: it holds no finished run")
    studies = [_study(recipe, variants) for recipe, variants in found.items()]
    return sorted(studies, key=lambda study: (study.first.result.teacher is None, study.recipe))


def read(folder: Path) -> Run:
    """Reads a finished run and checks the hashes of the files that are present.

    Raises:
        FileNotFoundError: If the run is not finished.
        ValueError: If the result is broken, or a file of the run was altered.
    """
    return Run(_read(folder / "result.json"), folder)


def finished(folder: Path) -> dict[str, Any] | None:
    """Reads the result of a finished run and checks its files; returns None if it is unfinished.

    Raises:
        ValueError: If a file of the run was altered or is missing.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    values = files.read_sealed(path)
    files.check_hashes(folder, _read(path).files, need_all=True)
    return values


def _read(path: Path) -> Result:
    """Reads a result and checks the hashes of the files that are present."""
    try:
        result = Result.model_validate(files.read_sealed(path))
        files.check_hashes(path.parent, result.files)
        return result
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        message = first["msg"].removeprefix("Input should be ")
        raise ValueError(
            f"{path} is not the result of a run: {place}: expected {message}, "
            f"got {str(first['input'])[:80]!r}"
            if first["type"] != "missing"
            else f"{path} is not the result of a run: {place} is missing"
        ) from None


def _study(recipe: str, variants: Mapping[str, Mapping[int, Run]]) -> Study:
    run = next(iter(next(iter(variants.values())).values()))
    path = run.folder.parent.parent / "recipe.yaml"
    text = path.read_text(encoding="utf-8") if path.exists() else None
    named = list(_tree(text, str(path)).get("controls") or {})
    losses = {
        variant: next(iter(seeds.values())).result.losses for variant, seeds in variants.items()
    }
    unnamed = variants.keys() - set(named)
    own = [variant for variant in unnamed if variant == variant_name(losses[variant])]
    main = max(own, key=lambda variant: (len(losses[variant]), variant), default=None)
    controls = sorted(
        variants.keys() - {main}, key=lambda variant: _place(variant, named, losses, main)
    )
    order = controls if main is None else [*controls, main]
    by_seed = {variant: dict(sorted(variants[variant].items())) for variant in order}
    return Study(recipe, by_seed, order[0] if len(order) > 1 else None, text)


def _place(
    variant: str, named: Sequence[str], losses: Mapping[str, list[Term]], main: str | None
) -> tuple[int, int, int, str]:
    """Returns the sort key of a control: place in the recipe, then similarity to ``main``."""
    own = [] if main is None else losses[main]
    shared = sum(term in own for term in losses[variant])
    position = named.index(variant) if variant in named else len(named)
    return position, -shared, len(losses[variant]), variant


def _tree(text: str | None, where: str) -> dict[str, Any]:
    tree = read_yaml(text, where) if text else None
    return tree if isinstance(tree, dict) else {}
