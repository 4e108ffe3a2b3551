"""Students for others to use: files that were read back and checked, and a card that tells all."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import topkd
from topkd._io import files
from topkd._io.progress import Progress
from topkd.config.recipe import DataSection
from topkd.config.validation import RecipeError, near, read_yaml
from topkd.data import DATA, Data, Images, InMemory, Subset, plain_batches
from topkd.data.pictures import CROP
from topkd.data.trust import changed
from topkd.evaluation import results
from topkd.evaluation.loading import evaluation_crop, restore
from topkd.evaluation.metrics import BATCH
from topkd.export.formats import FORMATS, Answer, Subject, require
from topkd.models import checkpoint
from topkd.models.factory import refuse_code
from topkd.training.build import load_data

CONFIG = "config.json"
TOLERANCE = 1e-4  # of logits: float32 computed in another order
RANDOM = 64  # images to check by where there are no real ones
_PLACES = ("root", "checkpoint", "file", "cache", "train", "test")  # keys that may hold a path


@dataclass(frozen=True)
class Student:
    """Weights, what was kept with them, and the run that they come from."""

    path: Path
    about: Mapping[str, Any]
    study: results.Study | None  # of this run alone; None of weights without a result

    @property
    def run(self) -> results.Result | None:
        """The numbers of the run."""
        return None if self.study is None else self.study.first.result

    @property
    def title(self) -> str:
        """What it is, for people."""
        run = self.run
        source = str(self.path) if run is None else f"{run.recipe}, {run.variant}, seed {run.seed}"
        return f"{self.about['model']} of {source}"


@dataclass(frozen=True)
class Judge:
    """Images by which files are judged, and what the network makes of them."""

    images: Images
    told: str
    are_real: bool
    logits: Tensor  # (images, classes)

    @classmethod
    def of(
        cls, network: Answer, images: Images, told: str, progress: Progress, *, are_real: bool
    ) -> Judge:
        """Shows images to the network.

        Raises:
            ValueError: If it answers with NaN or infinity.
        """
        logits = _answers(network, images, progress, "Asking the network")
        if not logits.isfinite().all():
            raise ValueError(f"the network answers some of {told} with NaN or infinity")
        return cls(images, told, are_real, logits)

    def compare(self, answer: Answer, progress: Progress, title: str) -> dict[str, Any]:
        """Compares the answers of a file with the network's: percents, and logits."""
        logits = _answers(answer, self.images, progress, title)
        same = logits.argmax(1) == self.logits.argmax(1)
        return {
            "checked_on": self.told,
            "top1": self._top1(logits),
            "network_top1": self._top1(self.logits),
            "agreement": _percent(same),
            "largest_difference": (logits - self.logits).abs().max().item(),
        }

    def _top1(self, logits: Tensor) -> float | None:
        right = logits.argmax(1) == self.images.target
        return _percent(right) if self.are_real else None


