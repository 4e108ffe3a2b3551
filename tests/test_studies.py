"""Studies: what a file expands to, jobs that run, fail and resume, and comparisons that agree."""

import csv
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats
from typer.testing import CliRunner

from topkd._io.progress import Progress
from topkd.cli.commands.study import study as study_app
from topkd.config import study as studies
from topkd.config.validation import RecipeError
from topkd.evaluation.metrics import METRICS
from topkd.losses import LOSSES
from topkd.studies.analysis import compare
from topkd.studies.collect import Collected, collect
from topkd.studies.executors import Local
from topkd.studies.executors.base import ATTEMPTS, prepare
from topkd.studies.executors.task import Exit, Task
from topkd.studies.forecast import Forecast, opening
from topkd.studies.new import template
from topkd.studies.plan import Place
from topkd.studies.run import run
from topkd.studies.table import FORMATS
from topkd.training.check import check
from topkd.training.trial import try_losses

QUIET = Progress(quiet=True)
TEACHER = {
    "data": {"name": "digits"},
    "student": {"model": "resnet8x0.25"},
    "losses": [{"name": "ce"}],
    "epochs": 1,
    "batch_size": 32,
    "threads": 1,
}
RECIPE = TEACHER | {
    "data": {"name": "digits", "limit": 100},
    "teacher": {"model": "resnet8x0.25", "recipe": "teacher.yaml", "cache": True},
    "losses": [{"name": "ce"}, {"name": "kd"}],
    "epochs": 2,
}
STUDY = {
    "recipe": "recipe.yaml",
    "baseline": "kd",
    "variants": {
        "kd": [{"name": "ce"}, {"name": "kd", "weight": 2.0}],
        "topkd": {"add": [{"name": "topkd", "share": 0.1}]},
        "random": {"of": "topkd", "set": {"topkd.edges": "random"}},
    },
    "seeds": "0-1",
}
NO_TOPOLOGY = {"kd": STUDY["variants"]["kd"]}


@pytest.fixture
def file(tmp_path):
    """A study file beside its recipes."""
    for name, tree in (("teacher", TEACHER), ("recipe", RECIPE), ("study", STUDY)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return tmp_path / "study.yaml"


def written(folder, **changes):
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes), encoding="utf-8")
    return path


def test_a_file_expands_to_settings_variants_and_seeds(file, tmp_path):
    path = written(
        tmp_path,
        grid={"topkd.share": [0.02, 0.3]},
        settings={"full": {}, "few": {"data.limit": 64}},
        set={"epochs": 1},
        seeds="0-1,7",
    )
    plan = studies.load(path)
    assert plan.variants == [
        "kd",
        "topkd[share=0.02]",
        "topkd[share=0.3]",
        "random[share=0.02]",
        "random[share=0.3]",
    ]
    jobs = plan.jobs()
    assert len(jobs) == 2 * 5 * 3
    assert [job.seed for job in jobs if job.variant == "kd"] == [0, 1, 7] * 2
    assert {job.recipe.epochs for job in jobs} == {1}
    few = next(job for job in jobs if (job.setting, job.variant) == ("few", "random[share=0.3]"))
    assert few.recipe.data.limit == 64
    assert few.recipe.losses[2].share == 0.3
    assert few.recipe.losses[2].options == {"edges": "random"}
    assert few.recipe.name == "changed/few/random-share-0.3"


def test_changes_replace_what_the_file_says(file):
    assert len(studies.load(file, ("seeds=0-4",)).jobs()) == 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "kdd"}, "baseline: there is no variant 'kdd'; did you mean 'kd'"),
        ({"seeds": [1, 1]}, "seeds: .*seed 1 appears twice"),
        ({"seeds": "0,1,0"}, "seeds: .*seed 0 appears twice"),
        ({"seeds": "3-1"}, "'3-1' is empty; give the smaller number first"),
        ({"seeds": "0-x"}, "expected numbers such as 0,1,2 or 0-2, got '0-x'"),
        ({"grid": {"dkd.beta": [1, 2]}}, "grid: no variant has a term 'dkd'"),
        ({"variants": STUDY["variants"] | {"new": {"of": "topk"}}}, "no variant 'topk'; did you"),
        ({"variants": {"kd": {"of": "b"}, "b": {"of": "kd"}}}, "is a circular reference"),
        ({"variants": STUDY["variants"] | {"new": {"addd": []}}}, "addd"),
        ({"settings": {"few": {"data.limit": 0}}}, "few, variant kd: .*limit"),
        ({"recipe": "nowhere"}, "there is no recipe 'nowhere'"),
        ({"settings": {"Few": {}, "few": {}}}, "settings: 'Few' and 'few' would share the folder"),
        ({"settings": {"--": {}}}, "settings: '--' has no letter or digit to name a folder by"),
        (
            {"variants": STUDY["variants"] | {"top kd": {}, "top-kd": {}}},
            "variants: 'top kd' and 'top-kd' would share the folder top-kd; rename one",
        ),
        ({"grid": {"topkd.share": [0.1, 0.2, 0.1]}}, "topkd.share: the value 0.1 appears twice"),
        ({"grid": {"topkd.share": [1, 1.0]}}, "topkd.share: the value 1.0 appears twice"),
        ({"grid": {"topkd.edges": ["1", 1]}}, "topkd.edges: the value 1 appears twice"),
        (
            {
                "grid": {"topkd.share": [0.2]},
                "variants": STUDY["variants"] | {"topkd[share=0.2]": {}},
            },
            r"'topkd\[share=0.2\]' and 'topkd\[share=0.2\]' would share the folder",
        ),
        ({"variants": {"kd": [{"name": "kdd"}]}}, None),
    ],
)
def test_what_is_wrong_is_one_line_that_says_where(file, tmp_path, changes, message):
    path = written(tmp_path, **changes)
    if message is None:  # losses are looked up when an experiment is made
        studies.load(path)
        return
    with pytest.raises(RecipeError, match=message):
        studies.load(path)


