"""Several processes that train one network, started by the documented command with nothing set."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from topkd._io.progress import Progress
from topkd._runtime import processes
from topkd._runtime.sync_batchnorm import synchronize
from topkd.models import MODELS, checkpoint
from topkd.training.evaluate import evaluate_file

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
RECIPE = {
    "name": "mine",
    "data": {"name": "digits", "limit": 256},
    "student": {"model": "resnet8x0.25"},
    "losses": [{"name": "ce"}],
    "epochs": 3,
    "batch_size": 32,
    "threads": 1,
    "precision": "float32",
}
FILES = ("student.safetensors", "examples.safetensors")
LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_", "ACCELERATE", "OMP_NUM_THREADS", "TORCHELASTIC")


def environment():
    """That of a shell in which nothing was set for several processes."""
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}


def write(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "mine.yaml").write_text(yaml.safe_dump(RECIPE | changes), encoding="utf-8")


def start(count, folder, *words, program=("-m", "topkd", "run", "mine.yaml")):
    return subprocess.Popen(
        [*TORCHRUN, str(count), *program, *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def finish(run):
    printed, _ = run.communicate(timeout=240)
    return run.returncode, printed


def until(run, sign, stop):
    """Reads what a run prints and stops it when a sign is there; returns all that was printed."""
    printed = ""
    for line in run.stdout:
        printed += line
        if sign in line:
            stop()
    return printed


def run_of(folder):
    return folder / "runs/mine/ce/seed0"


def result_of(folder):
    return json.loads((run_of(folder) / "result.json").read_text(encoding="utf-8"))


def assert_same_run(a, b):
    for name in FILES:
        assert (run_of(a) / name).read_bytes() == (run_of(b) / name).read_bytes(), name
    for key in ("last", "best", "processes"):
        assert result_of(a)[key] == result_of(b)[key]


def test_documented_command_trains_one_network(tmp_path):
    write(tmp_path, epochs=1)
    status, printed = finish(start(2, tmp_path))
    assert status == 0, printed
    assert result_of(tmp_path)["processes"] == 2
    assert printed.count("epoch 1/1") == 1
    alone = evaluate_file(run_of(tmp_path), None, (), Progress(quiet=True))
    for metric, value in result_of(tmp_path)["last"].items():  # of both halves of the test images
        assert value == pytest.approx(alone[metric], rel=1e-5), metric


def test_a_process_that_would_train_alone_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: type("", (), {"num_processes": 1}))
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but .* with 0 others"):
        processes.accelerator()


@pytest.mark.parametrize(("total", "count"), [(10, 1), (10, 2), (10, 3), (2, 3), (1, 2)])
def test_shares_cover_all_items_once_and_are_equally_many(monkeypatch, total, count):
    monkeypatch.setattr(processes, "count", lambda: count)
    shares = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(processes.share(total))
    assert len({len(share) for share in shares}) == 1
    assert torch.equal(torch.cat(shares)[:total], torch.arange(total))


SPY = """
import os, sys, torch
from topkd.cli import app
from topkd.training.trainer import Trainer
rank, run, step, seen = os.environ["RANK"], Trainer.run, Trainer.step, []
def spied_step(self, batch, *args, **options):
    seen.append(batch.index.tolist())
    return step(self, batch, *args, **options)
def spied_run(self, folder):
    history = run(self, folder)
    torch.save({"weights": self.student.network.state_dict(), "seen": seen}, f"rank{rank}.pt")
    return history
