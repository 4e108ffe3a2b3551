"""One epoch of every pair of the public benchmark, by the real command, on some of CIFAR-100."""

import json
import subprocess
import sys

import pytest
import torch

from topkd.config import recipe
from topkd.models import MODELS, checkpoint

PAIRS = [
    name
    for name in recipe.names()
    if name.startswith("cifar100/") and recipe.load(name).epochs == 240 and "teachers" not in name
]


def test_there_are_the_thirteen_pairs_of_the_benchmark():
    assert len(PAIRS) == 13
    assert {recipe.load(name).batch_size for name in PAIRS} == {64}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_trained_by_the_real_command(name, shared, tmp_path):
    read = recipe.load(name)
    torch.manual_seed(0)
    path = tmp_path / "teacher.safetensors"
    checkpoint.save_weights(path, MODELS[read.teacher.model].build(100).network, {})
    changes = [
        f"data.root={shared('data/cifar100')}",
        "data.validation=0.003",
        "data.limit=512",
        f"teacher.checkpoint={path}",
        "epochs=1",
        "threads=1",
    ]
    if any(term.options.get("via") == "ripsnet" for term in read.losses):
        changes.append("losses.topkd.training={passes: 1, epochs: 2}")
    command = [sys.executable, "-m", "topkd", "student", name, *changes, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(
        (tmp_path / name / "kd+topkd/seed0/result.json").read_text(encoding="utf-8")
    )
    assert result["eval_split"] == "validation"
    assert 0 <= result["last"]["top1"] <= 100
    lines = (
        (tmp_path / name / "kd+topkd/seed0/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert json.loads(lines[0])["losses"].keys() == {"ce", "kd", "topkd"}