def changed(path, *changes, setting="main", variant="kd"):
    """Loads a study with changes of the command line and returns one of its recipes."""
    return studies.load(path, changes).recipes[setting, variant]


def test_a_change_of_the_command_line_keeps_the_rest_of_its_section(file, tmp_path):
    tuned = RECIPE | {"optimizer": {"schedule": "one-cycle", "weight_decay": 0.001}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tuned), encoding="utf-8")
    path = written(tmp_path, settings={"few": {"data.limit": 64}, "lr-0.1/b": {}, "lr-0": {}})
    before = studies.load(path).recipes["few", "topkd"].optimizer
    after = before.model_copy(update={"lr": 0.2})

    where = {"setting": "few", "variant": "topkd"}
    for change in ("set.optimizer.lr=0.2", "set.optimizer={lr: 0.2}", "set={optimizer: {lr: 0.2}}"):
        assert changed(path, change, **where).optimizer == after
    assert changed(path, "variants.topkd.set.optimizer.lr=0.2", **where).optimizer == after
    for change in ("optimizer.lr=0.2", "optimizer={lr: 0.2}"):
        assert changed(path, f"variants.random.set.{change}", **where).optimizer == before
        recipe = changed(path, f"variants.random.set.{change}", setting="few", variant="random")
        assert recipe.optimizer == after
        assert recipe.losses[-1].options == {"edges": "random"}
    longest = changed(path, "settings.lr-0.1/b.optimizer.lr=0.2", setting="lr-0.1/b")
    assert longest.optimizer == after

    assert changed(path, "set.teacher.cache=false", **where).teacher.cache is False
    assert changed(path, "settings.few.data.limit=70", **where).data.limit == 70
    assert changed(path, "settings.few={epochs: 5}", **where).data.limit == 100
    assert changed(path, "settings.new={data.limit: 80}", setting="new").data.limit == 80
    assert changed(path, "set.topkd.share=0.3", **where).losses[-1].share == 0.3
    assert changed(path, "variants.topkd.add.topkd.share=0.3", **where).losses[-1].share == 0.3
    assert changed(path, "variants.kd.kd.weight=9", setting="few").losses[1].weight == 9
    grid = studies.load(path, ("grid.topkd.share=[0.2, 0.3]",))
    assert "topkd[share=0.2]" in grid.variants


def test_a_setting_of_a_file_without_settings_is_changed(file):
    assert changed(file, "settings.main.data.limit=70").data.limit == 70


