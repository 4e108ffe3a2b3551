"""Export of trained students: verified files, configuration and model card."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import topkd
from topkd._io import files
from topkd._io.progress import Progress
from topkd.config.sections import DataSection
from topkd.config.validation import RecipeError, near, read_yaml, validated
from topkd.data import DATA, Data, Images, InMemory, Subset, plain_batches
from topkd.data.pictures import CROP
from topkd.data.trust import changed
from topkd.evaluation import results
from topkd.evaluation.loading import evaluation_crop, restore
from topkd.evaluation.metrics import BATCH, agreement
from topkd.export.card import card
from topkd.export.formats import FORMATS, Predictor, Subject, require
from topkd.models import checkpoint
from topkd.models.factory import refuse_code
from topkd.training.build import load_data

CONFIG = "config.json"
TOLERANCE = 1e-4  # of logits, for float32 rounding
RANDOM = 64  # number of random images if no data is available
_PLACES = ("root", "checkpoint", "file", "cache", "train", "test")  # keys that may hold a path


@dataclass(frozen=True)
class Student:
    """Weights, their metadata and the run that they come from."""

    path: Path
    about: Mapping[str, Any]
    study: results.Study | None  # only this run; None for weights without a result

    @property
    def run(self) -> results.Result | None:
        """The result of the run."""
        return None if self.study is None else self.study.first.result

    @property
    def recipe(self) -> Any:
        """The recipe of the run with all defaults, without local folders."""
        text = self.study and self.study.text
        return text and _without_folders(read_yaml(text, "recipe.yaml"))


@dataclass(frozen=True)
class Reference:
    """Images for verification and the logits of the network."""

    images: Images
    description: str
    are_real: bool
    logits: Tensor  # (images, classes)

    @classmethod
    def of(
        cls,
        network: Predictor,
        images: Images,
        description: str,
        progress: Progress,
        *,
        are_real: bool,
    ) -> Reference:
        """Computes the logits of the network.

        Raises:
            ValueError: If a logit is NaN or infinite.
        """
        logits = _logits(network, images, progress, "Evaluating")
        if not logits.isfinite().all():
            raise ValueError(f"the network returns NaN or infinity for some of {description}")
        return cls(images, description, are_real, logits)

    def compare(self, predictor: Predictor, progress: Progress, title: str) -> dict[str, Any]:
        """Compares the outputs of a file with the network's."""
        logits = _logits(predictor, self.images, progress, title)
        return {
            "checked_on": self.description,
            "top1": self._top1(logits),
            "network_top1": self._top1(self.logits),
            "agreement": agreement(logits, self.logits),
            "largest_difference": (logits - self.logits).abs().max().item(),
        }

    def _top1(self, logits: Tensor) -> float | None:
        right = logits.argmax(1) == self.images.target
        return _percent(right) if self.are_real else None


def load_student(target: Path) -> Student:
    """Reads the metadata and the result of a student.

    Args:
        target: The folder of a run, or a weights file of topkd.

    Raises:
        FileNotFoundError: If there is no such run or file.
        ValueError: If the file does not describe the network, or the result is broken.
    """
    path = checkpoint.weights_file(target)
    about = checkpoint.read_about(path)
    missing = {"model", "classes", "mean", "std", "data"} - about.keys()
    if missing:
        raise ValueError(
            f"{path} does not record {', '.join(sorted(missing))}: topkd did not write it"
        )
    has_result = path.name == checkpoint.WEIGHTS and (path.parent / "result.json").exists()
    return Student(path, about, results.collect(path.parent)[0] if has_result else None)


