"""The real command line: what it prints, what it refuses, and how."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from topkd._runtime import processor
from topkd.cli import app, options
from topkd.config import recipe
from topkd.evaluation import metrics
from topkd.losses import LOSSES
from topkd.training.trainer import Trainer

TINY = {
    "data": {"name": "digits", "limit": 200},
    "teacher": {"model": "resnet8", "recipe": "teacher.yaml"},
    "student": {"model": "resnet8x0.25"},
    "losses": [
        {"name": "ce"},
        {"name": "kd"},
        {"name": "topkd", "via": "ripsnet", "training": {"passes": 1, "epochs": 1}},
    ],
    "controls": {"kd": [{"name": "ce"}, {"name": "kd"}]},
    "epochs": 1,
    "batch_size": 32,
}
TEACHER = {
    "data": {"name": "digits"},
    "student": {"model": "resnet8"},
    "losses": [{"name": "ce"}],
    "epochs": 1,
    "batch_size": 32,
}


@pytest.fixture
def call(call, monkeypatch, tmp_path):
    """Calls the command line in a folder with two recipes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(TEACHER), encoding="utf-8")
    return call


def test_stages_one_by_one(call, tmp_path):
    status, out, err = call("teacher", "tiny.yaml")
    assert status == 0, err
    assert out.split() == ["teacher:", "runs/teacher-limit-200/ce/seed0/student.safetensors"]
    status, out, err = call("ripsnet", "tiny.yaml")
    assert status == 0, err
    assert "R² " in err
    assert out.startswith("fitted to the teacher: runs/tiny/ripsnet-")
    status, out, _ = call("student", "tiny.yaml", "--variant", "kd", "--seeds", "0", "1")
    assert status == 0
    assert (tmp_path / "runs/tiny/kd/seed1/result.json").exists()
    runs = [line.split()[:2] for line in out.splitlines() if line.startswith("kd ")]
    assert runs == [["kd", "0"], ["kd", "1"], ["kd", "mean"], ["kd", "±"]]

    run = "runs/tiny/kd/seed0"
    status, out, _ = call("evaluate", run, "--json")
    result = json.loads(out)
    stored = json.loads((tmp_path / run / "result.json").read_text(encoding="utf-8"))
    assert status == 0
    assert result["top1"] == pytest.approx(stored["last"]["top1"])
    status, out, _ = call("evaluate", run)
    assert f"top-1              {result['top1']:.2f} %" in out

    status, out, _ = call("report", "runs/tiny", "--markdown")
    assert status == 0
    assert "| kd" in out


@pytest.mark.slow
def test_run_ends_with_a_report_and_does_nothing_twice(call, tmp_path):
    status, out, err = call("run", "tiny.yaml")
    assert status == 0, err
    assert "report: runs/tiny/report.html" in out
    assert "<html" in (tmp_path / "runs/tiny/report.html").read_text(encoding="utf-8")
    status, again, err = call("run", "tiny.yaml")
    assert again == out
    assert "epoch" not in err


def test_recipes_are_listed_by_their_folders(call):
    status, out, _ = call("list", "recipes")
    assert status == 0
    group, names = "", []
    for line in out.splitlines():
        if not line.startswith(" ") and line.endswith("/"):
            group = line[:-1]
            continue
        names.append(line.split()[0])
        assert names[-1].rpartition("/")[0] == group
    assert sorted(names) == recipe.names()
    _, out, _ = call("list", "recipes", "--json")
    entries = {entry.pop("name"): entry for entry in json.loads(out)}
    assert sorted(entries) == recipe.names()
    about = recipe.about("cifar100/teachers/resnet56")
    assert entries["cifar100/teachers/resnet56"] == {"about": about, "group": "cifar100/teachers"}


def test_catalogs(call):
    for what, name in (("models", "resnet20"), ("losses", "topkd"), ("data", "cifar100")):
        status, out, _ = call("list", what, "--json")
        assert status == 0
        assert name in [entry["name"] for entry in json.loads(out)]
    _, out, _ = call("list", "losses")
    (line,) = [line for line in out.splitlines() if line.startswith("pkt ")]
    info = LOSSES["pkt"].info
    for told in (info.compares, info.paper, info.cost):
        assert told in line
    _, out, _ = call("list", "models")
    for kind in ("torchvision:NAME", "timm:NAME", "MODULE:CALLABLE"):
        assert kind in out.splitlines()[-1]


def test_a_published_teacher_is_not_trained(call, tmp_path):
    teacher = {"model": "torchvision:resnet18", "pretrained": True}
    (tmp_path / "published.yaml").write_text(
        yaml.safe_dump(TINY | {"teacher": teacher}), encoding="utf-8"
    )
    status, out, _ = call("teacher", "published.yaml")
    assert status == 0
    assert out == "teacher: torchvision:resnet18, with published weights; nothing to train\n"
    assert not (tmp_path / "runs").exists()


