"""Finished runs read back from their folders: checked, and grouped by recipe, arm and seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from topkd._io import files
from topkd.config.recipe import STUDENT, Term
from topkd.config.validation import read_yaml
from topkd.evaluation.statistics import Paired, paired

Value = TypeVar("Value")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Taught(_Part):
    """The teacher of a run."""

    model: str
    hash: str
    top1: FiniteFloat


class Likeness(_Part):
    """How much a student is like its teacher."""

    agreement: FiniteFloat
    topological_distance: FiniteFloat | None = None


class Accuracy(_Part):
    """The accuracy at one epoch, in percent."""

    top1: FiniteFloat


class Judged(_Part):
    """How well an approximator stands for exact persistence."""

    r2: float
    gradient_cosine: float
    clouds: int


class Facts(_Part):
    """What is known of a loss beside its options."""

    fidelity: Judged | None = None


class Result(_Part):
    """What ``result.json`` holds, as far as a report reads it."""

    recipe: str
    recipe_hash: str
    arm: str
    seed: int
    model: str
    data: str
    losses: list[Term]
    epochs: int
    judged_on: str
    last: Accuracy
    mean_of_last_10: FiniteFloat
    best: Accuracy
    gradient_share: dict[str, FiniteFloat]
    facts: dict[str, Facts] = Field(default_factory=dict)
    train_seconds: FiniteFloat
    environment: dict[str, Any]
    files: dict[str, str] = Field(default_factory=dict)  # of the run: name -> hash
    teacher: Taught | None = None
    likeness: Likeness | None = None


@dataclass(frozen=True)
class Run:
    """One finished run and the folder that it is in."""

    result: Result
    folder: Path

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """What was measured in each epoch; empty if that was not kept.

        Raises:
            ValueError: If ``metrics.jsonl`` is broken.
        """
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        needed = {"losses", "gradient_share", f"{self.result.judged_on}_top1"}
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
        """Embeddings and labels of some test images; empty if they were not kept.

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
                raise ValueError(f"{path} is broken: there is no {name!r} in it")
        return tensors


@dataclass(frozen=True)
class Study:
    """All finished runs of one recipe."""

    recipe: str
    arms: Mapping[str, Mapping[int, Run]]  # arm -> seed -> run; controls first, then "student"
    control: str | None  # the arm that others are compared with; None of a single arm
    text: str | None  # recipe.yaml, if it was kept

    @property
    def first(self) -> Run:
        """The run of the first arm and its lowest seed."""
        return next(iter(self.runs))

    @property
    def runs(self) -> list[Run]:
        """Every run, arm by arm."""
        return [run for seeds in self.arms.values() for run in seeds.values()]

    @property
    def folder(self) -> Path:
        """The folder of the recipe, where its RipsNets are."""
        return self.first.folder.parent.parent

    @property
    def cloud_size(self) -> int:
        """How many points make a cloud: the batch size of the recipe."""
        size = _tree(self.text, "recipe.yaml").get("batch_size", 64)
        return size if isinstance(size, int) and size > 1 else 64

    def over_seeds(self, arm: str, read: Callable[[Result], Value | None]) -> dict[int, Value]:
        """Reads something of every run of an arm: seed -> value, without those that have none."""
        values = {seed: read(run.result) for seed, run in self.arms[arm].items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def compare(self, read: Callable[[Result], float | None]) -> dict[str, Paired | None]:
        """Compares every other arm with the control, seed by seed.

        Args:
            read: What is compared.

        Returns:
            Arm -> comparison, None where no seed is in common.
        """
        if self.control is None:
            return {}
        control, found = self.over_seeds(self.control, read), dict[str, Paired | None]()
        for arm in self.arms:
            values = self.over_seeds(arm, read)
            if arm != self.control:
                found[arm] = paired(values, control) if values.keys() & control.keys() else None
        return found


def collect(folder: Path) -> list[Study]:
    """Finds all finished runs below a folder.

    The first control of ``recipe.yaml`` is the one that others are compared with. Where that file
    was not kept, it is the arm that differs least from ``student``: the one with most of the same
    losses and fewest others.

    Args:
        folder: Searched for ``result.json``, however deep.

    Returns:
        One study for each recipe: those that distil first, then those that train a teacher.

    Raises:
        ValueError: If there is no result, one is broken, a seed of an arm appears twice, or runs
            of one name had different recipes; the message names the file.
    """
    found: dict[str, dict[str, dict[int, Run]]] = {}
    for path in sorted(folder.rglob("result.json")):
        result = _read(path)
        arms = found.setdefault(result.recipe, {})
        seeds = arms.setdefault(result.arm, {})
        if result.seed in seeds:
            raise ValueError(
                f"{path}: seed {result.seed} of arm {result.arm!r} of {result.recipe!r} appears "
                f"twice, the other is in {seeds[result.seed].folder}"
            )
        earlier = next(iter(next(iter(arms.values())).values()), None)
        if earlier is not None and earlier.result.recipe_hash != result.recipe_hash:
            raise ValueError(
                f"{path}: this is not the recipe {result.recipe!r} of {earlier.folder}, they only "
                "share the name; report their folders one by one"
            )
        seeds[result.seed] = Run(result, path.parent)
    if not found:
        raise ValueError(f"there is no result.json below {folder}: no run is finished there")
    studies = [_study(recipe, arms) for recipe, arms in found.items()]
    return sorted(studies, key=lambda study: (study.first.result.teacher is None, study.recipe))


def finished(folder: Path) -> dict[str, Any] | None:
    """Reads the result of a run with all its files; None if it has not ended.

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
    """Reads a result, and checks the files of its run that are there."""
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


def _study(recipe: str, arms: Mapping[str, Mapping[int, Run]]) -> Study:
    run = next(iter(next(iter(arms.values())).values()))
    path = run.folder.parent.parent / "recipe.yaml"
    text = path.read_text(encoding="utf-8") if path.exists() else None
    named = list(_tree(text, str(path)).get("controls") or {})
    losses = {arm: next(iter(seeds.values())).result.losses for arm, seeds in arms.items()}
    controls = sorted(arms.keys() - {STUDENT}, key=lambda arm: _place(arm, named, losses))
    order = [*controls, STUDENT] if STUDENT in arms else controls
    by_seed = {arm: dict(sorted(arms[arm].items())) for arm in order}
    return Study(recipe, by_seed, order[0] if len(order) > 1 else None, text)


def _place(
    arm: str, named: Sequence[str], losses: Mapping[str, list[Term]]
) -> tuple[int, int, int, str]:
    """Orders controls as the recipe does, and those it does not name by likeness to the student."""
    own = losses.get(STUDENT, [])
    shared = sum(term in own for term in losses[arm])
    position = named.index(arm) if arm in named else len(named)
    return position, -shared, len(losses[arm]), arm


def _tree(text: str | None, where: str) -> dict[str, Any]:
    tree = read_yaml(text, where) if text else None
    return tree if isinstance(tree, dict) else {}
