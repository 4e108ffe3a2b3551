"""Recipes carried out: stages, resuming, folders, and every recipe that ships."""

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import yaml

from topkd._io import files
from topkd._io.progress import Progress
from topkd.config import recipe
from topkd.config.validation import RecipeError
from topkd.data import DATA, Data, InMemory
from topkd.evaluation import metrics
from topkd.export.student import export
from topkd.features import FeatureExtractor, Teacher
from topkd.losses import LOSSES
from topkd.models import MODELS, checkpoint
from topkd.topology.approximation import Approximation
from topkd.training import run_folder
from topkd.training.check import check, teacher_recipe
from topkd.training.evaluate import evaluate_file
from topkd.training.experiment import Experiment
from topkd.training.teacher_cache import TeacherCache

QUIET = Progress(quiet=True)
TINY = {
    "name": "tiny",
    "data": {"name": "digits", "limit": 200},
    "student": {"model": "resnet8x0.25"},
    "losses": [
        {"name": "ce"},
        {"name": "kd", "weight": 2.0},
        {"name": "topkd", "weight": 5e3, "via": "ripsnet", "training": {"passes": 2, "epochs": 2}},
    ],
    "controls": {
        "kd": [{"name": "ce"}, {"name": "kd", "weight": 2.0}],
        "silent": [
            {"name": "ce"},
            {"name": "kd", "weight": 2.0},
            {
                "name": "topkd",
                "weight": 0.0,
                "via": "ripsnet",
                "training": {"passes": 2, "epochs": 2},
            },
        ],
    },
    "epochs": 2,
    "batch_size": 32,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A recipe whose teacher is trained by a recipe of its own, and where it was run."""
    folder = tmp_path_factory.mktemp("tiny")
    teacher = {
        "data": {"name": "digits"},
        "student": {"model": "resnet8"},
        "losses": [{"name": "ce"}],
        "epochs": 1,
        "batch_size": 32,
    }
    (folder / "taught.yaml").write_text(yaml.safe_dump(teacher), encoding="utf-8")
    taught_by = {"model": "resnet8", "recipe": str(folder / "taught.yaml")}
    parsed = recipe.parse(TINY | {"teacher": taught_by})
    experiment = Experiment(parsed, folder / "runs", QUIET)
    results = {variant: experiment.train_student(0, variant) for variant in parsed.variants}
    return experiment, results


def weights(experiment: Experiment, variant: str):
    return checkpoint.load_weights(experiment.folder / variant / "seed0" / "student.safetensors")


def test_every_stage_leaves_what_the_next_needs(tiny):
    experiment, results = tiny
    assert (
        experiment.teacher_file == experiment.out / "taught-limit-200/ce/seed0/student.safetensors"
    )
    assert experiment.teacher_file.exists()
    assert len(list(experiment.folder.glob("ripsnet-*.safetensors"))) == 1  # one for both variants
    for variant in ("kd+topkd", "kd", "silent"):
        files = {path.name for path in (experiment.folder / variant / "seed0").iterdir()}
        assert {"result.json", "metrics.jsonl", "student.safetensors", "checkpoint"} <= files
        assert results[variant]["last"]["top1"] == pytest.approx(
            evaluate_file(experiment.folder / variant / "seed0", None, (), QUIET)["top1"]
        )


@pytest.mark.parametrize(
    "ask",
    [
        lambda target, out: evaluate_file(target, None, (), QUIET),
        lambda target, out: export(target, ["safetensors"], out, QUIET),
    ],
    ids=["evaluate", "export"],
)
def test_a_folder_of_runs_is_told_which_there_are(tiny, tmp_path, ask):
    out = tiny[0].out
    runs = [f"{out}/taught-limit-200/ce/seed0"]
    runs = [
        *(f"{tiny[0].folder}/{variant}/seed0" for variant in ("kd", "silent", "kd+topkd")),
        *runs,
    ]
    message = f"there is no run {out}: {out}/student.safetensors is missing; there are "
    with pytest.raises(FileNotFoundError, match=re.escape(message + ", ".join(sorted(runs))) + "$"):
        ask(out, tmp_path / "out")


def test_a_silent_term_changes_no_bit(tiny):
    experiment, _ = tiny
    with_term, without = weights(experiment, "silent"), weights(experiment, "kd")
    for name, tensor in without.items():
        assert torch.equal(tensor, with_term[name]), name


def test_the_term_is_not_silent_at_its_weight(tiny):
    experiment, _ = tiny
    with_term, without = weights(experiment, experiment.recipe.main), weights(experiment, "kd")
    assert any(not torch.equal(t, with_term[name]) for name, t in without.items())


def test_what_is_done_is_not_done_again(tiny):
    experiment, results = tiny
    again = Experiment(experiment.recipe, experiment.out, QUIET)
    assert again.train_student(0, "kd") == results["kd"]
    assert "data" not in vars(again)  # not even the images were loaded


def test_a_folder_of_another_recipe_is_refused(tiny):
    experiment, _ = tiny
    other = experiment.recipe.model_copy(update={"epochs": 7})
    with pytest.raises(ValueError, match="another recipe: epochs: 2 there, 7 here; .* name=NAME"):
        Experiment(other, experiment.out, QUIET).train_student(0, "kd")


def test_a_finished_run_of_another_teacher_is_refused(tmp_path):
    path, tree = tmp_path / "teacher.safetensors", TINY | {"controls": {}, "epochs": 1}
    tree |= {"losses": [{"name": "ce"}, {"name": "kd"}]}
    tree |= {"teacher": {"model": "resnet8", "checkpoint": str(path)}}
    for seed in (0, 1):
        torch.manual_seed(seed)
        checkpoint.save_weights(path, MODELS["resnet8"].build(10).network, {})
        experiment = Experiment(recipe.parse(tree), tmp_path / "runs", QUIET)
        if seed == 0:
            assert experiment.train_student(0) == experiment.train_student(0)
    message = "kd/seed0 was trained with another teacher than .*teacher.safetensors now holds"
    with pytest.raises(ValueError, match=message):
        experiment.train_student(0)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "beside the teacher"])
def test_a_finished_run_is_refused_after_its_teachers_recipe_changed(tmp_path, recorded):
    file, tree = tmp_path / "taught.yaml", TINY | {"controls": {}, "epochs": 1}
    taught = {key: TINY[key] for key in ("data", "student", "batch_size")}
    taught |= {"losses": [{"name": "ce"}], "epochs": 1}
    tree |= {"losses": [{"name": "ce"}, {"name": "kd"}]}
    tree |= {"teacher": {"model": "resnet8x0.25", "recipe": str(file)}}
    file.write_text(yaml.safe_dump(taught), encoding="utf-8")
    parsed = recipe.parse(tree)
    experiment = Experiment(parsed, tmp_path / "runs", QUIET)
    first = experiment.train_student(0)
    assert first["teacher"]["recipe_hash"] == teacher_recipe(parsed).hash
    if not recorded:
        path = experiment.run_folder(0) / "result.json"
        del first["teacher"]["recipe_hash"]
        files.write_sealed(path, first)
    assert experiment.train_student(0) == first
    changed = taught | ({"name": "renamed"} if recorded else {}) | {"epochs": 4}
    file.write_text(yaml.safe_dump(changed), encoding="utf-8")
    with pytest.raises(ValueError, match=r"taught.yaml now is; undo the change .* --out$"):
        Experiment(parsed, tmp_path / "runs", QUIET).train_student(0)


def test_a_run_is_finished_when_seen_from_another_folder(tmp_path, monkeypatch):
    taught = {key: TINY[key] for key in ("data", "student", "batch_size")}
    taught |= {"losses": [{"name": "ce"}], "epochs": 1}
    tree = TINY | {"controls": {}, "losses": [{"name": "ce"}, {"name": "kd"}], "epochs": 1}
    tree |= {"teacher": {"model": "resnet8x0.25", "recipe": "taught.yaml"}}
    for folder in (tmp_path, tmp_path / "inner"):
        folder.mkdir(exist_ok=True)
        for name, content in (("tiny", tree), ("taught", taught)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        taught = taught | {"epochs": 2, "name": "other"}
    found = []
    for place, path in ((".", "tiny.yaml"), ("inner", "../tiny.yaml")):
        monkeypatch.chdir(tmp_path / place)
        experiment = Experiment(recipe.load(path), tmp_path / "runs", QUIET)
        found.append(experiment.train_student(0))
    assert found[0] == found[1]
    other = Experiment(recipe.load("tiny.yaml"), tmp_path / "runs", QUIET)
    with pytest.raises(ValueError, match=r"has a teacher of another recipe than taught.yaml"):
        other.train_student(0)


def test_a_result_of_another_recipe_is_refused_without_its_recipe_file(tiny, tmp_path):
    shutil.copytree(tiny[0].folder, tmp_path / "runs/tiny")
    (tmp_path / "runs/tiny/recipe.yaml").unlink()
    other = tiny[0].recipe.model_copy(update={"epochs": 7})
    with pytest.raises(ValueError, match="kd/seed0 is the run of another recipe"):
        Experiment(other, tmp_path / "runs", QUIET).train_student(0, "kd")


def test_a_folder_in_which_a_run_has_just_begun_is_not_taken_over(tmp_path):
    ours, theirs = (
        recipe.parse(
            TINY | {"teacher": None, "controls": {}, "losses": [{"name": "ce"}], "epochs": epochs}
        )
        for epochs in (5, 9)
    )
    folder = tmp_path / "tiny"
    run_folder.claim(folder, ours)
    with run_folder.locked(folder / "ce/seed0", QUIET):
        run_folder.claim(folder, ours, own=folder / "ce/seed0")
        with pytest.raises(ValueError, match="holds runs of another recipe: epochs: 5 there"):
            run_folder.claim(folder, theirs)
    run_folder.claim(folder, theirs)  # nothing has come of the first


def test_an_unknown_run_is_refused(tiny):
    with pytest.raises(RecipeError, match="there is no 'kdd'; did you mean 'kd'"):
        tiny[0].train_student(0, "kdd")


def test_a_ripsnet_of_another_teacher_is_refused(tiny, tmp_path):
    experiment, _ = tiny
    (made,) = experiment.folder.glob("ripsnet-*.safetensors")
    other = MODELS["resnet8"].build(10).network
    checkpoint.save_weights(tmp_path / "other.safetensors", other, {})
    tree = TINY | {
        "name": "foreign",
        "teacher": {"model": "resnet8", "checkpoint": str(tmp_path / "other.safetensors")},
        "losses": [{"name": "topkd", "via": "ripsnet", "file": str(made)}],
        "controls": {},
    }
    with pytest.raises(ValueError, match="trained for another teacher"):
        Experiment(recipe.parse(tree), tmp_path, QUIET).fit_losses()


def test_a_teacher_that_does_not_fit_its_checkpoint_is_refused(tmp_path):
    checkpoint.save_weights(tmp_path / "w.safetensors", MODELS["resnet14"].build(10).network, {})
    taught_by = {"model": "resnet8", "checkpoint": str(tmp_path / "w.safetensors")}
    experiment = Experiment(recipe.parse(TINY | {"teacher": taught_by}), tmp_path, QUIET)
    with pytest.raises(ValueError, match="does not fit this network:\n  layer1.1.bn1.bias"):
        experiment.train_student(0, "kd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"name": "digit"}}, "data.name: there is no 'digit'; did you mean 'digits'"),
        ({"data": {"name": "digits", "root": "x"}}, "data.root: unknown key"),
        ({"student": {"model": "resnet9"}}, "student.model: there is no 'resnet9'; did you mean"),
        ({"losses": [{"name": "kdd"}]}, r"losses\[0\].name: there is no 'kdd'; did you mean 'kd'"),
        (
            {"losses": [{"name": "kd", "temprature": 4.0}], "controls": {}},
            r"losses\[0\].temprature: unknown key; did you mean 'temperature'",
        ),
        (
            {"losses": [{"name": "kd", "temperature": -1.0}], "controls": {}},
            r"losses\[0\]: temperature must be positive, got -1.0",
        ),
        (
            {"losses": [{"name": "topkd", "via": "exakt"}]},
            r"losses\[0\].via: expected 'exact', 'ripsnet' or 'distancenet', got 'exakt'",
        ),
        ({"teacher": None}, r"controls.kd\[1\]: kd cannot be computed without a teacher"),
        ({"losses": [{"name": "ce"}, {"name": "ce"}]}, "losses: ce appears twice"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_work(tmp_path, changes, message):
    tree = TINY | {"teacher": {"model": "resnet8", "checkpoint": "absent"}} | changes
    with pytest.raises(RecipeError, match=message):
        Experiment(recipe.parse(tree), tmp_path / "runs", QUIET)
    assert not (tmp_path / "runs").exists()


def noise(**options) -> Data:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (320, 32, 32, 3), dtype=torch.uint8, generator=generator)
    statistics = ((0.5,) * 3, (0.25,) * 3)
    images = InMemory(pixels[:256], torch.arange(256) % 100, *statistics, padding=4, flip=True)
    test = InMemory(pixels[256:], torch.arange(64), *statistics, padding=4, flip=True)
    return Data("noise", images, test, [str(c) for c in range(100)], *statistics)


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_is_read_written_read_again_and_right(name):
    read = recipe.load(name)
    assert recipe.parse(yaml.safe_load(recipe.write(read))) == read
    assert recipe.about(name)
    options = {} if read.data.name in ("digits", "cifar100") else {"root": "FOLDER"}
    tree = read.model_dump(mode="json")
    check(recipe.parse(tree | {"data": tree["data"] | options}))


def is_small(name):
    """Whether a recipe trains in a second or two."""
    return name.startswith("digits") or name.removeprefix("methods/resnet20-resnet8/") in (
        "cifar100/resnet20-resnet8",
        "ab",
        "crd",
        "mlkd",
        "simkd",
    )


@torch.no_grad()
def with_statistics(network):
    """Sets the statistics of batch normalization: without, activations of deep networks explode."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(torch.randn(32, 3, 32, 32))
    return network.eval()


@pytest.mark.parametrize(
    "name",
    [
        name if is_small(name) else pytest.param(name, marks=pytest.mark.slow)
        for name in recipe.names()
        if not name.startswith(("imagenet", "own"))  # their networks would have to be downloaded
    ],
)
def test_every_recipe_can_be_trained(name, tmp_path, monkeypatch):
    read = recipe.load(name)
    monkeypatch.setattr("topkd.training.build.DATA", DATA | {read.data.name: lambda: noise()})
    staged = any(term.start < 1 for terms in read.variants.values() for term in terms)
    changes = [f"epochs={2 if staged else 1}", "batch_size=64"]
    if read.teacher is not None:
        network = with_statistics(MODELS[read.teacher.model].build(100).network)
        checkpoint.save_weights(tmp_path / "teacher.safetensors", network, {})
        changes.append(f"teacher.checkpoint={tmp_path / 'teacher.safetensors'}")
    for place in ("losses", *(f"controls.{variant}" for variant in read.controls)):
        terms = read.losses if place == "losses" else read.controls[place.split(".")[1]]
        if any(term.options.get("via") == "ripsnet" for term in terms):
            changes.append(f"{place}.topkd.training={{passes: 1, epochs: 1}}")
        if any(term.name == "ft" for term in terms):
            changes.append(f"{place}.ft.epochs=1")
    experiment = Experiment(recipe.load(name, changes), tmp_path, QUIET)
    result = experiment.train_student(0)
    assert 0 <= result["last"]["top1"] <= 100
    shutil.rmtree(tmp_path / name)


def test_a_run_warns_of_a_warm_up_that_never_ends(tmp_path):
    said, progress = [], Progress(quiet=True)
    progress.say = said.append
    tree = {key: value for key, value in TINY.items() if key not in ("teacher", "controls")}
    tree |= {"losses": [{"name": "ce", "warmup": 4}], "epochs": 1}
    Experiment(recipe.parse(tree), tmp_path, progress).train_student(0)
    warning = "warning: losses[0]: ce reaches 25% of its weight: warmup 4 does not fit into its "
    assert f"{warning}epochs, 1 to 1" in said


@pytest.fixture
def taught(tiny):
    """What a recipe needs to have the tiny teacher, and where that is."""
    experiment, _ = tiny
    return {"model": "resnet8", "checkpoint": str(experiment.teacher_file)}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_teacher_cache_teach_the_same_to_rounding(taught, tmp_path, precision):
    learned = {}
    for cache in (False, True):
        tree = TINY | {"name": f"cache {cache}", "precision": precision, "epochs": 1}
        tree |= {"teacher": taught | {"cache": cache}, "losses": TINY["controls"]["kd"]}
        experiment = Experiment(recipe.parse(tree | {"controls": {}}), tmp_path, QUIET)
        experiment.train_student(0)
        learned[cache] = weights(experiment, experiment.recipe.main)
    # In bfloat16 the teacher's answers are rounded already.
    tolerance = {"rtol": 0, "atol": 0 if precision == "bfloat16" else 2e-3}
    for name, tensor in learned[False].items():
        torch.testing.assert_close(learned[True][name], tensor, **tolerance, msg=name)


def test_a_teacher_is_asked_once_for_all_arms_and_seeds(taught, tmp_path, monkeypatch):
    tree = TINY | {"teacher": taught | {"cache": True}, "losses": TINY["controls"]["kd"]}
    tree |= {"data": TINY["data"] | {"augmentation_seed": 0}, "controls": {"ce": [{"name": "ce"}]}}
    experiment = Experiment(recipe.parse(tree), tmp_path, QUIET)
    asked = []
    call = TeacherCache.__call__

    def counting(self, batch, epoch, ask):
        before = self.computed
        answer = call(self, batch, epoch, ask)
        asked.append(self.computed - before)
        return answer

    monkeypatch.setattr(TeacherCache, "__call__", counting)
    experiment.train_student(0)
    assert sum(asked) == len(asked) * 32  # every batch of the first student
    asked.clear()
    experiment.train_student(0, "ce")
    assert sum(asked) == 0
    asked.clear()
    experiment.train_student(1)  # another order: what was left out may be missing
    assert 0 < sum(asked) < len(asked) * 32


def test_losses_are_fitted_to_cached_features(taught, tmp_path, monkeypatch):
    tree = TINY | {"teacher": taught | {"cache": True}, "losses": TINY["controls"]["kd"]}
    tree |= {"data": TINY["data"] | {"augmentation_seed": 3}, "controls": {}}
    tree |= {"precision": "float32"}
    first, again = (Experiment(recipe.parse(tree), tmp_path, QUIET) for _ in range(2))
    shown = [batch.images for batch, _ in first.teacher_features(0)]
    asked = [first.teacher(images).embedding for images in shown]
    (later, _), *_ = first.teacher_features(1)
    assert not torch.equal(later.images, shown[0])
    assert again.teacher_outputs.predictions is not None
    monkeypatch.setattr(Teacher, "forward", None)  # not called for images that are cached
    found = list(again.teacher_features(0))
    for (batch, features), images, embedding in zip(found, shown, asked, strict=True):
        assert torch.equal(batch.images, images)
        torch.testing.assert_close(features.embedding, embedding, rtol=2**-7, atol=2**-7)


def test_a_teacher_that_no_term_reads_is_not_asked_in_training(taught, tmp_path, monkeypatch):
    sizes = []
    forward = Teacher.forward

    def counting(self, images):
        sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Teacher, "forward", counting)
    tree = TINY | {"teacher": taught, "losses": [{"name": "ce"}], "controls": {}}
    result = Experiment(recipe.parse(tree), tmp_path, QUIET).train_student(0)
    assert sizes.count(32) == 1  # the setup of the losses; training would add 12
    assert result["teacher_similarity"]