def export(
    target: Path,
    to: Sequence[str],
    out: Path,
    progress: Progress,
    *,
    data: Sequence[str] = (),
    size: int | None = None,
    license: str | None = None,
    limit: int | None = None,
    tolerance: float = TOLERANCE,
    trust: bool = False,
) -> dict[str, Any]:
    """Exports a student in several formats and verifies each; writes all files or none.

    Args:
        target: The folder of a run, or a weights file of topkd.
        to: Names in ``FORMATS``.
        out: Output folder.
        progress: Shows progress.
        data: Overrides of the data section, as ``key=value``.
        size: Image size in pixels; needed only if the data cannot be loaded.
        license: License of the weights, as an identifier of the Hugging Face hub.
        limit: Number of evenly spaced evaluation images to verify on. Defaults to all.
        tolerance: Maximum difference of a logit, except for quantized formats.
        trust: Whether the file may name code, paths and addresses.

    Returns:
        The content of ``config.json``.

    Raises:
        FileNotFoundError: If there is no such run.
        ModuleNotFoundError: If a package is missing.
        ValueError: If a format is unknown, the folder holds another student, a network cannot be
            traced, or a file deviates from the network. Nothing is written then.
    """
    order = _order(to)
    student = load_student(target)
    if not trust:
        refuse_code(student.about["model"], str(student.path))
    images, missing = _load(student, data, trust=trust, needed=size is None)
    shown, description = _shown(student.about, images, size, limit, missing)
    seen = shown.read(torch.arange(1), None).shape[-1]
    given = {"data": _without_folders(student.about["data"]), "size": seen}
    about = dict(student.about) | given
    loaded = checkpoint.load_weights(student.path)
    network: nn.Module = restore(about, loaded, str(student.path))[0].network
    weights = checkpoint.hash_of(network)
    known = _claim(out, weights)
    if images is None:
        progress.say(f"{missing}; verifying on {description}, without accuracy")
    reference = Reference.of(network, shown, description, progress, are_real=images is not None)
    subject = Subject(network, about, None if images is None else images.train)
    with tempfile.TemporaryDirectory() as work:
        made = {
            FORMATS[name].file: _make(name, subject, reference, Path(work), tolerance, progress)
            for name in order
        }
        config = _config(student, about, weights) | {
            "license": license or known.get("license"),
            "files": known.get("files", {}) | made,
        }
        for name in made:
            files.write(out / name, (Path(work) / name).read_bytes())
    files.write(out / "README.md", card(student.about, student.run, student.recipe, config))
    files.write_json(out / CONFIG, config)  # last: marks the export as complete
    return config


def _order(to: Sequence[str]) -> list[str]:
    """Sorts the requested formats and checks that their packages are installed."""
    for name in to:
        if name not in FORMATS:
            raise ValueError(f"--to: there is no {name!r}{near(name, list(FORMATS))}")
        for package in FORMATS[name].packages:
            require(package)
    return [name for name in FORMATS if name in to]


def _make(
    name: str,
    subject: Subject,
    reference: Reference,
    work: Path,
    tolerance: float,
    progress: Progress,
) -> dict[str, Any]:
    """Writes one file, loads it and compares it with the network."""
    form = FORMATS[name]
    path = work / form.file
    facts = form.write(subject, path)
    content = path.read_bytes()
    entry: dict[str, Any] = {"format": name, "bytes": len(content)}
    entry["sha256"] = files.sha256(content)
    entry |= reference.compare(form.read(path), progress, f"Checking {form.file}") | facts
    # Not `>`, which would accept NaN.
    if not form.is_rounded and not entry["largest_difference"] <= tolerance:
        raise ValueError(
            f"{form.file} differs from the network by {entry['largest_difference']:.2g} on "
            f"{reference.description}, whose logits reach {reference.logits.abs().max():.3g}; at "
            f"most {tolerance:g} is allowed (--tolerance), so nothing was written"
        )
    return entry