def test_a_mapping_changes_only_the_keys_that_it_lists(file, tmp_path):
    tuned = RECIPE | {"optimizer": {"schedule": "one-cycle", "weight_decay": 0.001}}
    tuned["data"] = {"name": "digits", "limit": 100, "flip": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tuned), encoding="utf-8")
    variants = STUDY["variants"] | {
        "slow": {"set": {"optimizer": {"lr": 0.01}}},
        "heavy": {"of": "slow", "set": {"optimizer": {"weight_decay": 0.1}}},
    }
    settings = {
        "main": {"data": {"randaugment": {"magnitude": 3}}},
        "other": {"data": {"name": "folder", "root": "images"}},
        "shifted": {"data": {"augmentation_seed": 1}},
    }
    plan = studies.load(written(tmp_path, variants=variants, settings=settings))
    optimizer = plan.recipes["main", "heavy"].optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.schedule) == (0.01, 0.1, "one-cycle")
    data = plan.recipes["main", "kd"].data
    assert (data.limit, data.randaugment.magnitude, data.options) == (100, 3, {"flip": True})
    data = plan.recipes["other", "kd"].data
    assert (data.limit, data.options) == (100, {"root": "images"})
    assert plan.recipes["shifted", "kd"].data.options == {"flip": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lr=0.1", "no key 'optimizer'; .* write set.optimizer.lr=0.1$"),
        ("epochs=3", "no key 'epochs'; .* write set.epochs=3$"),
        ("topkd.share=0.3", "no key 'topkd'; .* write set.topkd.share=0.3$"),
        ("sets.epochs=3", "no key 'sets'; did you mean 'set'"),
        ("seed=3", "no key 'seed'; did you mean 'seeds'"),
        ("settings.man.epochs=3", "settings has no 'man'; did you mean 'main'"),
        ("variants.topk.set.epochs=3", "variants has no 'topk'; did you mean 'topkd'"),
        ("variants.kd.set.epochs=3", "there is no 'set'; there are ce, kd"),
        ("set.optimizer", "a change is written key=value"),
        ("set.=1", "a change is written key=value"),
        ("seeds.x=1", "seeds has no keys"),
        ("set[optimizer].lr=1", "write a dot after set"),
        ("set.optimizer.lr=[", "the value is not YAML"),
        ("set.optimizer.lr.x=1", "set: optimizer.lr.x: lr has no keys"),
    ],
)
def test_a_change_that_is_wrong_is_one_line(file, change, message):
    with pytest.raises(RecipeError, match=message) as caught:
        studies.load(file, (change,))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["run", "status", "jobs", "job", "table", "report"])
def test_the_help_of_changes_has_examples_that_are_accepted(file, command):
    shown = CliRunner().invoke(study_app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    examples = ("seeds=0-4", "set.optimizer.lr=0.1")
    assert all(example in shown for example in examples)
    assert changed(file, *examples).optimizer.lr == 0.1


def test_names_of_logs_are_names_of_files(file, tmp_path):
    path = written(tmp_path, settings={"a/b c": {}}, variants=NO_TOPOLOGY, seeds=0)
    outcome = run(studies.load(path), tmp_path / "runs", Local(), QUIET)
    assert outcome.failed == []
    logs = {log.name for log in (tmp_path / "runs/logs/changed").iterdir()}
    assert logs == {"a-b-c.log", "a-b-c-kd-seed-0.log"}


def test_names_that_no_file_can_have_are_refused(file, tmp_path):
    taps = [[f"layer{number}.block{number}.conv" for number in range(20)]]
    path = written(tmp_path, grid={"topkd.taps.student.maps": taps})
    with pytest.raises(RecipeError, match=r"variants: \"topkd\[.* at most 200 are possible"):
        studies.load(path)
    with pytest.raises(RecipeError, match=r"settings: 'é+\.\.\.' makes a file name of 24. bytes"):
        studies.load(written(tmp_path, settings={"é" * 120: {}}))
    studies.load(written(tmp_path, settings={"é" * 60: {}}))


def test_a_variant_whose_code_fails_does_not_stop_the_others(file, tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text("def broken(classes):\n    return missing", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    variants = NO_TOPOLOGY | {"broken": {"set": {"student.model": "nets:broken"}}}
    path = written(tmp_path, variants=variants, seeds=0)
    outcome = run(studies.load(path), tmp_path / "runs", Local(), QUIET)
    assert [ended.job.variant for ended in outcome.failed] == ["broken"]
    assert "name 'missing' is not defined" in outcome.failed[0].error
    log = (tmp_path / "runs/logs/changed/main.log").read_text(encoding="utf-8")
    assert "NameError" in log
    with pytest.raises(NameError):  # no other recipe is left
        prepare([studies.load(path).recipes["main", "broken"]], tmp_path / "runs")


def test_too_many_jobs_are_refused_before_their_recipes_are_built(file, tmp_path):
    values = [number / 1000 for number in range(1, 301)]
    grid = {f"topkd.{key}": values for key in ("share", "temperature", "scale")}
    path = written(tmp_path, grid=grid)
    start = time.monotonic()
    with pytest.raises(RecipeError, match=r"^108,000,002 jobs are more than 100,000$"):
        studies.load(path)
    assert time.monotonic() - start < 10


def test_jobs_are_counted_as_they_are_planned(file, tmp_path, monkeypatch):
    grid = {"topkd.share": [0.1, 0.2], "kd.weight": [1.0, 2.0, 3.0]}
    path = written(tmp_path, grid=grid, settings={"a": {}, "b": {}})
    monkeypatch.setattr(studies, "MOST_JOBS", (1 + 3 + 6 + 6) * 2 * 2)
    assert len(studies.load(path).jobs()) == studies.MOST_JOBS
    monkeypatch.setattr(studies, "MOST_JOBS", studies.MOST_JOBS - 1)
    with pytest.raises(RecipeError, match="64 jobs are more than 63"):
        studies.load(path)


def results_of(folder):
    return {
        str(path.relative_to(folder)): json.loads(path.read_text(encoding="utf-8"))
        for path in folder.rglob("result.json")
    }


def weights_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("student.safetensors")}


def test_jobs_run_and_are_not_run_again(file, tmp_path):
    plan, out = studies.load(file), tmp_path / "runs"
    outcome = run(plan, out, Local(2), QUIET)
    assert (outcome.jobs, outcome.done_before, outcome.left) == (6, 0, 0)
    assert not outcome.failed
    before = results_of(out)
    again = run(plan, out, Local(2), QUIET)
    assert (again.done_before, again.ended) == (6, [])
    assert results_of(out) == before

    # Results without weights, as they are committed, count as done elsewhere.
    small = tmp_path / "results"
    for path in out.rglob("result.json"):
        target = small / path.relative_to(out)
        target.parent.mkdir(parents=True)
        shutil.copy(path, target)
    elsewhere = run(plan, tmp_path / "new", Local(1), QUIET, [small])
    assert (elsewhere.done_before, elsewhere.ended) == (6, [])
    table = FORMATS["markdown"](collect(plan, Place(tmp_path / "new", [small])))
    assert table.count("\n| main | ") == 3


def test_a_study_that_is_killed_goes_on_to_the_same_bits(file, tmp_path):
    plan = studies.load(file)
    run(plan, tmp_path / "whole", Local(1, threads=1), QUIET)
    command = [sys.executable, "-m", "topkd", "study", "run", str(file), "--quiet"]
    command += ["--out", str(tmp_path / "killed"), "--jobs", "2", "--threads", "1"]
    for _ in range(2):
        process = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + 60
        while not list((tmp_path / "killed").rglob("latest.json")) and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True)
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "whole")