def test_the_last_evaluation_is_that_of_the_result(taught, tmp_path, monkeypatch):
    counted = []
    predict = metrics.predict

    def counting(network, *arguments):
        counted.append(isinstance(network, FeatureExtractor))
        return predict(network, *arguments)

    monkeypatch.setattr(metrics, "predict", counting)
    tree = TINY | {"teacher": taught, "losses": TINY["controls"]["kd"], "controls": {}}
    experiment = Experiment(recipe.parse(tree | {"precision": "bfloat16"}), tmp_path, QUIET)
    result = experiment.train_student(0)
    assert sum(counted) == 2  # of the student, one in each epoch
    folder = experiment.folder / experiment.recipe.main / "seed0"
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["test_top1"] == result["last"]["top1"]
    assert result["last"]["top1"] == pytest.approx(evaluate_file(folder, None, (), QUIET)["top1"])


def test_answers_of_a_teacher_that_sees_otherwise_are_kept_apart(taught, tmp_path):
    folders = set()
    for changes in ({}, {"mean": [0.1] * 3, "std": [0.5] * 3}, {"size": 16}):
        teacher = taught | {"cache": True} | changes
        tree = TINY | {"teacher": teacher, "controls": {}, "losses": TINY["controls"]["kd"]}
        experiment = Experiment(recipe.parse(tree), tmp_path, QUIET)
        folders |= {experiment.teacher_outputs.cache(seed).folder for seed in (0, 1)}
    assert len(folders) == 6