def load_student(target: Path) -> Student:
    """Reads what is known of a student.

    Args:
        target: The folder of a run, or a file of ours.

    Raises:
        FileNotFoundError: If there is no such run or file.
        ValueError: If the file does not tell which network it is, or a result is broken.
    """
    path = checkpoint.weights_file(target)
    about = checkpoint.read_about(path)
    missing = {"model", "classes", "mean", "std", "data"} - about.keys()
    if missing:
        raise ValueError(
            f"{path} does not tell {', '.join(sorted(missing))}: it is not of a run of topkd"
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
    """Writes a student in several formats and checks each; all are written, or none.

    Args:
        target: The folder of a run, or a file of ours.
        to: Names in ``FORMATS``.
        out: The folder to write to.
        progress: Tells the user.
        data: Changes to the options of the data, as ``key=value``.
        size: Of the images, in pixels on a side; needed only where they cannot be loaded.
        license: Of the weights, as the Hugging Face hub calls it.
        limit: Check on so many test images, evenly spread; on all if not told.
        tolerance: Largest difference of a logit from the network's, but for rounded formats.
        trust: Whether the file may name code, paths and addresses.

    Returns:
        What ``config.json`` holds.

    Raises:
        FileNotFoundError: If there is no such run.
        ModuleNotFoundError: If a package is missing.
        ValueError: If a format is unknown, the folder holds another student, a network cannot be
            traced, or a file answers otherwise than the network; nothing is left behind.
    """
    order = _order(to)
    student = load_student(target)
    if not trust:
        refuse_code(student.about["model"], str(student.path))
    images, missing = _load(student, data, trust=trust, needed=size is None)
    shown, told = _shown(student.about, images, size, limit, missing)
    seen = shown.read(torch.arange(1), None).shape[-1]
    given = {"data": _without_folders(student.about["data"]), "size": seen}
    about = dict(student.about) | given
    loaded = checkpoint.load_weights(student.path)
    network: nn.Module = restore(about, loaded, str(student.path))[0].network
    weights = checkpoint.hash_of(network)
    known = _claim(out, weights)
    if images is None:
        progress.say(f"{missing}; checking on {told}, so no accuracy is told")
    judge = Judge.of(network, shown, told, progress, are_real=images is not None)
    subject = Subject(network, about, None if images is None else images.train)
    with tempfile.TemporaryDirectory() as work:
        made = {
            FORMATS[name].file: _make(name, subject, judge, Path(work), tolerance, progress)
            for name in order
        }
        config = _config(student, about, weights) | {
            "license": license or known.get("license"),
            "files": known.get("files", {}) | made,
        }
        for name in made:
            files.write(out / name, (Path(work) / name).read_bytes())
    files.write(out / "README.md", card(student, config))
    files.write_json(out / CONFIG, config)  # last: it says that all is there
    return config


def _order(to: Sequence[str]) -> list[str]:
    """Orders the formats that are asked for, and makes sure that they can be written."""
    for name in to:
        if name not in FORMATS:
            raise ValueError(f"--to: there is no {name!r}{near(name, list(FORMATS))}")
        for package in FORMATS[name].packages:
            require(package)
    return [name for name in FORMATS if name in to]


def _make(
    name: str, subject: Subject, judge: Judge, work: Path, tolerance: float, progress: Progress
) -> dict[str, Any]:
    """Writes one file, reads it back and judges it."""
    form = FORMATS[name]
    path = work / form.file
    facts = form.write(subject, path)
    content = path.read_bytes()
    entry: dict[str, Any] = {"format": name, "bytes": len(content)}
    entry["sha256"] = files.sha256(content)
    entry |= judge.compare(form.read(path), progress, f"Checking {form.file}") | facts
    # Not `>`, so that NaN is refused too.
    if not form.is_rounded and not entry["largest_difference"] <= tolerance:
        raise ValueError(
            f"{form.file} differs from the network by {entry['largest_difference']:.2g} on "
            f"{judge.told}, whose logits reach {judge.logits.abs().max():.3g}; at most "
            f"{tolerance:g} is allowed (--tolerance), so nothing was written"
        )
    return entry


def _load(
    student: Student, changes: Sequence[str], *, trust: bool, needed: bool
) -> tuple[Data | None, str]:
    """Loads the images of a run, or says why there are none."""
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
        images = load_data(DataSection.model_validate(tree))
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
    """Chooses the images to judge by, and tells which they are."""
    if data is None:
        size = size or about.get("size")
        if size is None:
            raise ValueError(
                f"{missing}; give --data root=FOLDER, or --size PIXELS to check on random images"
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
def _answers(answer: Answer, images: Images, progress: Progress, title: str) -> Tensor:
    logits = []
    with progress.bar(title, len(images.target), "images") as advance:
        for batch in plain_batches(images, BATCH):
            logits.append(answer(batch.images).float())
            advance(len(batch.index), "")
    return torch.cat(logits)


def _percent(flags: Tensor) -> float:
    return 100 * flags.double().mean().item()


def _claim(out: Path, weights: str) -> dict[str, Any]:
    """Makes sure that a folder is free or holds the same student, and reads what it holds."""
    if (out / CONFIG).exists():
        known: dict[str, Any] = files.read_json(out / CONFIG)
        if isinstance(known, dict) and known.get("weights") == weights:
            return known
        raise ValueError(f"{out} holds another student; choose another --out, or delete it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and no export; choose another --out")
    return {}


def _config(student: Student, about: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """Collects what one needs to use the files."""
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
    """Leaves of every path the last part: what others are given does not tell of this machine."""
    if isinstance(tree, Mapping):
        return {k: _without_folders(v, k) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(item) for item in tree]
    is_place = isinstance(tree, str) and (key in _PLACES or tree.endswith((".yaml", ".yml")))
    return Path(tree).name if is_place else tree


def card(student: Student, config: Mapping[str, Any]) -> str:
    """Writes a model card, as the Hugging Face hub shows it.

    Args:
        student: What it is about.
        config: What ``config.json`` holds.

    References:
        Model Cards for Model Reporting (Mitchell et al., FAT* 2019)
        https://arxiv.org/abs/1810.03993
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("topkd.export"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  (Markdown)
    )
    study = student.study
    recipe = None if study is None or study.text is None else read_yaml(study.text, "recipe.yaml")
    return environment.get_template("model-card.md").render(
        header=_as_yaml(_header(student, config)),
        about=student.about,
        run=student.run,
        config=config,
        recipe=recipe and _as_yaml(_without_folders(recipe)),
    )


def _header(student: Student, config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that the hub reads."""
    run, made = student.run, {file["format"] for file in config["files"].values()}
    tags = ["topkd", "image-classification", config["model"]]
    if run is not None and run.teacher is not None:
        tags.append("knowledge-distillation")
    if made & {"onnx", "onnx-int8"}:
        tags.append("onnx")
    header: dict[str, Any] = {"license": config["license"]} if config["license"] else {}
    header |= {"library_name": "topkd", "pipeline_tag": "image-classification", "tags": tags}
    if run is None:
        return header
    metric = {
        "type": "accuracy",
        "value": round(run.last.top1, 2),
        "name": f"top-1 %, last epoch, {run.eval_split} images, n = 1 seed",
    }
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"type": run.data, "name": run.data, "split": run.eval_split},
        "metrics": [metric],
    }
    return header | {"model-index": [{"name": f"{run.recipe} {run.variant}", "results": [result]}]}


def _as_yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).rstrip()