def test_jobs_use_threads_after_their_parent_did(file, tmp_path):
    """GNU OpenMP waits forever in a forked thread that has used it before."""
    path = written(tmp_path, set={"threads": 2, "epochs": 1}, seeds=0, variants=NO_TOPOLOGY)
    program = f"""
import torch
from pathlib import Path
from topkd._io.progress import Progress
from topkd.config import study
from topkd.studies.executors import Local
from topkd.studies.run import run
torch.set_num_threads(2)
assert (torch.ones(100_000) > 0).all()
outcome = run(study.load({str(path)!r}), Path({str(tmp_path)!r}), Local(), Progress(quiet=True))
assert outcome.left == 0, outcome.failed
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_data_that_do_not_exist_fail_their_jobs_only(file, tmp_path):
    missing = {"data": {"name": "folder", "root": str(tmp_path / "nowhere")}}
    path = written(tmp_path, settings={"bad": missing, "good": {}}, seeds=0, variants=NO_TOPOLOGY)
    outcome = run(studies.load(path), tmp_path / "runs", Local(), QUIET)
    assert (len(outcome.failed), outcome.left) == (1, 1)
    assert "nowhere" in outcome.failed[0].error


def test_a_job_that_fails_is_named_and_the_others_go_on(file, tmp_path):
    plan = studies.load(file, ("seeds=0",))
    out = tmp_path / "runs"
    executor = Failing(1)
    outcome = run(plan, out, executor, QUIET)
    assert executor.killed == ATTEMPTS
    assert [ended.job.variant for ended in outcome.failed] == ["topkd"]
    assert "killed by SIGKILL" in outcome.failed[0].error
    assert outcome.left == 1


class Failing(Local):
    """Kills every attempt of one variant, as a fault in a library would."""

    killed = 0

    def start(self, tasks):
        processes = super().start(tasks)
        for task, process in zip(tasks, processes, strict=True):
            if task.title.startswith("main/topkd "):
                self.killed += 1
                process.kill()
        return processes


def test_results_of_another_recipe_are_refused(file, tmp_path):
    run(studies.load(file, ("seeds=0",)), tmp_path / "runs", Local(1), QUIET)
    changed = studies.load(file, ("seeds=0", "set={epochs: 3}"))
    with pytest.raises(ValueError, match=r"belongs to another recipe .* rename the study"):
        run(changed, tmp_path / "runs", Local(1), QUIET)


# --- Statistics ----------------------------------------------------------------------------------


def drawn(shift, n=12, seed=0, spread=1.0):
    generator = np.random.default_rng(seed)
    base = generator.normal(70, 2, n)
    return {
        "kd": dict(enumerate(base.tolist())),
        "new": dict(enumerate((base + generator.normal(shift, spread, n)).tolist())),
    }


def test_an_interval_is_students_t_by_the_textbook():
    values = drawn(0.5)
    (found,) = compare("s", values, "kd")
    d = [values["new"][seed] - values["kd"][seed] for seed in range(12)]
    mean = sum(d) / 12
    deviation = math.sqrt(sum((x - mean) ** 2 for x in d) / 11)
    half = stats.t.ppf(0.975, 11) * deviation / math.sqrt(12)
    assert found.differences.mean == pytest.approx(mean)
    assert found.interval == pytest.approx((mean - half, mean + half))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(mean) / deviation * math.sqrt(12), 11))


@pytest.mark.parametrize("seed", range(30))
def test_intervals_and_p_values_never_contradict_each_other(seed):
    generator = np.random.default_rng(seed)
    base = dict(enumerate(generator.normal(70, 2, 8).tolist()))
    values = {"kd": base} | {
        f"v{number}": {k: v + generator.normal(0.6, 1) for k, v in base.items()}
        for number in range(5)
    }
    for found in compare("s", values, "kd"):
        low, high = found.interval
        assert (low > 0 or high < 0) == (found.p < 0.05)


def test_the_family_covers_all_its_differences_at_once():
    generator = np.random.default_rng(0)
    missed = 0
    for _ in range(400):
        base = dict(enumerate(generator.normal(0, 1, 6).tolist()))
        values = {"kd": base} | {
            f"v{number}": {k: v + generator.normal(0, 1) for k, v in base.items()}
            for number in range(6)
        }
        missed += any(f.interval[0] > 0 or f.interval[1] < 0 for f in compare("s", values, "kd"))
    assert missed / 400 <= 0.075  # 0.05, and twice the standard error of 400 trials


@pytest.mark.parametrize(
    ("values", "margin", "verdict"),
    [
        (drawn(5.0), 0.3, "better"),
        (drawn(-5.0), None, "worse"),
        (drawn(0.0, n=60, spread=0.1), 0.3, "no difference that matters"),
        (drawn(0.1, n=5), 0.3, "undecided"),
    ],
)
def test_verdicts(values, margin, verdict):
    (found,) = compare("s", values, "kd", margin=margin)
    assert found.verdict == verdict
    assert (found.needed is None) == (verdict != "undecided")


def test_where_less_is_better_a_smaller_value_is_better():
    (found,) = compare("s", drawn(-5.0), "kd", higher_is_better=False)
    assert found.verdict == "better"


@pytest.mark.parametrize(("n", "seed"), [(6, 3), (4, 0), (3, 2), (4, 11), (6, 9)])
def test_the_needed_seeds_would_decide(n, seed):
    values = drawn(0.2, n=n, seed=seed)
    (found,) = compare("s", values, "kd", margin=0.3)
    assert found.verdict == "undecided"
    d = np.array(found.differences.values)
    decisive = max(abs(d.mean()), 0.3 - abs(d.mean()))  # excludes 0, or lies within the margin
    enough, fewer = (
        stats.t.ppf(0.975, n - 1) * d.std(ddof=1) / math.sqrt(n)
        for n in (found.needed, found.needed - 1)
    )
    assert enough < decisive <= fewer


@pytest.mark.parametrize(
    ("base", "new"),
    [({0: 1.0}, {0: 9.0}), ({0: 1.0, 1: 2.0}, {0: 9.0, 1: 10.0}), ({0: 1.0, 1: 2.0},) * 2],
)
def test_without_a_known_spread_nothing_is_decided(base, new):
    """Accuracies on few images have equal differences by chance."""
    (found,) = compare("s", {"kd": base, "new": new}, "kd", margin=0.5)
    assert (found.verdict, found.interval, found.p) == ("undecided", None, None)
    assert found.needed is None


# --- Tables --------------------------------------------------------------------------------------


def collected(file, values, metric="top1"):
    """Results of a study with these values, without training."""
    changes = (f"primary={{metric: {metric}, margin: 0.3}}", f"set={{evaluation: [{metric}]}}")
    plan = studies.load(file, changes).only(list(values))
    part = "teacher_similarity" if METRICS[metric].needs_teacher else "last"
    other = "last" if part == "teacher_similarity" else "teacher_similarity"
    return Collected(
        plan,
        {
            ("main", variant): {
                seed: {part: {metric: value}, other: {metric: -1.0}} for seed, value in runs.items()
            }
            for variant, runs in values.items()
        },
    )


def test_every_format_has_the_same_numbers(file):
    values = drawn(5.0)
    study = collected(file, {"kd": values["kd"], "topkd": values["new"]})
    rows = json.loads(FORMATS["json"](study))
    assert [row["variant"] for row in rows] == ["kd", "topkd"]
    assert rows[1]["verdict"] == "better"
    assert rows[1]["values"] == {str(seed): value for seed, value in values["new"].items()}
    (_, again) = csv.DictReader(io.StringIO(FORMATS["csv"](study)))
    assert float(again["low"]) == rows[1]["low"]
    markdown, latex = FORMATS["markdown"](study), FORMATS["latex"](study)
    mean = sum(values["new"].values()) / 12
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values["new"].values()) / 11)
    for shown in (
        f"{rows[1]['difference']:+.2f} [{rows[1]['low']:+.2f}, {rows[1]['high']:+.2f}]",
        f"{mean:.2f} ± {deviation:.2f} (12)",
    ):
        assert shown in markdown
        assert shown.replace("±", r"$\pm$") in latex
    assert "| top-1 ↑, %: mean ± std (n) |" in markdown
    assert r"\textbf{" in latex
    assert latex.count(r"\\") == 3


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_of_the_table_of_metrics_can_be_primary(file, metric):
    values = drawn(5.0)
    study = collected(file, {"kd": values["kd"], "topkd": values["new"]}, metric)
    _, row = json.loads(FORMATS["json"](study))
    assert row["verdict"] == ("better" if METRICS[metric].higher_is_better else "worse")
    mean = sum(values["new"].values()) / 12
    assert f"| {mean:.{METRICS[metric].digits}f} ± " in FORMATS["markdown"](study)


def test_an_unknown_metric_is_refused_before_any_job_runs(file, tmp_path):
    plan = studies.load(file, ("primary={metric: top_1}",))
    message = "study: primary.metric: there is no metric 'top_1'; did you mean 'top1'"
    with pytest.raises(RecipeError, match=message):
        run(plan, tmp_path / "runs", Local(1), QUIET)
    assert not (tmp_path / "runs").exists()


def test_seeds_that_the_baseline_lacks_are_in_the_mean_and_not_in_the_difference(file):
    study = collected(file, {"kd": {0: 1.0, 1: 2.0}, "topkd": {0: 2.0, 1: 3.5, 2: 9.5}})
    _, row = json.loads(FORMATS["json"](study))
    assert (row["n"], row["mean"], row["pairs"], row["difference"]) == (3, 5.0, 2, 1.25)


def test_names_do_not_break_a_table(file, tmp_path):
    name = r"a|b_c & 50% {x} $y$ ~^\\#*"
    path = written(tmp_path, variants={"kd": [{"name": "ce"}], name: {}})
    study = collected(path, {"kd": {0: 1.0}, name: {0: 2.0}})
    line = FORMATS["markdown"](study).splitlines()[-1]
    assert len(re.findall(r"(?<!\\)\|", line)) == 8
    latex = FORMATS["latex"](study)
    assert r"a|b\_c \& 50\% \{x\} \$y\$ \textasciitilde{}\textasciicircum{}" in latex


def test_settings_with_other_images_have_teachers_of_their_own(file, tmp_path):
    """The teacher's recipe names one folder, and each setting trains it on its own images."""
    settings = {"limit": {}, "few": {"data.limit": 60}}
    path = written(tmp_path, settings=settings, seeds="0", set={"epochs": 1})
    outcome = run(studies.load(path), tmp_path / "runs", Local(2), QUIET)
    assert (outcome.failed, outcome.left) == ([], 0)
    teachers = (tmp_path / "runs").glob("teacher*/ce/seed0/result.json")
    limits = {json.loads(path.read_text(encoding="utf-8"))["recipe"] for path in teachers}
    assert limits == {"teacher-limit-100", "teacher-limit-60"}


