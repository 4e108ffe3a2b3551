"""Experiment trackers: every number reaches them, and what is not there is said."""

import pytest
from accelerate import tracking

from topkd.training.tracking import Trackers, check_trackers

ENTRY = {
    "epoch": 3,
    "train_top1": 50.0,
    "losses": {"ce": 1.0, "kd": 2.0},
    "warnings": ["kd carries 0 %"],
}


class Recording:
    """A tracker of Accelerate that keeps what it gets."""

    requires_logging_directory = False
    made: list = []

    def __init__(self, run_name):
        self.run_name, self.logged, self.is_finished = run_name, [], False
        Recording.made.append(self)

    def log(self, values, step=None):
        self.logged.append((step, values))

    def finish(self):
        self.is_finished = True


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr(Recording, "made", [])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recording", Recording)
    return Recording.made


def test_every_number_of_an_epoch_is_logged(recording, tmp_path):
    trackers = Trackers(["recording"], tmp_path / "digits/kd/seed0")
    trackers.log(ENTRY)
    trackers.finish()
    (tracker,) = recording
    assert tracker.run_name == "digits/kd/seed0"
    assert tracker.logged == [
        (3, {"epoch": 3, "train_top1": 50.0, "losses/ce": 1.0, "losses/kd": 2.0})
    ]
    assert tracker.is_finished


def test_a_tracker_that_is_named_twice_is_started_once(recording, tmp_path):
    Trackers(["recording", "recording"], tmp_path)
    assert len(recording) == 1


def test_without_names_nothing_is_tracked(tmp_path):
    Trackers([], tmp_path).log(ENTRY)
    assert not list(tmp_path.iterdir())


def test_unknown_trackers_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"there is no tracker 'wandbb'; did you mean 'wandb'"):
        check_trackers(["wandbb"])


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    class Missing(Recording):
        def __init__(self, run_name):
            raise ImportError("no module named wandb")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Missing)
    with pytest.raises(ModuleNotFoundError, match="tracker wandb needs its package: pip install"):
        Trackers(["wandb"], tmp_path)