Trainer.step, Trainer.run = spied_step, spied_run
sys.argv = ["topkd", "run", "mine.yaml"]
app.main()
"""


@pytest.mark.slow
def test_processes_have_the_same_weights_and_halves_of_the_data(tmp_path):
    write(tmp_path, epochs=1)
    (tmp_path / "spy.py").write_text(SPY, encoding="utf-8")
    status, printed = finish(start(2, tmp_path, program=("spy.py",)))
    assert status == 0, printed
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    halves = [{index for batch in each["seen"] for index in batch} for each in (first, second)]
    assert [len(half) for half in halves] == [128, 128]
    assert halves[0].isdisjoint(halves[1])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_with_a_killed_process_ends_and_resumes_to_the_same_bits(tmp_path, victim):
    teacher = tmp_path / "teacher.safetensors"
    checkpoint.save_weights(teacher, MODELS["resnet8x0.25"].build(10).network, {})
    changes = {
        "data": RECIPE["data"] | {"limit": None},
        "teacher": {"model": "resnet8x0.25", "checkpoint": str(teacher)},
        "losses": [{"name": "ce"}, {"name": "crd", "weight": 0.1}],  # keeps a memory of its images
        "epochs": 6,
    }
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        write(folder, **changes)
    assert finish(start(2, folders[0]))[0] == 0
    with start(2, folders[1]) as run:
        printed = until(run, "epoch 2/6", lambda: os.kill(rank_of(run, victim), signal.SIGKILL))
    assert run.returncode == 1
    assert not (run_of(folders[1]) / "result.json").exists()
    assert "topkd" in printed
    said = [line for line in printed.splitlines() if line.startswith("topkd")]
    assert re.search(r"another process has exited|terminated", "\n".join(said)), printed
    ours = [line for line in printed.splitlines() if "/topkd/" in line]
    assert ours == [], "a traceback of ours"
    status, printed = finish(start(2, folders[1]))
    assert status == 0, printed
    assert "epoch 1/6" not in printed
    assert_same_run(*folders)


def rank_of(run, rank):
    """Finds the process of a rank among the children of torchrun."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    if not children.exists():
        pytest.skip("this system does not list the children of a process")
    for child in children.read_text(encoding="utf-8").split():
        told = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in told:
            return int(child)
    raise AssertionError(f"no child of rank {rank}")


@pytest.mark.slow
def test_another_number_of_processes_is_refused(tmp_path):
    write(tmp_path, data=RECIPE["data"] | {"limit": None}, epochs=6)
    with start(2, tmp_path) as run:
        until(run, "epoch 2/6", run.terminate)
    done = subprocess.run(
        [sys.executable, "-m", "topkd", "run", "mine.yaml"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "was trained with 2 processes, now there are 1" in done.stderr


FROM_ANOTHER_FOLDER = """
import os, sys
folder = sys.argv[1].format(os.environ["RANK"])
os.makedirs(folder, exist_ok=True)
os.chdir(folder)
from topkd.cli import app
sys.argv = ["topkd", "run", "../mine.yaml"]
app.main()
"""


@pytest.mark.slow
def test_processes_with_separate_disks_resume(tmp_path):
    teacher = RECIPE | {"name": "teacher", "epochs": 1}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(teacher), encoding="utf-8")
    topkd = {"name": "topkd", "via": "ripsnet", "training": {"epochs": 10}}
    write(
        tmp_path,
        teacher={"model": "resnet8x0.25", "recipe": "../teacher.yaml"},
        losses=[{"name": "ce"}, topkd],
    )
    program = tmp_path / "run.py"
    program.write_text(FROM_ANOTHER_FOLDER, encoding="utf-8")
    status, printed = finish(start(2, tmp_path, "shared", program=(program.name,)))
    assert status == 0, printed
    with start(2, tmp_path, "disk{}", program=(program.name,)) as run:
        until(run, "student seed 0: epoch 2/3", run.terminate)
    status, printed = finish(start(2, tmp_path, "disk{}", program=(program.name,)))
    assert status == 0, printed
    assert not (tmp_path / "disk1/runs").exists()
    assert_same_run(tmp_path / "shared", tmp_path / "disk0")


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(144)
    ).double()


def images():
    return torch.randn(12, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def value(made):
    return (made.sin() * torch.linspace(0, 1, made.shape[1], dtype=made.dtype)).mean()


def half(rank, folder):
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    network = small()
    synchronize(network)
    shared = DistributedDataParallel(network)
    value(shared(images()[6 * rank : 6 * rank + 6])).backward()
    found = [weight.grad for weight in network.parameters()]
    torch.save((found, dict(network.named_buffers())), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_synchronized_normalization_is_that_of_one_process(tmp_path):
    multiprocessing.spawn(half, (str(tmp_path),), nprocs=2)
    alone = small()
    value(alone(images())).backward()
    for rank in (0, 1):
        found, buffers = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for grad, weight in zip(found, alone.parameters(), strict=True):
            torch.testing.assert_close(grad, weight.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(buffers, dict(alone.named_buffers()), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_two_processes_with_synchronized_normalization_equal_one(tmp_path):
    folders = [tmp_path / "two", tmp_path / "one"]
    write(folders[0], epochs=1, sync_batchnorm=True)
    write(folders[1], epochs=1, batch_size=64)
    for folder, count in zip(folders, (2, 1), strict=True):
        status, printed = finish(start(count, folder))
        assert status == 0, printed
    from safetensors.torch import load_file

    two, one = (load_file(run_of(folder) / "student.safetensors") for folder in folders)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_normalization_of_its_own_cannot_be_synchronized():
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match=r"the module '1' is a Own"):
        synchronize(nn.Sequential(nn.Conv2d(3, 4, 3), Own(4)))