def _load(
    student: Student, changes: Sequence[str], *, trust: bool, needed: bool
) -> tuple[Data | None, str]:
    """Loads the data of a run, or returns the reason why it is unavailable."""
    about = student.about
    try:
        tree = changed(about["data"], changes, str(student.path), trust=trust)
    except ValueError as error:
        if needed:
            raise
        return None, str(error)
    if tree["name"] not in DATA:
        raise RecipeError(f"data.name: there is no {tree['name']!r}{near(tree['name'], [*DATA])}")
    try:
        images = load_data(validated(DataSection, tree, "data"))
    except FileNotFoundError as error:
        return None, str(error)
    if len(images.classes) != len(about["classes"]):
        raise ValueError(
            f"{images.name} has {len(images.classes)} classes, the network {len(about['classes'])}"
        )
    return images, ""


def _shown(
    about: Mapping[str, Any], data: Data | None, size: int | None, limit: int | None, missing: str
) -> tuple[Images, str]:
    """Selects the images for verification and describes them."""
    if data is None:
        size = size or about.get("size")
        if size is None:
            raise ValueError(
                f"{missing}; give --data root=FOLDER, or --size PIXELS to verify on random images"
            )
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (RANDOM, size, size, 3), generator=generator).byte()
        target = torch.zeros(RANDOM, dtype=torch.long)
        images = InMemory(pixels, target, about["mean"], about["std"], 0, flip=False)
        return images, f"{RANDOM} random images"
    count, which = len(data.test.target), f"{data.eval_split} images of {data.name}"
    if limit is None or limit >= count:
        return data.test, f"the {count:,} {which}"
    index = torch.linspace(0, count - 1, limit).round().long()
    return Subset(data.test, index), f"{limit:,} of the {count:,} {which}"


@torch.no_grad()
def _logits(predictor: Predictor, images: Images, progress: Progress, title: str) -> Tensor:
    logits = []
    with progress.bar(title, len(images.target), "images") as advance:
        for batch in plain_batches(images, BATCH):
            logits.append(predictor(batch.images).float())
            advance(len(batch.index), "")
    return torch.cat(logits)


def _percent(flags: Tensor) -> float:
    return 100 * flags.double().mean().item()


def _claim(out: Path, weights: str) -> dict[str, Any]:
    """Checks that a folder is empty or holds the same student; returns its configuration."""
    if (out / CONFIG).exists():
        known: dict[str, Any] = files.read_json(out / CONFIG)
        if isinstance(known, dict) and known.get("weights") == weights:
            return known
        raise ValueError(f"{out} holds another student; choose another --out, or delete it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is no export; choose another --out")
    return {}


def _config(student: Student, about: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """Builds the content of ``config.json``."""
    run = student.run
    return {
        "model": about["model"],
        "classes": about["classes"],
        "mean": about["mean"],
        "std": about["std"],
        "size": about["size"],
        **_crop(about),
        "input": "images: float32 (n, 3, size, size), red green blue, (x / 255 - mean) / std",
        "output": "logits: float32 (n, classes)",
        "data": about["data"],
        "weights": weights,
        "topkd": topkd.__version__,
        "run": run and _without_folders(run.model_dump(mode="json", exclude_defaults=True)),
    }


def _crop(about: Mapping[str, Any]) -> dict[str, Any]:
    """Describes the central square of a picture that is evaluated, or None for the full picture.

    ``crop`` is its fraction of the shorter side; ``crop_least`` is its minimum side in pixels, for
    pictures that are at least that large.
    """
    frame = evaluation_crop(about)
    if frame.padding is not None:
        return {"crop": None, "crop_least": 0}
    if frame.crop is None:
        return {"crop": CROP, "crop_least": frame.size}
    return {"crop": frame.crop, "crop_least": 0}


def _without_folders(tree: Any, key: str = "") -> Any:
    """Reduces every path to its last component, to hide local folders."""
    if isinstance(tree, Mapping):
        return {k: _without_folders(v, k) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(item) for item in tree]
    is_place = isinstance(tree, str) and (key in _PLACES or tree.endswith((".yaml", ".yml")))
    return Path(tree).name if is_place else tree