def test_settings_with_images_of_other_files_have_teachers_of_their_own(file, tmp_path):
    pictures = tmp_path / "pictures"
    for split, label, number in itertools.product(("train", "val"), ("a", "b"), range(20)):
        path = pictures / split / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 255 * (label == "b"))).save(path)
    shutil.copytree(pictures, tmp_path / "moved")
    settings = {"digits": {}} | {
        name: {"data": {"name": "folder", "root": str(tmp_path / name), "size": 8}, "epochs": 1}
        for name in ("pictures", "moved")
    }
    path = written(tmp_path, settings=settings, seeds=0, variants=NO_TOPOLOGY)
    outcome = run(studies.load(path), tmp_path / "runs", Local(1), QUIET)
    assert (outcome.failed, outcome.left) == ([], 0)
    names = sorted(each.name for each in (tmp_path / "runs").glob("teacher*"))
    assert names[0] == "teacher-limit-100"
    assert [re.sub(r"[0-9a-f]{8}$", "HASH", name) for name in names[1:]] == [
        "teacher-limit-100-size-8-HASH"
    ] * 2


def test_a_part_of_a_plan_is_the_baseline_and_the_named_variants(file):
    plan = studies.load(file).only(["random"])
    assert plan.variants == ["kd", "random"]
    assert [(job.variant, job.seed) for job in plan.jobs()] == [
        (variant, seed) for seed in (0, 1) for variant in ("kd", "random")
    ]
    with pytest.raises(RecipeError, match="there is no variant 'randm'; did you mean 'random'"):
        plan.only(["randm"])


