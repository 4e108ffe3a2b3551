"""Tuning: what is tried, what is best, what is left alone, and what is refused."""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from topkd._io.progress import Progress
from topkd.config import recipe as recipes
from topkd.config.search import Range, read_space, with_values
from topkd.config.validation import RecipeError
from topkd.data import DATA
from topkd.models import MODELS, checkpoint
from topkd.studies import tune as tuning
from topkd.training.experiment import Experiment
from topkd.training.trainer import Trainer

optuna = pytest.importorskip("optuna")

QUIET = Progress(quiet=True)
TEACHER = {
    "data": {"name": "digits"},
    "student": {"model": "resnet8x0.25"},
    "losses": [{"name": "ce"}],
    "epochs": 1,
    "batch_size": 32,
    "threads": 1,
    "optimizer": {"schedule": "cosine"},
}
TINY = TEACHER | {
    "data": {"name": "digits", "limit": 100},
    "teacher": {"model": "resnet8x0.25", "recipe": "teacher.yaml", "cache": True},
    "losses": [{"name": "ce"}, {"name": "kd", "weight": 2.0}],
    "controls": {"ce": [{"name": "ce"}]},
}


class Secret:
    """Images that must not be read."""

    blocks = None

    def __init__(self, images):
        self.target = images.target

    def read_bytes(self, index, augmented):
        raise AssertionError("a test image was read")

    read = read_bytes


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty folder with the tiny recipe and that of its teacher."""
    monkeypatch.chdir(tmp_path)
    for name, tree in (("tiny", TINY), ("teacher", TEACHER)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return tmp_path


@pytest.fixture
def scored(monkeypatch):
    """Replaces training by a formula of the values; returns the trials that were run."""
    run = []

    def use(formula):
        def score(search, recipe, seed, trial, on_epoch):
            run.append(recipe)
            return formula(recipe)

        monkeypatch.setattr(tuning._Search, "_score", score)
        monkeypatch.setattr(Experiment, "train_teacher", lambda experiment: None)
        return run

    return use


def tune(*changes, out="runs", trials=20, name="tiny.yaml", **options):
    space = read_space(changes)
    return tuning.tune(recipes.load(name), space, Path(out), QUIET, trials=trials, **options)


def plain_run(seed, *changes):
    """Trains the losses of the recipe without a search; returns the result and all epochs."""
    recipe = recipes.load("tiny.yaml", changes)
    plain = Experiment(recipe, Path("plain"), QUIET, trackers=())
    result = plain.train_student(seed)
    lines = (plain.folder / recipe.main / f"seed{seed}/metrics.jsonl").read_text(encoding="utf-8")
    return result, [json.loads(line) for line in lines.splitlines()]


# --- What is found -------------------------------------------------------------------------------


def test_the_best_value_is_that_of_plain_runs_on_validation_images(call, here, monkeypatch):
    digits = DATA["digits"]
    words = ("tune", "tiny.yaml", "kd.weight=4", "optimizer.lr=0.0001,0.1")
    with monkeypatch.context() as patch:
        patch.setitem(DATA, "digits", lambda: replace(digits(), test=Secret(digits().test)))
        status, out, err = call(*words, "--seeds", "100", "101", "--json", "--quiet")
        with pytest.raises(AssertionError, match="a test image was read"):
            plain_run(0)
    assert status == 0, err
    tuned = json.loads(out)
    by_hand = {}
    for rate in (0.0001, 0.1):
        changes = (
            "losses.kd.weight=4",
            f"optimizer.lr={rate}",
            "data.validation=0.2",
            f"name=plain-{rate}",
        )
        runs = [plain_run(seed, *changes)[0] for seed in (100, 101)]
        assert {run["eval_split"] for run in runs} == {"validation"}
        by_hand[4, rate] = statistics.mean(run["last"]["top1"] for run in runs)
    found = {tuple(t["values"].values()): t["score"] for t in tuned["trials"]}
    assert found == pytest.approx(by_hand)
    assert {trial["state"] for trial in tuned["trials"]} == {"complete"}
    best = tuned["best"]
    assert best["score"] == pytest.approx(max(by_hand.values()))
    assert by_hand[tuple(best["values"].values())] == max(by_hand.values())

    trial = next(Path("runs/tiny-tuning/trials").rglob("result.json")).parent
    assert json.loads(call("evaluate", str(trial), "--json")[1])["eval_split"] == "validation"
    assert " on the 250 validation images of digits\n" in call("evaluate", str(trial))[1]

    written = Path(tuned["file"])
    text, recipe = written.read_text(encoding="utf-8"), recipes.load(str(written))
    assert written == Path("runs/tiny-tuned.yaml")
    assert "best of 2 trials (2 complete)" in text
    assert f"top-1 {best['score']:.2f} %" in text
    assert "Seeds of each trial: 100, 101." in text
    assert recipe.data == recipes.load("tiny.yaml").data
    assert recipe.controls == recipes.load("tiny.yaml").controls
    assert (recipe.losses[1].weight, recipe.optimizer.lr) == tuple(best["values"].values())
    status, out, err = call("check", str(written))
    assert status == 0, err
    assert out.startswith("tiny-tuned is valid")


def test_bad_trials_are_pruned_by_the_median_of_those_before(here):
    """Compares with the rule in plain Python, on the accuracies of runs without pruning."""
    rates = (0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 1e-5, 2e-5)
    tuned = tune(f"optimizer.lr={','.join(map(str, rates))}", "epochs=3")
    curves = {}
    for rate in rates:
        changes = f"optimizer.lr={rate}", "epochs=3", "data.validation=0.2", f"name=plain-{rate}"
        curves[rate] = [entry["validation_top1"] for entry in plain_run(100, *changes)[1]]
    complete, expected = [], {}
    for trial in tuned.trials:
        rate = trial.values["optimizer.lr"]
        expected[rate] = "complete"
        for epoch in (1, 2):  # the last one is complete anyway
            median = statistics.median([curve[epoch - 1] for curve in complete] or [0])
            if len(complete) >= 5 and max(curves[rate][:epoch]) < median:
                expected[rate] = f"after epoch {epoch}"
                break
        else:
            complete.append(curves[rate])
    states = {t.values["optimizer.lr"]: t.note or t.state for t in tuned.trials}
    assert states == expected
    assert "after epoch 1" in states.values()
    finished = list((here / "runs/tiny-tuning/trials").rglob("result.json"))
    assert len(finished) == len(complete) < len(rates)
    assert tune(f"optimizer.lr={','.join(map(str, rates))}", "epochs=3") == tuned


def test_a_killed_search_resumes_and_trains_nothing_twice(here, monkeypatch):
    changes = ("kd.weight=1,2", "optimizer.lr=0.02,0.1", "epochs=2")
    expected = tune(*changes, out="whole")
    trained, train = [], Trainer._epoch

    def epoch(trainer, *arguments):
        if len(trained) == 6:  # in the second epoch of the third trial, after that of the teacher
            raise KeyboardInterrupt
        trained.append(trainer)
        return train(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_epoch", epoch)
    with pytest.raises(KeyboardInterrupt):
        tune(*changes)
    trained.append(None)
    assert tune(*changes) == expected
    assert len(trained) == 1 + 4 * 2 + 1
    monkeypatch.setattr(Trainer, "_epoch", None)
    assert tune(*changes) == expected


def test_scores_of_another_teacher_choose_nothing(here):
    teacher = {"model": "resnet8x0.25", "checkpoint": "teacher.safetensors"}
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY | {"teacher": teacher}), encoding="utf-8")
    for seed in (0, 1):
        torch.manual_seed(seed)
        path = Path("teacher.safetensors")
        checkpoint.save_weights(path, MODELS["resnet8x0.25"].build(10).network, {})
        if seed == 0:
            tuned = tune("kd.weight=1,2")
            assert tune("kd.weight=1,2") == tuned
    with pytest.raises(ValueError, match="was trained with another teacher than"):
        tune("kd.weight=1,2")
    with pytest.raises(ValueError, match="was trained with another teacher than"):
        tune("kd.weight=1,2,3,4")  # although some trials are new


def test_a_trial_that_diverges_loses_and_the_others_go_on(here):
    tuned = tune("optimizer.lr=100000,0.05", "epochs=2")
    states = {trial.values["optimizer.lr"]: trial for trial in tuned.trials}
    assert states[100000].state == "failed"
    assert "epoch" in states[100000].note or "NaN" in states[100000].note
    assert tuned.best is states[0.05]
    with pytest.raises(ValueError, match="none of 1 trials is complete"):
        tune("optimizer.lr=100000", "epochs=2")


def test_the_best_of_a_loss_is_the_smallest(here, scored):
    scored(lambda recipe: recipe.losses[1].weight)
    assert tune("kd.weight=3,1,2", metric="nll").best.values == {"kd.weight": 1}
    assert tune("kd.weight=3,1,2").best.values == {"kd.weight": 3}


def test_a_metric_on_request_is_computed_for_every_trial(here):
    tuned = tune("optimizer.lr=0.1", metric="knn")
    assert 0 < tuned.best.score <= 100
    assert tuned.recipe.evaluation == ()


# --- What is tried -------------------------------------------------------------------------------


@pytest.mark.parametrize("trials", [12, 40, 11, 3])
def test_nothing_is_tried_twice(here, scored, trials):
    run = scored(lambda recipe: recipe.losses[1].weight / recipe.optimizer.lr)
    tuned = tune("kd.weight=1,2,3,4", "optimizer.lr=0.1,0.2,0.3", trials=trials)
    assert len(tuned.trials) == len({recipe.hash for recipe in run}) == min(trials, 12)


def test_a_range_is_searched_the_same_way_for_the_same_seed(here, scored):
    scored(lambda recipe: -abs(recipe.losses[1].weight - 2))
    tuned, again, other = (
        tune("kd.weight=0.5..8", "optimizer.lr=0.1,0.2", trials=15, seeds=(seed,))
        for seed in (100, 100, 7)
    )
    assert tuned.trials == again.trials
    assert tuned.trials != other.trials
    weights = [trial.values["kd.weight"] for trial in tuned.trials]
    assert len(set(weights)) == 15
    assert all(0.5 <= weight <= 8 for weight in weights)
    assert tuned.best.score == max(trial.score for trial in tuned.trials)
    assert tuned.recipe.losses[1].weight == tuned.best.values["kd.weight"]


@pytest.mark.parametrize(
    ("change", "values"),
    [("kd.weight=4..4.002", 20), ("kd.weight=1..1.0000000000000002", 2), ("kd.weight=1,2", 2)],
)
def test_narrow_spaces_have_an_end(here, scored, change, values):
    scored(lambda recipe: -recipe.losses[1].weight)
    found = tune(change, trials=20)
    assert len(found.trials) == values
    weights = [trial.values["kd.weight"] for trial in found.trials]
    assert len(set(weights)) == values


def test_a_search_without_a_complete_trial_says_why(here, scored):
    def fail(recipe):
        raise ValueError("the loss kd is NaN in epoch 1")

    scored(fail)
    with pytest.raises(
        ValueError, match=r"none of 2 trials is complete: the loss kd is NaN in epo"
    ):
        tune("kd.weight=1,2", trials=2)


def test_no_held_out_images_are_refused(call, here):
    status, _, err = call("tune", "tiny.yaml", "kd.weight=1,2", "--validation", "0")
    assert (status, err.count("\n")) == (2, 1)
    assert "--validation: expected a fraction" in err


def test_lists_and_ranges_are_read():
    space = read_space(["a=1e-3,2", "b=[1, 2],[3]", "c=ab,null", "d=.5..1e1", "e=-1..1"])
    assert space["a"] == (0.001, 2)
    assert space["b"] == ([1, 2], [3])
    assert space["c"] == ("ab", None)
    assert (space["d"], space["d"].is_logarithmic) == (Range(0.5, 10.0), True)
    assert (space["e"], space["e"].is_logarithmic) == (Range(-1.0, 1.0), False)


@pytest.mark.parametrize("key", ["losses.kd.share", "kd.share", "losses.1.share"])
def test_a_key_is_one_of_the_recipe_or_of_a_term(here, key):
    recipe = recipes.load("tiny.yaml", ["losses.kd.weight=1", "data.validation=0.1"])
    chosen = with_values(recipe, {key: 0.1})
    assert chosen.losses[1].share == 0.1
    assert chosen.data.validation == 0
    assert with_values(chosen, {"kd.weight": 3}).losses[1].model_dump()["share"] is None


def test_an_option_of_a_term_is_that_of_every_control_with_it():
    topkd = {"name": "topkd", "share": 0.1}
    tree = TINY | {
        "losses": [*TINY["losses"], topkd],
        "controls": {
            "ce": [{"name": "ce"}],
            "kd": [{"name": "ce"}, {"name": "kd", "weight": 2.0}],
            "random": [*TINY["losses"], topkd | {"edges": "random", "label": "topkd-random"}],
            "weak": [*TINY["losses"], topkd | {"share": 0.01}],
        },
    }
    chosen = with_values(recipes.parse(tree), {"kd.weight": 8, "topkd.share": 0.3})
    found = {
        variant: [(term.name, term.share or term.weight) for term in terms]
        for variant, terms in chosen.variants.items()
    }
    assert found == {
        "ce": [("ce", 1.0)],
        "kd": [("ce", 1.0), ("kd", 8.0)],
        "random": [("ce", 1.0), ("kd", 8.0), ("topkd", 0.3)],
        "weak": [("ce", 1.0), ("kd", 8.0), ("topkd", 0.01)],
        "kd+topkd": [("ce", 1.0), ("kd", 8.0), ("topkd", 0.3)],
    }


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kdd.weight=1"], "there is no key or term 'kdd'; did you mean 'kd'?"),
        (["optimizr.lr=1"], "there is no key or term 'optimizr'; did you mean 'optimizer'?"),
        (["losses.kdd.weight=1"], "there is no 'kdd'; there are ce, kd"),
        (["kd=1"], "kd is a term; set one of its options, such as kd.weight"),
        (["optimizer.lr=0.1", "kd.temprature=1,2"], "losses[1].temprature: unknown key; did you"),
        (["kd.temperature=1,2,-1"], "losses[1]: temperature must be positive, got -1"),
        (["optimizer.lr=0.1,x"], "optimizer.lr: expected number, got 'x'"),
        (["optimizer.lr=0.1..1e9"], "optimizer.lr: expected less than or equal to"),
        (["epochs=2..5"], "epochs: expected integer, got 2.0"),
        (["kd.weight=5..1"], "a range is written LOW..HIGH, with LOW < HIGH"),
        (["kd.weight=1..2,3"], "a range cannot be combined with other values"),
        (["kd.weight=1,2,1"], "kd.weight=1,2,1: 1 appears twice"),
        (["kd.weight=1", "kd.weight=2"], "kd.weight appears twice"),
        (["kd.weight=1,2", "losses.kd.weight=1,2"], "kd.weight: two values have the same effect"),
        (["kd.weight"], "expected KEY=VALUE,VALUE,... or KEY=LOW..HIGH, got 'kd.weight'"),
        (["kd.weight="], "kd.weight=: there is no value to try"),
        (["kd.weight=[1"], "kd.weight=[1: the list of values is not YAML"),
        (["controls.ce.0.weight=1,2"], "controls.ce.0.weight cannot be tuned"),
        (["data.validation=0.1,0.2"], "data.validation cannot be tuned"),
        (["evaluation=[],[knn]"], "evaluation cannot be tuned: it has no effect on a trial"),
        (["kd.weight=1", "--metric", "top2"], "--metric: there is no 'top2'; did you mean"),
        (["kd.weight=1", "--validation", "1"], "--validation: expected a fraction below 1, got 1"),
        (["kd.weight=1", "--to", "teacher.yaml"], "teacher.yaml exists and is not a tuned recipe"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_first_trial(call, here, words, message):
    status, out, err = call("tune", "tiny.yaml", *words)
    assert (status, out) == (2, "")
    assert err.startswith("topkd: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (here / "runs").exists()


def test_a_comparison_with_the_teacher_needs_one(here):
    with pytest.raises(RecipeError, match="agreement cannot be computed without a teacher"):
        tune("optimizer.lr=0.1,0.2", name="teacher.yaml", metric="agreement")


def test_without_optuna_the_line_that_installs_it_is_told(call, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    status, _, err = call("tune", "tiny.yaml", "kd.weight=1,2")
    assert status == 2
    assert err == "topkd: topkd tune needs optuna: pip install 'topkd[search]'\n"


# --- What is printed -----------------------------------------------------------------------------


def test_the_table_shows_every_trial_and_the_file_is_replaced(call, here, scored):
    scored(lambda recipe: 10 * recipe.losses[1].weight)
    for _ in range(2):
        status, out, err = call("tune", "tiny.yaml", "kd.weight=1,2", "--to", "best.yaml")
        assert status == 0, err
        rows = [line.split() for line in out.splitlines()]
        assert sorted(row[1:] for row in rows if row[0].isdigit()) == [
            ["1", "10.00", "complete"],
            ["2", "20.00", "best"],
        ]
        assert out.endswith("tuned recipe: best.yaml\n")
        assert "trials hold out 0.2 of the training images" in err
        assert "trial 2 of 2, kd.weight=" in err
        assert recipes.load("best.yaml").losses[1].weight == 2