def test_a_loss_learns_from_what_it_will_see(taught, tmp_path, monkeypatch):
    asked = {}

    def setup(loss, student, teacher, context):
        asked[len(asked)] = context, teacher

    monkeypatch.setattr(LOSSES["kd"], "setup", setup)
    early = {"teacher": {"embedding": "layer1", "maps": ["layer2"]}}
    terms = [{"name": "ce"}, {"name": "kd"}, {"name": "kd", "label": "early", "taps": early}]
    tree = TINY | {"teacher": taught, "controls": {}, "losses": terms}
    experiment = Experiment(recipe.parse(tree), tmp_path, QUIET)
    experiment.losses(experiment.recipe.main, experiment.new_student(), 0)
    (usual, shown), (own, seen) = asked.values()
    assert (shown.embedding.shape, seen.embedding.shape) == ((32, 64), (32, 16))
    for source, width, maps in ((usual, 64, 4), (own, 16, 1)):
        _, answer = next(iter(source.teacher_batches(0)))
        assert answer.embedding.shape == (32, width)
        assert len(answer.maps) == maps
    assert usual.teacher_hash != own.teacher_hash  # nothing that was learned is taken for the other
    assert own.taps.teacher.maps == ("layer2",)


def test_a_loss_is_built_for_batches_as_they_are_with_two_views(taught, tmp_path):
    tree = TINY | {"teacher": taught, "controls": {}, "data": TINY["data"] | {"views": 2}}
    experiment = Experiment(recipe.parse(tree), tmp_path, QUIET)
    experiment.fit_losses()
    (path,) = experiment.folder.glob("ripsnet-*.safetensors")
    assert (
        Approximation.from_bytes(path.read_bytes()).cloud_size == 2 * experiment.recipe.batch_size
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": TINY["data"] | {"mixup": 0.2}}, "teacher.cache: the cache stores features per"),
        ({"data": TINY["data"] | {"views": 2}}, "teacher.cache: the cache stores features per"),
        (
            {"losses": [{"name": "ce"}, {"name": "at"}]},
            r"losses\[1\]: at reads feature maps or taps",
        ),
    ],
)
def test_answers_that_cannot_be_kept_are_refused(taught, tmp_path, changes, message):
    tree = TINY | {"teacher": taught | {"cache": True}, "controls": {}} | changes
    with pytest.raises(RecipeError, match=message):
        Experiment(recipe.parse(tree), tmp_path, QUIET).train_student(0)