def test_commands_of_jobs_have_the_changes_and_can_be_pasted(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["jobs", str(file), "seeds=7", "set.student.model=a b", "--out", "my runs", "--json"]
    listed = json.loads(CliRunner().invoke(study_app, words).stdout)
    assert [shlex.split(entry["command"]) for entry in listed][0] == [
        *("topkd", "study", "job", str(file), "seeds=7", "set.student.model=a b"),
        *("--setting", "main", "--variant", "kd", "--seed", "7", "--out", "my runs"),
    ]


@pytest.mark.parametrize("key", ["losses", "controls.x", "name"])
@pytest.mark.parametrize("place", ["set", "settings", "variants"])
def test_a_change_that_would_be_lost_is_refused(file, tmp_path, key, place):
    changes = {
        "set": {"set": {key: "x"}},
        "settings": {"settings": {"main": {key: "x"}}},
        "variants": {"variants": STUDY["variants"] | {"random": {"set": {key: "x"}}}},
    }
    with pytest.raises(RecipeError, match=f"{key}: .* cannot be changed here"):
        studies.load(written(tmp_path, **changes[place]))


def test_options_of_terms_are_changed_for_all_variants_that_have_them(file, tmp_path):
    """Nearer changes win: the file, the setting, the variant, the grid."""
    variants = STUDY["variants"] | {"ce": [{"name": "ce"}]}
    variants["random"] = {"of": "topkd", "set": {"topkd.edges": "random", "kd.weight": 9.0}}
    plan = studies.load(
        written(
            tmp_path,
            variants=variants,
            set={"kd.weight": 3.0, "topkd.share": 0.2},
            settings={"main": {}, "hot": {"kd.temperature": 8.0}},
            grid={"topkd.share": [0.02, 0.3]},
        )
    )

    def option(setting, variant, name, key):
        terms = {term.title: term for term in plan.recipes[setting, variant].losses}
        return getattr(terms[name], key, None) or terms[name].options.get(key)

    assert [option(s, "kd", "kd", "weight") for s in ("main", "hot")] == [3.0, 3.0]
    assert [option(s, "kd", "kd", "temperature") for s in ("main", "hot")] == [None, 8.0]
    assert option("hot", "random[share=0.02]", "kd", "weight") == 9.0
    assert option("hot", "topkd[share=0.3]", "topkd", "share") == 0.3
    assert [term.title for term in plan.recipes["hot", "ce"].losses] == ["ce"]
    same = studies.load(written(tmp_path, set={"losses.kd.weight": 3.0})).recipes["main", "kd"]
    assert {term.title: term.weight for term in same.losses} == {"ce": 1.0, "kd": 3.0}
    with pytest.raises(RecipeError, match="^kd is a term; set one of its options"):
        studies.load(written(tmp_path, set={"kd": 3.0}))
    with pytest.raises(RecipeError, match="set: there is no key or term 'kdd'; did you mean 'kd'"):
        studies.load(written(tmp_path, set={"kdd.weight": 3.0}))


def test_a_weight_replaces_a_share_and_the_other_way_round(file, tmp_path):
    variants = STUDY["variants"] | {
        "weighted": {"of": "topkd", "set": {"topkd.weight": 5.0}},
        "shared": {"of": "weighted", "set": {"topkd.share": 0.3}},
    }
    recipes = studies.load(written(tmp_path, variants=variants)).recipes
    found = {name: recipes["main", name].losses[-1] for name in ("weighted", "shared")}
    assert (found["weighted"].weight, found["weighted"].share) == (5.0, None)
    assert (found["shared"].weight, found["shared"].share) == (1.0, 0.3)


def test_finished_jobs_of_another_teacher_are_refused(file, tmp_path):
    path, out = (
        written(tmp_path, variants={"kd": STUDY["variants"]["kd"]}, seeds="0"),
        tmp_path / "runs",
    )
    assert run(studies.load(path), out, Local(1), QUIET).left == 0
    assert run(studies.load(path), out, Local(1), QUIET).done_before == 1
    (trained,) = [
        p for p in out.rglob("student.safetensors") if "teacher" in str(p.relative_to(out))
    ]
    trained.write_bytes(trained.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="seed0 was trained with another teacher than"):
        run(studies.load(path), out, Local(1), QUIET)


def test_a_schedule_that_does_not_fit_is_refused_or_reported(file, tmp_path):
    with pytest.raises(RecipeError, match=r"kd is never active in 2 epochs \(start 9\)"):
        studies.load(written(tmp_path, set={"kd.start": 9}))
    said, progress = [], Progress(quiet=True)
    progress.say = said.append
    plan = studies.load(written(tmp_path, set={"kd.warmup": 9}, variants=NO_TOPOLOGY, seeds="0"))
    run(plan, tmp_path / "runs", Local(1), progress)
    warnings = [line for line in said if line.startswith("warning: main: losses[1]: kd reaches")]
    assert len(warnings) == 1


def test_one_invalid_variant_does_not_stop_the_others(file, tmp_path):
    variants = STUDY["variants"] | {"large": {"set": {"batch_size": 4096}}}
    path = written(tmp_path, variants=variants, seeds="0")
    outcome = run(studies.load(path), tmp_path / "runs", Local(2), QUIET)
    assert [ended.job.variant for ended in outcome.failed] == ["large"]
    assert "100 training images are too few for a batch of 4096" in outcome.failed[0].error


def test_a_study_shows_the_log_of_its_own_job(file, tmp_path):
    """Two studies have a job of the same name, and the second one says nothing before it dies."""
    plans = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(STUDY | {"seeds": 0}), encoding="utf-8")
        plans.append(studies.load(path))
    logs = [Local(1).log(plan.jobs()[0], tmp_path / "runs") for plan in plans]
    assert logs[0] != logs[1]
    logs[0].parent.mkdir(parents=True)
    logs[0].write_text("of an earlier attempt\n", encoding="utf-8")
    task = Task("x", lambda: None, logs[0], 1)
    begun = task.begun()
    with open(logs[0], "a", encoding="utf-8") as log:
        log.write("now\n")
    assert task.error(Exit(1, "killed"), begun) == "killed\nnow"


