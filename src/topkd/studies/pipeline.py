"""The pipeline as a Python function."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic_core import to_jsonable_python
from torch import Tensor, nn

from topkd._io import files
from topkd._io.progress import Progress
from topkd.config import recipe as recipes
from topkd.config.terms import Term
from topkd.data import Data, from_dataset
from topkd.data.sources.dataset import Indexed
from topkd.losses import Loss
from topkd.losses.base import LossTerm
from topkd.models import MODELS, checkpoint
from topkd.models.factory import OBJECT
from topkd.studies.study import Study
from topkd.training.build import Objects
from topkd.training.experiment import Experiment

Network = str | Path | nn.Module
Losses = Sequence[Loss | LossTerm]
SAMPLED = 16  # images of a split that a recipe's name of data takes into account


def distill(
    student: str | nn.Module | Callable[[], nn.Module],
    teacher: Network | tuple[str, str | Path] | None,
    data: str | Mapping[str, Any] | Data | tuple[Indexed, Indexed],
    losses: Losses,
    *,
    controls: Mapping[str, Losses] | None = None,
    epochs: int = 20,
    seeds: Iterable[int] = (0,),
    out: str | Path = "runs/distilled",
    batch_size: int = 64,
    optimizer: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Study:
    """Distills a teacher into students, evaluates them and writes a folder of runs.

    Completed stages are skipped: repeat the call to resume.

    Args:
        student: Name of a network (``topkd list models``); a module, whose weights initialize every
            run; or a function that creates a module. It is also called once
            before the runs, to identify the network.
        teacher: A trained network: a module; a weights file that records the name of its network or
            is named after it (``resnet20.pth``); ``(name, file)``; ``torchvision:NAME`` or
            ``timm:NAME`` for published weights; None if no loss needs a teacher.
        data: Name of a data set, a recipe's ``data`` section, or ``(train, test)`` data sets of
            pairs (image, label).
        losses: Losses, or terms such as ``2 * KD()`` and ``TopKD().term(share=0.1)``.
        controls: Name -> losses of a control, i.e. of another student to compare with.
        epochs: Number of training epochs per student.
        seeds: Seeds, one run each.
        out: Folder of the runs. Its last part is the name of the recipe.
        batch_size: Batch size.
        optimizer: The recipe's ``optimizer`` section. Defaults to SGD with a cosine schedule.
        settings: Other keys of a recipe, such as ``precision`` or ``threads``.
        quiet: Whether to hide progress.

    Returns:
        The finished runs.

    Raises:
        ValueError: If an argument is invalid; the message names it.
        FileNotFoundError: If a file is missing.

    Examples:
        >>> from tempfile import mkdtemp
        >>> from topkd.losses import CE, KD
        >>> from topkd.models import create
        >>> study = distill(
        ...     "resnet8x0.25", create("resnet8x0.25", classes=10), "digits", [CE(), 2 * KD()],
        ...     epochs=1, out=f"{mkdtemp()}/example", quiet=True,
        ... )
        >>> study.results()[0]["epochs"]
        1
    """
    main, others = _terms(losses), {name: _terms(each) for name, each in (controls or {}).items()}
    teacher_section, teacher_object = _teacher(teacher)
    data_section, data_object = _data(data)
    student_section, student_object = _student(student)
    folder = Path(out)
    tree = {
        "name": folder.name,
        "data": data_section,
        "student": student_section,
        "losses": [term.settings for term in main],
        "controls": {name: [term.settings for term in each] for name, each in others.items()},
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": {"schedule": "cosine"} if optimizer is None else dict(optimizer),
        **({} if teacher_section is None else {"teacher": teacher_section}),
        **(settings or {}),
    }
    objects = Objects(
        data=data_object,
        student=student_object,
        teacher=teacher_object,
        losses={term.title: term.loss for each in (*others.values(), main) for term in each},
    )
    recipe = recipes.parse(_plain(tree))
    Experiment(recipe, folder.parent, Progress(quiet=quiet), objects).run(seeds)
    return Study(folder, student_object)


def _terms(losses: Losses) -> list[LossTerm]:
    return [each if isinstance(each, LossTerm) else each.term() for each in losses]


def _plain(tree: Any) -> Any:
    """Converts sections to plain values, without settings left at their defaults."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_plain(each) for each in tree]
    if isinstance(tree, Term):
        options = to_jsonable_python(tree.options, fallback=_described)
        return tree.model_copy(update=options).model_dump(mode="json", exclude_unset=True)
    return tree