def test_a_student_with_its_teachers_classifier_is_evaluated_from_its_file(taught, tmp_path):
    tree = TINY | {"teacher": taught, "losses": [{"name": "simkd"}], "controls": {}}
    tree |= {"student": {"model": "resnet8x0.25", "classifier": "teacher"}, "epochs": 1}
    experiment = Experiment(recipe.parse(tree), tmp_path, QUIET)
    result = experiment.train_student(0)
    folder = experiment.folder / experiment.recipe.main / "seed0"
    judged = evaluate_file(folder, None, (), QUIET)
    assert judged["top1"] == pytest.approx(result["last"]["top1"])
    config = export(folder, ["safetensors", "onnx"], tmp_path / "out", QUIET)
    assert config["files"]["model.onnx"]["largest_difference"] <= 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [{"name": "simkd"}]}, r"losses\[0\]: simkd needs student.classifier=teacher"),
        (
            {"student": {"model": "resnet8", "classifier": "teacher"}, "teacher": None},
            "student.classifier: reusing the teacher's classifier needs a teacher",
        ),
        (
            {"teacher": {"model": "resnet8", "checkpoint": "x", "classifier": "teacher"}},
            "teacher: classifier is an option of the student",
        ),
    ],
)
def test_a_classifier_that_nobody_has_is_refused(tmp_path, changes, message):
    tree = TINY | {"teacher": {"model": "resnet8", "checkpoint": "unused"}}
    tree |= {"losses": [{"name": "ce"}], "controls": {}} | changes
    with pytest.raises(RecipeError, match=message):
        check(recipe.parse(tree))


