"""The examples run as they stand, and teach what they say."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed(name):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def percents(text):
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


@pytest.mark.slow
def test_a_topological_term_in_a_loop_of_ones_own():
    lines = printed("topological_loss.py").splitlines()
    learned = [float(re.search(r"cross-entropy ([\d.]+)", line)[1]) for line in lines]
    assert len(lines) == 10
    assert learned[-1] < 0.7 * learned[0]


@pytest.mark.slow
def test_a_plain_loop():
    teacher, alone, *taught = percents(printed("plain_loop.py"))
    assert teacher > max(alone, *taught) > 50


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
def test_a_hugging_face_trainer():
    teacher, student = percents(printed("hugging_face_trainer.py").split("teacher:")[-1])
    assert teacher > 80
    assert student > 50


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("lightning"), reason="needs lightning")
def test_a_lightning_module():
    teacher, student = percents(printed("lightning_module.py"))
    assert teacher > 80
    assert student > 50


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm")
def test_a_loop_of_timm():
    teacher, student = percents(printed("timm_loop.py").replace(" %", "%"))
    assert teacher > 80
    assert student > 50