def test_variants_of_a_grid_with_two_keys_are_named(file, tmp_path):
    path = written(tmp_path, grid={"topkd.share": [0.1, 0.2], "topkd.edges": ["mst", "random"]})
    words = [
        "status",
        str(path),
        "--variants",
        "topkd[edges=mst,share=0.1],random[edges=mst,share=0.2]",
    ]
    done = CliRunner().invoke(study_app, words)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == [
        "main/kd",
        "main/topkd[edges=mst,share=0.1]",
        "main/random[edges=mst,share=0.2]",
    ]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["ce", "kd"], "--methods: ce is part of every variant"),
        (["kd", "kd"], "kd appears twice"),
        (["simkd", "kd"], "--methods: simkd replaces the student's classifier, so it cannot be"),
    ],
)
def test_a_template_that_could_not_be_run_is_refused(methods, message):
    with pytest.raises(RecipeError, match=message):
        template("digits", methods, "0")


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"ce", "kd"}))
def test_a_template_can_be_run_with_every_loss(file, tmp_path, monkeypatch, name, cache):
    monkeypatch.chdir(tmp_path)
    Path("new.yaml").write_text(template("recipe.yaml", ["kd", name], "0"), encoding="utf-8")
    changes = () if cache else ("set.teacher.cache=false",)
    plan = studies.load("new.yaml", changes)
    for recipe in plan.recipes.values():
        check(recipe)
    recipe = plan.recipes["main", name]
    if name == "deit":
        with pytest.raises(RecipeError, match="deit needs a student with a distillation token"):
            try_losses(recipe)
        return
    try_losses(recipe)
    term = recipe.losses[-1]
    assert (term.share is None) == (LOSSES[name].info.group == "logits")
    assert recipe.teacher.cache == (cache and not LOSSES[name].reads_maps)