def test_the_doctor_says_what_to_change(call, tmp_path):
    status, out, err = call("doctor", "tiny.yaml", "--json")
    assert status == 0, err  # a teacher that is not trained yet is no fault of the recipe
    assert [set(finding) for finding in json.loads(out)] == [
        {"part", "found", "verdict", "advice"} for _ in range(4)
    ]
    assert json.loads(out)[-1]["verdict"] == "warning"
    changes = ("teacher.recipe=null", "teacher.checkpoint=absent-[bold].pth")
    status, out, _ = call("doctor", "tiny.yaml", *changes)
    assert status == 1
    assert out.splitlines()[-1] == "errors to fix before training: 1"
    assert max(map(len, out.splitlines())) <= 80
    assert "absent-[bold].pth" in "".join(out.split())
    assert not (tmp_path / "runs").exists()


def test_show_copy_check(call, tmp_path):
    _, shown, _ = call("show", "digits", "optimizer.lr=1e-3")
    assert yaml.safe_load(shown)["optimizer"]["lr"] == 1e-3
    status, _, _ = call("copy", "digits", "mine.yaml")
    assert status == 0
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == recipe.text("digits")
    status, out, _ = call("check", "mine.yaml")
    assert (status, out.split(":")[0]) == (0, "mine is valid")
    status, _, err = call("copy", "digits", "mine.yaml")
    assert (status, err) == (2, "topkd: mine.yaml already exists; choose another name\n")


def test_check_warns_of_a_warm_up_that_never_ends(call):
    status, out, _ = call("check", "tiny.yaml", "losses.kd.warmup=20", "epochs=2")
    assert status == 0
    warning = "warning: losses[1]: kd reaches 10% of its weight: warmup 20 does not fit into"
    assert warning in out


def test_env_tells_the_versions(call):
    status, out, _ = call("env", "--json")
    assert status == 0
    told = json.loads(out)
    assert told["torch"] == torch.__version__
    assert told["onednn"] == processor.onednn_version()
    assert told["instruction_set"] == processor.instruction_set()
    assert told["precision"] == ("bfloat16" if processor.computes_bfloat16() else "float32")
    assert told["memory_format"].startswith("channels_last; contiguous_format for")


def test_an_unknown_command_is_corrected(call):
    status, _, err = call("rnu")
    assert status == 2
    assert "Did you mean 'run'?" in err


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "digit"), "there is no recipe 'digit'; did you mean 'digits'?"),
        (("run", "digits", "epoch=3"), "epoch: unknown key; did you mean 'epochs'?"),
        (("check", "tiny.yaml", "losses.kd.temprature=4"), "losses[1].temprature: unknown key"),
        (("check", "tiny.yaml", "losses.kd.wieght=4"), "unknown key; did you mean 'weight'?"),
        (("check", "tiny.yaml", "losses.kd.name=CRD"), "no 'CRD'; did you mean 'crd'?"),
        (("list", "loses"), "there is no catalog 'loses'; did you mean 'losses'?"),
        (("check", "tiny.yaml", "student.model=ResNet8"), "did you mean resnet8"),
        (("check", "tiny.yaml", "student.model=timm:nope"), "`timm.list_models()` lists all"),
        (("check", "tiny.yaml", "losses.4=1"), "there is no '4'; there are ce, kd, topkd"),
        (
            ("check", "methods/resnet56-resnet20/ab", "losses.ce.start=31", "epochs=20"),
            "topkd: losses[1]: ce is never active in 20 epochs (start 31); use a fraction of the "
            "epochs, or more epochs\n",
        ),
        (
            ("run", "tiny.yaml", "losses.kd.start=9", "epochs=2"),
            "topkd: losses[1]: kd is never active in 2 epochs (start 9); use a fraction of the "
            "epochs, or more epochs\n",
        ),
        (("run", "digits", "--seeds", "a"), "--seeds: expected numbers such as 0,1,2 or 0-2"),
        (("run", "digits", "--seeds", "2-0"), "--seeds: '2-0' is empty; give the smaller number"),
        (("run", "digits", "--seeds", "5,2-0"), "--seeds: '2-0' is empty; give the smaller number"),
        (("run", "digits", "--seeds", "0-2,1"), "--seeds: seed 1 appears twice"),
        (("run", "digits", "--seeds", "-1"), "--seeds: expected numbers such as 0,1,2 or 0-2"),
        (("run", "digits", "--seeds", "0-" + "9" * 30), "--seeds: expected at most 10,000 numbers"),
        (("run", "digits", "--seeds", "0-9999999999"), "--seeds: expected at most 10,000 numbers"),
        (("evaluate", "."), "there is no run .: student.safetensors is missing"),
        (("report", "."), "no result.json"),
        (
            ("evaluate", "absent.pth", "--model", "resnet8", "--data", "digits"),
            "no run or file absent.pth",
        ),
        (("evaluate", "evil.pth", "--model", "resnet8", "--data", "digits"), "evil.pth is refused"),
        (("evaluate", "evil.pth"), "evil.pth does not record network and data"),
        (("evaluate", "wrong.pth", "--model", "resnet8", "--data", "digits"), "does not fit"),
        (("teacher", "digits/teacher"), "digits/teacher has no teacher"),
        (
            ("teacher", "cifar100/teachers/resnet20", "data.root=nowhere"),
            "cifar100/teachers/resnet20 has no teacher",
        ),
        (
            ("student", "cifar100/teachers/resnet20", "data.root=nowhere"),
            "nowhere contains neither parquet files",
        ),
    ],
)
def test_what_a_user_can_cause_is_one_clear_message(call, tmp_path, words, message):
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    torch.save({"model": {"conv1.weight": torch.zeros(1)}}, tmp_path / "wrong.pth")
    status, out, err = call(*words)
    assert status == 2
    assert err.startswith("topkd: ")
    assert message in err
    assert "Traceback" not in err + out
    assert not (tmp_path / "pwned").exists()