def test_classes_in_another_order_than_the_teachers_are_refused(taught, tiny, tmp_path):
    path = tmp_path / "teacher.safetensors"
    network = MODELS["resnet8"].build(10).network
    names = list(tiny[0].data.classes)
    swapped = [f"digit {name}" for name in [names[1], names[0], *names[2:]]]
    checkpoint.save_weights(path, network, {"classes": swapped})
    experiment = Experiment(
        recipe.parse(TINY | {"teacher": {"model": "resnet8", "checkpoint": str(path)}}),
        tmp_path,
        QUIET,
    )
    named = [f"digit {name}" for name in names]
    experiment.data = replace(experiment.data, classes=named)
    with pytest.raises(ValueError, match=f"class 0 is '{named[0]}' in the data and '{named[1]}'"):
        experiment.train_student(0, "kd")


@pytest.mark.parametrize(
    "asked",
    [
        {"model": "intruder:build", "data": {"name": "digits"}},
        {"model": "resnet8", "data": {"name": "dataset", "train": "intruder:a", "test": "b:c"}},
    ],
)
def test_a_file_cannot_have_code_run(asked, tmp_path, monkeypatch):
    (tmp_path / "intruder.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "weights.safetensors"
    network = MODELS["resnet8"].build(10).network
    about = {"classes": [str(c) for c in range(10)], "mean": [0.5] * 3, "std": [0.5] * 3}
    checkpoint.save_weights(path, network, about | asked)
    with pytest.raises(ValueError, match="asks to (run|open) .*intruder:"):
        evaluate_file(path, None, (), QUIET)
    with pytest.raises(ValueError, match="asks to (run|open) .*intruder:"):
        export(path, ["safetensors"], tmp_path / "out", QUIET)
    with pytest.raises(SystemExit, match="ran"):  # the user's own word
        evaluate_file(path, None, (), QUIET, trust=True)


def altered(path, how):
    content = path.read_bytes()
    if how == "flipped":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif how == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut off", "emptied", "deleted"])
@pytest.mark.parametrize("name", ["student.safetensors", "metrics.jsonl", "examples.safetensors"])
def test_a_finished_run_whose_files_were_altered_is_not_done(tiny, tmp_path, name, how):
    experiment, _ = tiny
    shutil.copytree(experiment.out, tmp_path / "runs")
    path = tmp_path / "runs" / experiment.recipe.name / "kd/seed0" / name
    altered(path, how)
    with pytest.raises(ValueError, match=rf"{name} (was altered|is missing)"):
        Experiment(experiment.recipe, tmp_path / "runs", QUIET).train_student(0, "kd")


@pytest.mark.parametrize("how", ["flipped", "cut off", "emptied"])
def test_an_altered_result_is_not_used(tiny, tmp_path, how):
    experiment, _ = tiny
    shutil.copytree(experiment.out, tmp_path / "runs")
    path = tmp_path / "runs" / experiment.recipe.name / "kd/seed0/result.json"
    altered(path, how)
    with pytest.raises(ValueError, match=r"result\.json (was altered|is not JSON)"):
        Experiment(experiment.recipe, tmp_path / "runs", QUIET).train_student(0, "kd")


@pytest.mark.parametrize("how", ["flipped", "cut off", "emptied"])
def test_an_altered_ripsnet_is_not_used(tiny, tmp_path, how):
    experiment, _ = tiny
    shutil.copytree(experiment.out, tmp_path / "runs")
    (path,) = (tmp_path / "runs" / experiment.recipe.name).glob("ripsnet-*.safetensors")
    altered(path, how)
    again = Experiment(experiment.recipe, tmp_path / "runs", QUIET)
    with pytest.raises(ValueError, match=rf"{path.name} was altered; delete it"):
        again.losses(again.recipe.main, again.new_student(), 0)


class Stops(Progress):
    """Ends the work after the first epoch of a student, as Ctrl-C does."""

    @contextmanager
    def bar(self, title, total, unit):
        def advance(amount, news):
            if "seed" in title and news.startswith("epoch 1/"):
                raise KeyboardInterrupt

        yield advance


def stopped(tree, out):
    experiment = Experiment(recipe.parse(tree), out, Stops(quiet=True))
    with pytest.raises(KeyboardInterrupt):
        experiment.train_student(0)
    return experiment


def with_teacher(folder, seed):
    """The tiny recipe with one term, and a teacher in a file."""
    torch.manual_seed(seed)
    path = folder / "teacher.safetensors"
    checkpoint.save_weights(path, MODELS["resnet8x0.25"].build(10).network, {})
    return TINY | {
        "name": "stopped",
        "teacher": {"model": "resnet8x0.25", "checkpoint": str(path)},
        "losses": [{"name": "ce"}, {"name": "kd"}],
        "controls": {},
    }


def test_a_run_is_not_resumed_with_another_teacher(tmp_path):
    tree = with_teacher(tmp_path, seed=0)
    stopped(tree, tmp_path / "runs")
    with_teacher(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"was trained with another teacher: \w{12} there and"):
        Experiment(recipe.parse(tree), tmp_path / "runs", QUIET).train_student(0)
    with_teacher(tmp_path, seed=0)
    result = Experiment(recipe.parse(tree), tmp_path / "runs", QUIET).train_student(0)
    assert result["epochs"] == TINY["epochs"]


def test_another_version_resumes_with_a_warning(tmp_path, monkeypatch):
    tree = with_teacher(tmp_path, seed=0)
    stopped(tree, tmp_path / "runs")
    monkeypatch.setattr("topkd.__version__", "99.0")
    said = []
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "say", said.append)
    Experiment(recipe.parse(tree), tmp_path / "runs", progress).train_student(0)
    assert any("was trained by topkd" in line and "99.0" in line for line in said)


