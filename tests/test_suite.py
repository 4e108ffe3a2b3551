"""A test that kills its process or hangs fails the suite, and the suite ends."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FAULTS = {
    "aborts": "os.abort()",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "waits for itself": "lock.acquire()",
    "loops": "while True: pass",
    "never returns from C": "ctypes.CDLL(None).pause()",
    "never returns from C and keeps the interpreter": "ctypes.PyDLL(None).pause()",
}
HANGING = [fault for fault in FAULTS if fault not in ("aborts", "is killed")]

BAD = """
import ctypes, os, signal, threading

lock = threading.Lock()


def wait_in_another_thread(ready):
    ready.set()
    lock.acquire()


def test_before():
    lock.acquire()
    ready = threading.Event()
    threading.Thread(target=wait_in_another_thread, args=[ready], daemon=True).start()
    ready.wait()


def test_bad():
    {fault}


def test_after():
    pass
"""


def options(target):
    """Returns the options that `make` passes to pytest."""
    if shutil.which("make") is None or not (ROOT / "Makefile").exists():
        pytest.skip("there is no make, or no Makefile")
    printed = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    ).stdout
    (command,) = [line for line in printed.splitlines() if "bin/pytest" in line]
    return shlex.split(command)[1:]


def run(folder, fault, *options, workers):
    """Runs a suite of eight files as this project's own; the first one contains the fault."""
    (folder / "test_0.py").write_text(BAD.format(fault=FAULTS[fault]), encoding="utf-8")
    for number in range(1, 8):
        path = folder / f"test_{number}.py"
        path.write_text("def test_good():\n    pass\n", encoding="utf-8")
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", folder]
    return subprocess.run(
        [*command, "-o", "faulthandler_timeout=2", *options, folder],
        env=environment | {"PYTEST_XDIST_AUTO_NUM_WORKERS": str(workers)},
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=200,
        check=False,
    )


def cases(faults, quick):
    return [pytest.param(f, marks=() if f in quick else pytest.mark.slow) for f in faults]


@pytest.mark.parametrize(("target", "workers"), [("test", 2), ("slow", 1)])
@pytest.mark.parametrize("fault", cases(FAULTS, quick=["aborts", "waits for itself"]))
def test_a_fault_is_named_and_ends_the_suite(tmp_path, target, workers, fault):
    done = run(tmp_path, fault, *options(target), workers=workers)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert re.search(r"worker 'gw\d' crashed while running 'test_0.py::test_bad'", done.stdout)
    if fault in HANGING:
        assert "Timeout (0:00:02)!" in done.stderr
        assert "in test_bad" in done.stderr
        assert "in wait_in_another_thread" in done.stderr


@pytest.mark.parametrize("fault", cases(["aborts", *HANGING], quick=["waits for itself"]))
def test_a_fault_ends_the_run_of_one_file(tmp_path, fault):
    done = run(tmp_path, fault, workers=1)
    assert done.returncode != 0
    assert "in test_bad" in done.stderr
    assert "in wait_in_another_thread" in done.stderr