def test_of_plain_and_averaged_weights_one_is_chosen_and_told(call, tmp_path):
    from topkd.models import MODELS

    plain, averaged = (MODELS["resnet8x0.25"].network(classes=10).state_dict() for _ in "ab")
    torch.save({"state_dict": plain, "state_dict_ema": averaged}, tmp_path / "both.pth")
    words = ("evaluate", "both.pth", "--model", "resnet8x0.25", "--data", "digits", "--json")
    _, first, err = call(*words)
    assert "both.pth: plain weights, under 'state_dict'; the file also has ema ones, under" in err
    _, second, err = call(*words, "--weights", "ema")
    assert "both.pth: ema weights, under 'state_dict_ema'; the file also has plain ones" in err
    assert json.loads(first)["nll"] != json.loads(second)["nll"]
    changes = ("teacher.recipe=null", "teacher.model=resnet8x0.25", "teacher.checkpoint=both.pth")
    _, _, err = call("doctor", "tiny.yaml", *changes, "teacher.weights=ema")
    assert "teacher: ema weights, under 'state_dict_ema'" in err
    _, _, err = call("check", "tiny.yaml", "teacher.weights=ema")
    assert err == "topkd: teacher: weights: ema needs a checkpoint\n"


def test_ctrl_c_says_how_to_go_on(call, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("topkd.training.experiment.Experiment.train_student", interrupt)
    status, _, err = call("student", "tiny.yaml")
    assert status == 130
    assert "rerun the command to resume from the last epoch" in err


def test_no_space_left_is_one_line(call, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    status, _, err = call("student", "teacher.yaml")
    assert status == 2
    assert "runs/teacher/recipe.yaml could not be written: No space left on device" in err


@pytest.mark.parametrize("place", [".", "teacher", "teacher/ce/seed0"])
@pytest.mark.parametrize("when", ["before the first", "before the last", "after the last"])
def test_a_folder_that_is_deleted_meanwhile_is_one_line(call, tmp_path, monkeypatch, place, when):
    train_epoch, computed = Trainer._epoch, metrics.prediction_metrics
    folder = tmp_path / "runs" / place

    def epoch(self, number, advance):
        if number == {"before the first": 1, "before the last": 2}.get(when):
            shutil.rmtree(folder)
        entry = train_epoch(self, number, advance)
        if number == 2 and when == "after the last":
            monkeypatch.setattr("topkd.training.outcome.metrics.prediction_metrics", deleting)
        return entry

    def deleting(*words):
        shutil.rmtree(folder)
        return computed(*words)

    monkeypatch.setattr(Trainer, "_epoch", epoch)
    status, _, err = call("student", "teacher.yaml", "epochs=2", "--quiet")
    run = "runs/teacher/ce/seed0"
    message = f"topkd: {run} was deleted during the run; rerun the command to start again"
    assert (status, err) == (2, f"{message}\n")
    assert not (tmp_path / run).exists()


def test_a_log_of_tensorboard_that_is_deleted_is_one_line(call, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    train_epoch = Trainer._epoch

    def epoch(self, number, advance):
        shutil.rmtree(tmp_path / "runs/teacher/ce/seed0/tensorboard")
        return train_epoch(self, number, advance)

    monkeypatch.setattr(Trainer, "_epoch", epoch)
    status, _, err = call("student", "teacher.yaml", "--quiet")
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith("topkd: runs/teacher/ce/seed0/tensorboard/events.")
    assert err.endswith(": No such file or directory\n")


def test_seeds_are_read_in_every_form():
    assert app._join_seeds(["run", "x", "--seeds", "0", "1", "2", "a=1"]) == [
        *("run", "x", "--seeds", "0,1,2", "a=1")
    ]
    assert options.numbers("0,2") == (0, 2)
    assert options.numbers("1-3") == (1, 2, 3)


def test_help_loads_neither_torch_nor_pydantic():
    code = (
        "import sys; sys.argv = ['topkd', '--help']\n"
        "from topkd import cli\n"
        "try: app.main()\n"
        "finally: print([m for m in ('torch', 'pydantic', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_the_authors_student_has_the_accuracy_they_published(call, shared):
    weights = shared("checkpoints/resnet20_cifar100_topkd.pth")
    data = shared("data/cifar100")
    status, out, _ = call(
        "evaluate", str(weights), "--model", "resnet20", "--data", "cifar100", "--root", str(data)
    )
    assert status == 0
    assert "top-1              71.74 %" in out