def _described(option: Any) -> str:
    """Names an object that was given as an option of a loss."""
    if isinstance(option, nn.Module):
        return _module(option)
    name = getattr(option, "__qualname__", type(option).__name__)
    if isinstance(option, Tensor):
        option = option.detach().cpu().float().numpy()
    if isinstance(option, np.ndarray):
        return _object(name, files.sha256(f"{option.shape}".encode() + option.tobytes()))
    return f"{OBJECT}{name}"


def _object(name: str, content_hash: str) -> str:
    """Returns the name of an object in a recipe; another object has another name."""
    return f"{OBJECT}{name}-{content_hash[:8]}"


def _module(network: nn.Module) -> str:
    return _object(type(network).__name__, checkpoint.object_hash(network))


def _student(
    student: str | nn.Module | Callable[[], nn.Module],
) -> tuple[dict[str, Any], Callable[[], nn.Module] | None]:
    if isinstance(student, str):
        return {"model": student}, None
    if isinstance(student, nn.Module):
        return {"model": _module(student)}, lambda: copy.deepcopy(student)
    name = getattr(student, "__name__", type(student).__name__)
    network_hash = checkpoint.object_hash(_example(student))
    return {"model": _object(name.strip("<>"), network_hash)}, student


def _example(student: Callable[[], nn.Module]) -> nn.Module:
    """Builds a network with fixed random numbers, and restores the state of the generators."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            return student()
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


def _teacher(
    teacher: Network | tuple[str, str | Path] | None,
) -> tuple[dict[str, Any] | None, nn.Module | None]:
    if teacher is None:
        return None, None
    if isinstance(teacher, nn.Module):
        return {"model": _module(teacher), "checkpoint": "object"}, teacher
    if isinstance(teacher, tuple):
        return {"model": teacher[0], "checkpoint": str(teacher[1])}, None
    path = Path(teacher).expanduser()
    if not path.is_file() and str(teacher).startswith(("torchvision:", "timm:")):
        return {"model": str(teacher), "pretrained": True}, None
    path = checkpoint.weights_file(path)
    model = checkpoint.read_about(path).get("model") or path.name.partition(".")[0]
    if model not in MODELS:
        raise ValueError(
            f"teacher: {path} does not record the name of its network; pass "
            f"(name, {str(path)!r}), with a name from `topkd list models`"
        )
    return {"model": model, "checkpoint": str(path)}, None


def _data(
    data: str | Mapping[str, Any] | Data | tuple[Indexed, Indexed],
) -> tuple[dict[str, Any], Data | None]:
    if isinstance(data, str):
        return {"name": data}, None
    if isinstance(data, Mapping):
        return dict(data), None
    if not isinstance(data, Data):
        train, test = data
        data = from_dataset(train, test, size=_side(train[0][0]))
    return {"name": _object(data.name, _hash_of(data))}, data


def _hash_of(data: Data) -> str:
    """Computes a hash of the classes, the labels and a few images of each split.

    Training images are read without and with augmentation. Images that differ between two reads are
    left out: a repeated call must find its runs.
    """
    parts = [json.dumps([list(data.classes), list(data.mean), list(data.std)]).encode()]
    for images in (data.train, data.test):
        count = len(images.target)
        some = torch.linspace(0, count - 1, min(count, SAMPLED)).long()
        parts.append(images.target.numpy().tobytes())
        for augmented in (None, (0, 1)) if images is data.train else (None,):
            first, again = (images.read_bytes(some, augmented) for _ in range(2))
            if torch.equal(first, again):
                parts.append(first.contiguous().numpy().tobytes())
    return files.sha256(b"".join(parts))


def _side(image: Any) -> int:
    """Returns the input size of the networks: the shorter side of an image, at most 224 pixels."""
    if isinstance(image, Tensor):  # (channels, height, width)
        sides = image.shape[-2:]
    elif isinstance(image, np.ndarray):  # (height, width, channels)
        sides = image.shape[:2]
    else:  # PIL image
        sides = image.size
    return min(*sides, 224)
