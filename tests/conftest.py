"""What all tests share: one thread, random numbers that repeat, files that may be absent."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings

SHARED = Path(__file__).parents[2] / "shared"

settings.register_profile("topkd", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("topkd")


# torch is imported by the fixtures: the process that only hands out tests does without.
@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)  # xdist runs one process on each core already


@pytest.fixture(autouse=True)
def _same_random_numbers():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def call(monkeypatch, capfd):
    """Calls the command line and returns its status, output and messages."""
    from topkd.cli import app

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["topkd", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            app.main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture
def shared():
    """Finds a file that lies beside the checkout, or skips the test where it does not."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{path} is absent")
        return path

    return find
