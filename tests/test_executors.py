"""Executors: crashes, limits, folders that are not shared, and the same weights from all."""

import os
import re
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from topkd._io.progress import Progress
from topkd.cli.commands import study as commands
from topkd.config import study as studies
from topkd.studies.executors import EXECUTORS, Executor, Slurm, create
from topkd.studies.executors.base import ATTEMPTS
from topkd.studies.executors.shared import Remote, Shared
from topkd.studies.executors.task import CRASHED, DONE, INVALID, LATE, UNSHARED, Exit, Task
from topkd.studies.run import run

QUIET = Progress(quiet=True)
NETWORKS = """
import os
import signal
from pathlib import Path

from torch import nn


class Fragile(nn.Conv2d):
    def __init__(self, name, most):
        super().__init__(3, 8, 3)
        self.name, self.most = name, most

    def forward(self, images):
        killed = Path(f"killed-{self.name}")
        times = len(killed.read_text()) if killed.exists() else 0
        trained = any(Path("runs/study/main", self.name).rglob("latest.json"))
        if trained and times < self.most:
            killed.write_text("x" * (times + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


def network(name, most, classes):
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    return nn.Sequential(Fragile(name, most), nn.ReLU(), *pooled)


def fragile(classes):
    return network("kd", 1, classes)


def doomed(classes):
    return network("doomed", 99, classes)
"""
TEACHER = {
    "data": {"name": "digits", "limit": 100},
    "student": {"model": "resnet8x0.25"},
    "losses": [{"name": "ce"}],
    "epochs": 1,
    "batch_size": 32,
    "threads": 1,
}
RECIPE = TEACHER | {
    "student": {"model": "networks:fragile"},
    "teacher": {"model": "resnet8x0.25", "recipe": "teacher.yaml"},
    "losses": [{"name": "ce"}, {"name": "kd"}],
    "epochs": 2,
}
STUDY = {
    "recipe": "recipe.yaml",
    "baseline": "kd",
    "variants": {
        "kd": [{"name": "ce"}, {"name": "kd"}],
        "doomed": {"set": {"student.model": "networks:doomed"}},
    },
    "seeds": 0,
}