def test_the_command_line(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        done = subprocess.run(
            [sys.executable, "-m", "topkd", "study", *words],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    status, out, err = call("run", "study.yaml", "seeds=0", "--out", "runs", "--quiet")
    assert status == 0, err
    assert out == "3 of 3 jobs are done\n"
    status, out, err = call("status", "study.yaml", "--out", "runs")
    assert out.splitlines()[0] == "main/kd      1 of 2"
    status, out, err = call("jobs", "study.yaml", "--out", "runs", "--json")
    commands = [entry["command"] for entry in json.loads(out)]
    assert len(commands) == 3
    status, out, err = call("table", "study.yaml", "--out", "runs", "--format", "csv")
    assert out.startswith("setting,variant,n,mean,std,pairs,difference,low,high,p,verdict")
    status, out, err = call("new", "digits", "mine.yaml", "--methods", "kd,dkd,rkd,topkd")
    assert status == 0, err
    assert studies.load(Path("mine.yaml")).variants == ["kd", "dkd", "rkd", "topkd"]
    status, out, err = call("run", "nowhere.yaml")
    assert (status, out) == (2, "")
    assert err.startswith("topkd: there is no study nowhere.yaml")


def test_the_plan_and_what_it_takes_are_said_first(file, tmp_path):
    """Jobs take as long, and as much space, as the finished ones of their setting."""
    said: list[str] = []
    progress = Progress(quiet=True)
    progress.say = said.append
    plan, out = studies.load(file), tmp_path / "runs"
    run(plan, out, Local(1), progress)
    assert said[0] == "study: 6 jobs (1 setting, 3 variants, 2 seeds), 0 done"
    pattern = r"main: the other 5 take about \d+ s in one process and 1 MB"
    assert sum(re.fullmatch(pattern, line) is not None for line in said) == 1
    forecast = Forecast({"main": [30.0, 90.0]}, {"main": [1_000_000, 3_000_000]})
    assert forecast.of({"main": 4}) == "about 4 min in one process and 8 MB"
    (out / "study/main/kd/kd/seed0/result.json").unlink()
    assert opening(plan, Place(out))[0].startswith(f"{said[0][:-6]}5 done; the others take about ")
