"""What it saves to keep a teacher's answers: three students of one teacher, with and without.

python benchmarks/answers.py DATA_ROOT

A ResNet-56 with random weights teaches three ResNet-8 for two epochs on 4,000 images of CIFAR-100,
judged by 500 more.
"""

import sys
import tempfile
from pathlib import Path

import torch

from topkd._io.progress import Progress
from topkd.config.recipe import parse
from topkd.models import MODELS, checkpoint
from topkd.training.experiment import Experiment

VARIANTS = {"mild": 1.0, "usual": 2.0, "kd": 4.0}


def terms(weight: float) -> list[dict[str, object]]:
    return [{"name": "ce"}, {"name": "kd", "weight": weight}]


def seconds(folder: Path, *, cache: bool) -> dict[str, float]:
    recipe = parse(
        {
            "name": f"cache {cache}",
            "data": {
                "name": "cifar100",
                "root": sys.argv[1],
                "limit": 4000,
                "validation": 0.01,
            },
            "teacher": {
                "model": "resnet56",
                "checkpoint": str(folder / "teacher.safetensors"),
                "cache": cache,
            },
            "student": {"model": "resnet8"},
            "losses": terms(VARIANTS["kd"]),
            "controls": {variant: terms(VARIANTS[variant]) for variant in ("mild", "usual")},
            "epochs": 2,
        }
    )
    experiment = Experiment(recipe, folder, Progress(quiet=True))
    return {variant: experiment.train_student(0, variant)["train_seconds"] for variant in VARIANTS}


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    torch.manual_seed(0)
    teacher = MODELS["resnet56"].build(100).network
    checkpoint.save_weights(folder / "teacher.safetensors", teacher, {})
    asked, kept = (seconds(folder, cache=cache) for cache in (False, True))
    size = sum(path.stat().st_size for path in folder.glob("answers/*/*.bin"))
print(
    f"{'seconds of training':22}"
    + "".join(f"{variant:>10}" for variant in VARIANTS)
    + f"{'all':>10}"
)
for title, found in (("asked every time", asked), ("answers kept", kept)):
    print(f"{title:22}" + "".join(f"{t:10.1f}" for t in (*found.values(), sum(found.values()))))
print(f"saved {1 - sum(kept.values()) / sum(asked.values()):.0%}; {size / 1e6:.1f} MB are kept")