def written(folder):
    """Writes a study whose first job is killed once, and whose second job in every attempt."""
    folder.mkdir(exist_ok=True)
    (folder / "networks.py").write_text(NETWORKS, encoding="utf-8")
    for name, tree in (("teacher", TEACHER), ("recipe", RECIPE), ("study", STUDY)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder


def call(folder, *options, status):
    """Runs the study in a folder on the command line."""
    command = [sys.executable, "-m", "topkd", "study", "run", "study.yaml", "--quiet", *options]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def weights(folder):
    (path,) = (folder / "runs/study/main/kd").rglob("student.safetensors")
    return path.read_bytes()


def kills(folder, name):
    return len((folder / f"killed-{name}").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Weights of a run that nothing interrupts."""
    folder = written(tmp_path_factory.mktemp("executors") / "whole")
    (folder / "killed-kd").write_text("x", encoding="utf-8")
    _, err = call(folder, "--threads", "1", status=1)
    assert kills(folder, "doomed") == ATTEMPTS
    (failed,) = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert failed == "failed: main/doomed seed 0: killed by SIGKILL"
    return weights(folder)


@pytest.mark.slow
def test_a_job_killed_on_ray_is_retried_to_the_same_bits(reference, tmp_path):
    pytest.importorskip("ray")
    folder = written(tmp_path / "ray")
    out, err = call(folder, "--on", "ray", status=1)
    assert out == "1 of 2 jobs are done\n"
    assert [line for line in err.splitlines() if line.startswith("failed: ")] == [
        "failed: main/doomed seed 0: WorkerCrashedError: The worker died unexpectedly while "
        "executing this task. Check python-core-worker-*.log files for more information."
    ]
    assert (kills(folder, "kd"), kills(folder, "doomed")) == (1, ATTEMPTS)
    assert weights(folder) == reference
    assert {path.name for path in (folder / "runs/logs/study").iterdir()} == {
        "main.log",
        "main-kd-seed-0.log",
        "main-doomed-seed-0.log",
    }


@pytest.mark.slow
def test_a_job_killed_under_submitit_is_retried_to_the_same_bits(reference, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 0)
    monkeypatch.chdir(written(tmp_path / "submitit"))
    outcome = run(studies.load("study.yaml"), Path("runs"), Slurm(cluster="local"), QUIET)
    assert [ended.job.title for ended in outcome.failed] == ["main/doomed seed 0"]
    assert (kills(Path(), "kd"), kills(Path(), "doomed")) == (1, ATTEMPTS)
    assert weights(Path()) == reference


@pytest.mark.slow
def test_a_job_interrupted_by_slurm_is_queued_again_to_the_same_bits(
    reference, tmp_path, monkeypatch
):
    """A signal announces the time limit or preemption; submitit then asks for a requeue."""
    submitit = pytest.importorskip("submitit")
    announced = f"signal.SIG{submitit.JobEnvironment.USR_SIG}"
    monkeypatch.chdir(written(tmp_path / "requeued"))
    Path("networks.py").write_text(NETWORKS.replace("signal.SIGKILL", announced), encoding="utf-8")
    plan = studies.load("study.yaml").only(["kd"])
    assert run(plan, Path("runs"), Slurm(cluster="local"), QUIET).failed == []
    assert kills(Path(), "kd") == 1
    log = Path("runs/logs/study/main-kd-seed-0.log").read_text(encoding="utf-8")
    assert "Requeued job" in log
    assert weights(Path()) == reference


def test_after_the_time_limit_no_job_starts(tmp_path):
    folder = written(tmp_path / "limited")
    out, err = call(folder, "--limit-hours", "0", status=0)
    first, second = out.splitlines()
    assert first == "0 of 2 jobs are done"
    assert second.startswith("2 jobs were not started, because of --limit-hours; rerun")
    assert not list((folder / "runs").rglob("*.log"))


# --- What all executors share --------------------------------------------------------------------


class Inline(Executor):
    """Executes tasks in this process, as if each was on another machine."""

    def __init__(self, shared=None, until=None, starts=None):
        super().__init__(None, 1, until)
        self.shared, self.ended, self.starts = shared, [], starts

    def start(self, tasks):
        self.until = self.starts or self.until  # tasks that wait in a queue begin later
        remotes = [Remote(task, self.shared, self.until) for task in tasks]
        self.ended += [(remote, remote()) for remote in remotes]
        return remotes

    def wait(self, handles):
        ended, self.ended = self.ended, []
        return ended

    def stop(self, handles):
        pass


def folders(path):
    (path / "token").touch()
    return Shared(path, path / "token", path)


def task(path, work):
    return Task("main/kd seed 0", work, path / "log", 1)


def fail(error):
    print("about to fail")
    os.write(1, b"so does a library in C\n")
    raise error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("wrong"), INVALID),
        (OSError("wrong"), INVALID),
        (ImportError("wrong"), INVALID),
        (RuntimeError("wrong"), CRASHED),
    ],
)
def test_only_crashes_are_worth_another_attempt(tmp_path, error, status):
    begun = task(tmp_path, partial(fail, error))
    end = begun.execute()
    assert end == Exit(status, f"exit status {status}")
    lines = begun.error(end).splitlines()
    assert lines[0] == f"exit status {status}"
    assert "so does a library in C" in begun.log.read_text(encoding="utf-8")
    assert lines[-1].endswith("wrong")
    assert ("Traceback" in begun.log.read_text(encoding="utf-8")) == (status == CRASHED)
    executor = Inline(folders(tmp_path))
    ((_, _, problem),) = executor._ended([begun])
    assert problem.splitlines()[0] == f"exit status {status}"
    attempts = begun.log.read_text(encoding="utf-8").count("about to fail") - 1
    assert attempts == (ATTEMPTS if status == CRASHED else 1)


def test_a_task_that_is_done_has_no_error(tmp_path):
    begun = task(tmp_path, partial(print, "done"))
    assert begun.execute().status == DONE
    assert begun.error(Exit.of(DONE)) is None


def test_a_machine_without_the_folders_ends_the_study_with_one_line(tmp_path):
    begun, shared = task(tmp_path, partial(print)), folders(tmp_path)
    for lacking, name in (
        (Shared(tmp_path, tmp_path / "other", tmp_path), tmp_path),
        (Shared(tmp_path, shared.token, tmp_path / "cwd"), tmp_path / "cwd"),
    ):
        assert Remote(begun, lacking, None)().status == UNSHARED
        with pytest.raises(FileNotFoundError, match=f"does not share the folder {name}: .*"):
            list(Inline(lacking)._ended([begun]))
    assert not begun.log.exists()


def test_a_task_that_waited_in_a_queue_does_not_begin_after_the_time_limit(tmp_path):
    begun = task(tmp_path, partial(print))
    assert Remote(begun, folders(tmp_path), 1.0)().status == LATE
    assert list(Inline(folders(tmp_path), starts=1.0)._ended([begun])) == []
    assert not begun.log.exists()


# --- Options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rai", {}, "--on: there is no executor 'rai'; did you mean 'ray'?"),
        ("local", {"gpus": 1}, "--gpus is for --on ray, not for --on local"),
        ("ray", {"slurm": ["time=1"]}, "--slurm is for --on slurm, not for --on ray"),
        ("local", {"jobs": 0}, "--jobs must be at least 1, got 0"),
        ("ray", {"gpus": 1.5}, "--gpus must be a fraction of 1 or a whole number, got 1.5"),
        ("slurm", {"slurm": ["time=1:30:00"]}, "--slurm time: expected minutes, got '1:30:00'"),
        ("slurm", {"slurm": ["=3"]}, "--slurm: expected KEY=VALUE, got '=3'"),
    ],
)
def test_what_is_wrong_with_an_option_is_one_line(name, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        create(name, options)


def test_every_executor_is_in_the_help():
    help_of_on = commands.run_study.__annotations__["on"]
    assert all(f"`{name}`" in str(help_of_on) for name in EXECUTORS)


def test_options_that_are_not_given_keep_their_defaults():
    assert create("local", {"jobs": None, "threads": None, "gpus": None}).jobs == 1


def begins(executor, folder):
    with executor.session(folder):
        pass


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named_with_its_command(name, package, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.delitem(os.environ, "RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'topkd\[{name}\]'"):
        begins(create(name, {}), tmp_path)


def test_a_cluster_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConnectionError, match="--address: no Ray cluster at 127.0.0.1:1: .*"):
        begins(create("ray", {"address": "127.0.0.1:1"}), tmp_path)
    with pytest.raises(ValueError, match="--address: expected HOST:PORT or auto, got 'head'"):
        begins(create("ray", {"address": "head"}), tmp_path)


def test_a_machine_without_slurm_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--on slurm: this machine has no sbatch"):
        begins(create("slurm", {}), tmp_path)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A stand-in for SLURM that keeps the last script, and rejects one partition."""
    pytest.importorskip("submitit")
    kept = tmp_path / "script"
    text = f"""#!/bin/sh
if grep -q 'partition=none' "$1"; then echo 'sbatch: error: invalid partition' >&2; exit 1; fi
cp "$1" {kept}
echo Submitted batch job 7
"""
    for name in ("sbatch", "srun", "scancel"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return kept


def test_options_reach_slurm_in_its_own_words(sbatch, tmp_path):
    options = ["partition=gpu", "--gpus-per-node=1", "time=120", "exclusive"]
    executor = Slurm(2, threads=3, slurm=options)
    with executor.session(tmp_path / "out"):
        jobs = executor.start([task(tmp_path, partial(print))] * 5)
    assert len(jobs) == 5
    lines = {
        line.removeprefix("#SBATCH --")
        for line in sbatch.read_text(encoding="utf-8").splitlines()
        if line.startswith("#SBATCH")
    }
    assert lines >= {
        "array=0-4%2",
        "partition=gpu",
        "gpus-per-node=1",
        "time=120",
        "exclusive",
        "cpus-per-task=3",
        "job-name=topkd",
    }


def test_slurm_decides_how_many_jobs_run_unless_it_is_told(sbatch, tmp_path):
    executor = Slurm()
    with executor.session(tmp_path / "out"):
        executor.start([task(tmp_path, partial(print))] * 300)
    (line,) = re.findall(r"--array=(\S+)", sbatch.read_text(encoding="utf-8"))
    first, _, most = line.partition("%")
    assert first == "0-299"
    assert int(most or 300) >= 300


def test_what_slurm_rejects_is_one_line(sbatch, tmp_path):
    executor = Slurm(slurm=["partition=none"])
    with (
        executor.session(tmp_path / "out"),
        pytest.raises(ValueError, match="^--on slurm: sbatch: error: invalid partition$"),
    ):
        executor.start([task(tmp_path, partial(print))])