def test_what_killed_writes_left_is_swept(tmp_path):
    tree = with_teacher(tmp_path, seed=0)
    folder = tmp_path / "runs/stopped/kd/seed0"
    (folder / "checkpoint").mkdir(parents=True)
    for left in (folder / ".result.json.abc.tmp", folder / "checkpoint/.state-1.pt.abc.tmp"):
        left.write_bytes(b"half")
    Experiment(recipe.parse(tree), tmp_path / "runs", QUIET).train_student(0)
    assert not list(folder.rglob("*.tmp"))


def test_a_command_that_failed_early_does_not_claim_the_folder(tmp_path):
    tree = with_teacher(tmp_path, seed=0)
    typo = tree | {"teacher": tree["teacher"] | {"checkpoint": str(tmp_path / "typo.pth")}}
    with pytest.raises(OSError, match=r"typo\.pth"):
        Experiment(recipe.parse(typo), tmp_path / "runs", QUIET).train_student(0)
    stopped(tree, tmp_path / "runs")
    smaller = tree | {"optimizer": tree.get("optimizer", {}) | {"lr": 0.02}}
    with pytest.raises(ValueError, match=r"optimizer\.lr: .* there, 0\.02 here; .*name=NAME"):
        Experiment(recipe.parse(smaller), tmp_path / "runs", QUIET).train_student(0)


def with_term(experiment, term):
    return recipe.parse(
        experiment.recipe.model_dump(mode="json", exclude_unset=True)
        | {"losses": [{"name": "ce"}, term], "controls": {}}
    )


def test_a_loss_that_cannot_be_configured_is_refused_before_anything_is_done(tiny):
    made, _ = tiny
    parsed = with_term(made, {"name": "cc", "size": 0})
    with pytest.raises(RecipeError, match=r"^losses\[1\]: size must be positive, got 0$"):
        Experiment(parsed, made.out, QUIET)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"name": "fitnet", "stage": 9}, r"^losses\.fitnet: there is no map 9: of 4 maps the last"),
        (
            {"name": "vid", "label": "deep", "skip": 9},
            r"^losses\.deep: skip leaves out the fir",
        ),
    ],
)
def test_a_loss_that_cannot_be_bound_names_its_term(tiny, term, message):
    made, _ = tiny
    experiment = Experiment(with_term(made, term), made.out, QUIET)
    with pytest.raises(ValueError, match=message):
        experiment.losses(experiment.recipe.main, experiment.new_student(), 0)
