"""Kernels work without a cache: they are compiled again, and one line says so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import topkd
from topkd.topology import rips, ultrametric

IMPORTS = """
import os, resource, shutil
import numpy as np, torch
import topkd.data.augment
from topkd.topology import _kernels, rips, ultrametric
"""
# The hypotenuse of a triangle of sides 3 and 4.
LENGTH = """
length, points = np.empty((1, 1)), np.array([[[0.0, 0.0], [3.0, 4.0]]])
_kernels.lengths(points, np.array([[[0, 1]]]), length)
print(topkd.__file__, length.item())
"""
FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))"  # as on a disk that is full
REMOVED = 'shutil.rmtree(os.environ["NUMBA_CACHE_DIR"]); open(os.environ["NUMBA_CACHE_DIR"], "wb")'

if sys.platform == "win32":
    pytest.skip("Windows finds the user's folders by itself", allow_module_level=True)


@pytest.fixture
def installed(tmp_path):
    """An environment with a copy of the package in which not even root can write."""
    source, copy = Path(topkd.__file__).parent, tmp_path / "topkd"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in {path.parent for path in copy.rglob("*.py")}:
        (folder / "__pycache__").touch()  # a file, where a folder would be made
    (tmp_path / "home").touch()
    homes = {"HOME": tmp_path / "home", "XDG_CACHE_HOME": tmp_path / "home/cache"}
    there = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA")}
    return {**there, **{k: str(v) for k, v in homes.items()}, "PYTHONPATH": str(tmp_path)}


def run(environment, *lines):
    """Returns what the lines print, after the path of the package, and what they warn of."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([IMPORTS, *lines])],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, *numbers = done.stdout.split()
    assert Path(where).is_relative_to(environment["PYTHONPATH"])
    return [float(number) for number in numbers], done.stderr.splitlines()


def test_without_a_folder_that_can_be_written_there_is_one_warning(installed):
    found, (warning,) = run(installed, LENGTH)
    assert found == [5]
    assert "set NUMBA_CACHE_DIR" in warning


@pytest.mark.parametrize(
    "then", [FULL, pytest.param(REMOVED, marks=pytest.mark.slow)], ids=["full", "removed"]
)
def test_cache_that_cannot_be_written_any_more_is_one_warning(installed, tmp_path, then):
    cached = {**installed, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    found, (warning,) = run(cached, then, LENGTH)
    assert found == [5]
    assert "set NUMBA_CACHE_DIR" in warning


@pytest.mark.slow
def test_cache_that_can_be_written_is_used(installed, tmp_path):
    cached = {**installed, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for then in ("", FULL):  # the second time, nothing needs to be written
        assert run(cached, then, LENGTH) == ([5], [])
    assert list(tmp_path.glob("cache/**/*lengths*.nbc"))


@pytest.mark.slow
def test_kernels_without_a_cache_compute_the_same(installed):
    points = torch.randn(1, 40, 3, dtype=torch.float64)
    diagrams = rips(points, max_dim=1)
    expected = [*diagrams.deaths[0].tolist(), ultrametric(points[0], 2 * points[0]).item()]
    found, (_,) = run(
        installed,
        f"points = torch.tensor({points.tolist()}, dtype=torch.float64)",
        "length = ultrametric(points[0], 2 * points[0]).item()",
        "print(topkd.__file__, *rips(points, max_dim=1).deaths[0].tolist(), length)",
    )
    assert found == expected
