"""What would go wrong, found before: recipes with one thing wrong each, and healthy ones."""

import sys
from dataclasses import replace
from itertools import chain, count, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from topkd._io.progress import Progress
from topkd.config import recipe
from topkd.config.terms import Term
from topkd.data import DATA, InMemory
from topkd.data.sources.digits import digits
from topkd.evaluation.metrics import Predictions
from topkd.models import MODELS, checkpoint, factory
from topkd.training import preflight
from topkd.training.experiment import Experiment
from topkd.training.preflight import runs
from topkd.training.preflight import teacher as teacher_checks

QUIET = Progress(quiet=True)
RIPSNET = {"name": "topkd", "via": "ripsnet", "training": {"passes": 1, "epochs": 1}}
TINY = {
    "name": "tiny",
    "data": {"name": "digits"},
    "student": {"model": "resnet8x0.25"},
    "losses": [{"name": "ce"}, {"name": "kd", "weight": 2.0}],
    "epochs": 4,
    "batch_size": 32,
    "precision": "float32",
}
OWN = {"mean": [0.0] * 3, "std": [1.0] * 3}  # how the teacher's images were normalized


def otherwise():
    """Digits that are not normalized as digits usually are."""
    data, (mean, std) = digits(), OWN.values()
    train, test = (replace(images, mean=mean, std=std) for images in (data.train, data.test))
    return replace(data, train=train, test=test, mean=mean, std=std)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The weights of a teacher that is right on images from 0 to 1, with its results beside."""
    out = tmp_path_factory.mktemp("teacher")
    tree = TINY | {"student": {"model": "resnet8"}, "losses": [{"name": "ce"}], "epochs": 2}
    tree["optimizer"] = {"lr": 0.1, "schedule": "one-cycle"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("topkd.training.build.DATA", DATA | {"digits": otherwise})
        experiment = Experiment(recipe.parse(tree), out, QUIET)
        assert experiment.train_student(0)["last"]["top1"] > 80
    return experiment.folder / "ce/seed0/student.safetensors"


def tiny(out, checkpoint=None, **changes):
    teacher = {"model": "resnet8", "checkpoint": str(checkpoint)} | OWN
    return Experiment(recipe.parse(TINY | {"teacher": teacher} | changes), out, QUIET)


def with_verdict(findings, verdict):
    return [finding for finding in findings if finding.verdict == verdict]


def everything_in(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_a_healthy_recipe_has_nothing_wrong_and_nothing_is_written(taught, tmp_path):
    late = {"name": "at", "start": 3, "stop": 3, "weight": 100.0}
    share = {"name": "topkd", "share": 0.2, "start": 2, "warmup": 2}
    losses = [*TINY["losses"], late, share]
    controls = {"ce": [{"name": "ce"}], "none": [{"name": "ce"}, {"name": "kd", "weight": 0.0}]}
    before = everything_in(taught.parents[3])
    findings = preflight.examine(tiny(tmp_path, taught, losses=losses, controls=controls))
    assert not with_verdict(findings, "warning") + with_verdict(findings, "error")
    parts = [finding.part for finding in findings]
    assert parts[:4] == ["data", "batches", "normalization", "teacher"]
    assert parts[-2:] == ["time", "memory"]
    assert "losses of ce" in parts
    assert "ce, kd, at, topkd: all required features are available" in [f.found for f in findings]
    assert not [*tmp_path.iterdir()]
    assert everything_in(taught.parents[3]) == before


def test_the_epoch_in_which_most_terms_count_is_found():
    generator = np.random.default_rng(0)
    for _ in range(300):
        epochs, terms = int(generator.integers(1, 40)), []
        for start, length, warmup, decay, ends in generator.integers(0, 20, (3, 5)).tolist():
            stop = start + length + 1 if ends % 2 else None
            terms.append(Term(name="ce", start=start + 1, stop=stop, warmup=warmup, decay=decay))
        counts = [runs._counting(terms, epoch, epochs) for epoch in range(1, epochs + 1)]
        assert counts[runs._fullest(terms, epochs) - 1] == pytest.approx(max(counts))


def test_the_doctor_is_as_fast_with_any_number_of_epochs(tmp_path, monkeypatch):
    asked, schedule = count(), Term.schedule
    monkeypatch.setattr(Term, "schedule", lambda *words: (next(asked), schedule(*words))[1])
    late = {"name": "ce", "label": "late", "start": 2, "stop": 10**12, "decay": 10**8}
    tree = TINY | {"losses": [{"name": "ce"}, late], "epochs": 10**13}
    assert not with_verdict(
        preflight.examine(Experiment(recipe.parse(tree), tmp_path, QUIET)), "error"
    )
    assert next(asked) < 1000


def test_a_warm_up_that_never_ends_is_reported(tmp_path):
    tree = TINY | {"losses": [{"name": "ce", "warmup": 8}], "epochs": 2}
    findings = preflight.examine(Experiment(recipe.parse(tree), tmp_path, QUIET))
    (finding,) = with_verdict(findings, "warning")
    assert finding.found.startswith("losses[0]: ce reaches 25% of its weight: warmup 8 does not")


def test_a_recipe_without_a_teacher_is_examined(tmp_path):
    alone = Experiment(recipe.parse(TINY | {"losses": [{"name": "ce"}]}), tmp_path, QUIET)
    findings = preflight.examine(alone)
    assert not with_verdict(findings, "error")
    assert "teacher" not in [finding.part for finding in findings]


# --- The teacher ---------------------------------------------------------------------------------


def without_its_record(taught, path):
    network = MODELS["resnet8"].build(10).network
    checkpoint.fill(network, checkpoint.load_weights(taught), "taught")
    checkpoint.save_weights(path, network, {})
    return path


def test_a_file_of_ours_is_shown_images_as_it_was_trained_on_them(taught, tmp_path):
    experiment = tiny(tmp_path, teacher={"model": "resnet8", "checkpoint": str(taught)})
    assert not with_verdict(preflight.examine(experiment), "error")


def test_another_normalization_is_found_and_the_right_one_named(taught, tmp_path):
    path, name = without_its_record(taught, tmp_path / "bare.safetensors"), "to 0 ... 1"
    experiment = tiny(tmp_path, teacher={"model": "resnet8", "checkpoint": str(path)})
    errors = with_verdict(preflight.examine(experiment), "error")
    (finding,) = [finding for finding in errors if finding.part == "teacher's normalization"]
    assert finding.found.endswith(f" % on images normalized {name}")
    assert finding.advice == "set 'teacher.mean=[0,0,0]' 'teacher.std=[1,1,1]'"
    (tmp_path / "tiny.yaml").write_text(recipe.write(experiment.recipe), encoding="utf-8")
    advised = recipe.load(str(tmp_path / "tiny.yaml"), finding.advice.split("'")[1::2])
    again = Experiment(advised, tmp_path, QUIET)
    assert not with_verdict(preflight.examine(again), "error")  # the advice is a change


def predictions(target, guess, classes):
    logits = torch.nn.functional.one_hot(guess, classes).float()
    return Predictions(logits, torch.zeros(len(target), 2), target)


def test_another_order_of_the_classes_is_found():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 10, (500,), generator=generator)
    right = torch.rand(500, generator=generator) < 0.7
    guess = torch.where(right, target, torch.randint(0, 10, (500,), generator=generator))
    classes = [f"name {number}" for number in range(10)]
    assert not [*teacher_checks._class_order(predictions(target, guess, 10), classes)]
    order = torch.tensor([1, 2, 3, 4, 0, 5, 6, 7, 8, 9])  # what class i is called by the teacher
    (finding,) = teacher_checks._class_order(predictions(target, order[guess], 10), classes)
    there = 100 * (guess == target)[1::2].double().mean().item()
    assert finding.found.startswith(f"top-1 {there:.2f} % with its classes in another order")
    named = [
        f"class {label}, 'name {label}', is output {order[label]} of the teacher"
        for label in range(5)
    ]
    assert any(name in finding.found for name in named)


def test_what_chance_would_mend_is_no_other_order():
    """With two images a class, the best order for all of them makes any guesses half right."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(1000).repeat(2)[torch.randperm(2000, generator=generator)]
    guess = torch.randint(0, 1000, (2000,), generator=generator)
    assert not [*teacher_checks._class_order(predictions(target, guess, 1000), [""] * 1000)]


def test_a_poor_teacher_without_a_record_is_told(tmp_path):
    checkpoint.save_weights(tmp_path / "new.safetensors", MODELS["resnet8"].build(10).network, {})
    findings = preflight.examine(tiny(tmp_path, tmp_path / "new.safetensors"))
    (finding,) = with_verdict(findings, "error")
    assert "none is recorded, chance is 10.00 %" in finding.found


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["b", "a", *"cdefghij"], "class 0 is 'a' in the data and 'b' for"),
        (list("abc"), "the data have 10 classes"),
    ],
)
def test_a_teacher_of_other_classes_is_a_finding(tmp_path, monkeypatch, classes, message):
    named = replace(digits(), classes=list("abcdefghij"))
    monkeypatch.setattr("topkd.training.build.DATA", DATA | {"digits": lambda: named})
    path = tmp_path / "teacher.safetensors"
    checkpoint.save_weights(path, MODELS["resnet8"].build(10).network, {"classes": classes})
    last = preflight.examine(tiny(tmp_path, path))[-1]
    assert (last.part, last.verdict) == ("teacher", "error")
    assert message in last.found


def test_weights_that_cannot_be_had_are_a_finding(taught, tmp_path):
    missing = preflight.examine(tiny(tmp_path, tmp_path / "absent.pth"))[-1]
    assert (missing.part, missing.verdict) == ("teacher", "error")
    assert missing.found == f"{tmp_path / 'absent.pth'}: No such file or directory"
    other = {"model": "resnet14", "checkpoint": str(taught)}
    misfit = preflight.examine(tiny(tmp_path, teacher=other))[-1]
    assert (misfit.part, misfit.verdict) == ("teacher", "error")
    assert "does not fit this network" in misfit.found


def test_a_teacher_that_answers_with_nan_is_a_finding(tmp_path):
    network = MODELS["resnet8"].build(10).network
    network.fc.bias.data.fill_(torch.nan)
    checkpoint.save_weights(tmp_path / "nan.safetensors", network, {})
    last = preflight.examine(tiny(tmp_path, tmp_path / "nan.safetensors"))[-1]
    assert (last.part, last.verdict) == ("teacher", "error")
    assert "NaN" in last.found


def test_a_teacher_that_is_not_trained_yet_is_not_trained(tmp_path):
    model = recipe.load("digits/teacher").student.model
    section = {"model": model, "recipe": "digits/teacher"}
    last = preflight.examine(tiny(tmp_path, teacher=section))[-1]
    assert (last.part, last.verdict) == ("teacher", "warning")
    assert last.found == "not trained yet, by digits/teacher"
    assert not [*tmp_path.iterdir()]


def test_a_pretrained_teacher_is_asked(taught, tmp_path, monkeypatch):
    plain = factory.build

    def build(name, classes, size=None, *, pretrained=False, **taps):
        network = plain(name, classes, size, **taps)
        if pretrained:
            checkpoint.fill(network.network, checkpoint.load_weights(taught), "published")
        return network

    published = factory.Published(10, 8, (0.0,) * 3, (1.0,) * 3)
    monkeypatch.setattr(factory, "published", lambda name: published)
    monkeypatch.setattr(factory, "build", build)
    findings = preflight.examine(tiny(tmp_path, teacher={"model": "resnet8", "pretrained": True}))
    assert not with_verdict(findings, "error")
    (finding,) = with_verdict(findings, "warning")
    assert "none is recorded, chance is 10.00 %" in finding.found


class Rim(torch.nn.Module):
    """Tells whether the outermost pixels are brighter than all, in any normalization."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(1, 2)
        self.fc.weight.data = torch.tensor([[0.0], [1.0]])
        self.fc.bias.data.zero_()

    def forward(self, images):
        rim = [images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]]
        return self.fc((torch.cat(rim, -1).mean((1, 2)) - images.mean((1, 2, 3)))[:, None])


@pytest.fixture
def rimmed(tmp_path, monkeypatch):
    """Pictures whose class is whether their rim is bright, and a network that knows them whole.

    A few pixels farther inside it is the other way round.
    """
    generator = np.random.default_rng(0)
    for part, label, number in product(("train", "val"), (0, 1), range(40)):
        pixels = generator.integers(64, 192, (48, 48, 3), dtype=np.uint8)
        for edge, bright in ((3, 1 - label), (2, 1 - label), (1, 1 - label), (0, label)):
            edges = [edge, 47 - edge]
            pixels[edges] = pixels[:, edges] = 255 * bright
        path = tmp_path / part / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    checkpoint.save_weights(tmp_path / "rim.safetensors", Rim(), {})
    monkeypatch.setitem(sys.modules, "rims", SimpleNamespace(rim=lambda classes: Rim()))

    def experiment(**options):
        section = {
            "model": "rims:rim",
            "head": "fc",
            "checkpoint": str(tmp_path / "rim.safetensors"),
        }
        data = {"name": "folder", "root": str(tmp_path), "size": 40} | options
        tree = TINY | {"data": data, "teacher": section, "losses": [{"name": "ce"}]}
        return Experiment(recipe.parse(tree), tmp_path / "runs", QUIET)

    return experiment


def test_another_crop_is_found_and_named(rimmed):
    errors = with_verdict(preflight.examine(rimmed()), "error")
    assert [finding.part for finding in errors] == ["teacher", "crop"]
    assert errors[1].found == "top-1 100.00 % on center crops of 1"
    assert errors[1].advice == "set data.crop=1"
    assert not with_verdict(preflight.examine(rimmed(crop=1)), "error")  # the advice is a change


def test_where_pictures_are_shown_whole_no_crop_is_tried(rimmed):
    assert not with_verdict(preflight.examine(rimmed(padding=1)), "error")


# --- Data ----------------------------------------------------------------------------------------


def test_a_class_without_images_is_told(tmp_path, monkeypatch):
    data = digits()
    kept = (data.train.target != 3).nonzero().flatten()
    train = replace(data.train, pixels=data.train.pixels[kept], target=data.train.target[kept])
    lacking = replace(data, train=train, classes=[f"name {label}" for label in range(10)])
    monkeypatch.setattr("topkd.training.build.DATA", DATA | {"digits": lambda: lacking})
    findings = preflight.examine(tiny(tmp_path, tmp_path / "absent.pth"))
    assert findings[0].verdict == "error"
    assert "no training images of name 3:" in findings[0].advice


def test_odd_images_are_told_with_what_they_are(tmp_path, monkeypatch):
    """Half the pixels are 51 and half are 153: their mean is 0.4 and their deviation 0.2."""
    pixels = torch.full((400, 8, 8, 3), 51, dtype=torch.uint8)
    pixels[:, ::2] = 153
    images = InMemory(pixels, torch.arange(400) % 10, (0.9,) * 3, (0.1,) * 3, 1, flip=False)
    data = replace(digits(), train=images, mean=images.mean, std=images.std)
    monkeypatch.setattr("topkd.training.build.DATA", DATA | {"digits": lambda: data})
    finding = preflight.examine(tiny(tmp_path, tmp_path / "absent.pth"))[2]
    assert finding.verdict == "warning"
    assert finding.found == ("normalized images have mean -5.00 -5.00 -5.00 and std 2.00 2.00 2.00")
    assert finding.advice.endswith("'data.mean=[0.4,0.4,0.4]' 'data.std=[0.2,0.2,0.2]'")


def test_batches_that_cannot_be_filled_are_told(taught, tmp_path):
    findings = preflight.examine(tiny(tmp_path, taught, batch_size=2000))
    (finding,) = with_verdict(findings, "error")
    assert finding.part == "batches"
    assert findings[-1].part == "teacher"  # and no run is tried


# --- The losses ----------------------------------------------------------------------------------


def test_a_loss_that_the_taps_do_not_suit_is_told_in_its_own_words(taught, tmp_path):
    losses = [{"name": "ce"}, {"name": "fsp", "label": "flow"}]
    findings = preflight.examine(tiny(tmp_path, taught, losses=losses, controls={"ce": losses[:1]}))
    (finding,) = with_verdict(findings, "error")
    assert finding.part == "losses of flow"
    assert finding.found.startswith("losses.flow: fsp needs as many channels in the student as")
    times = [finding.found for finding in findings if finding.part == "time"]
    assert len(times) == 1
    assert "(ce)" in times[0]
    assert "(student)" not in times[0]


def test_an_approximator_is_not_trained_but_its_fidelity_is_told(taught, tmp_path):
    experiment = tiny(tmp_path, taught, losses=[{"name": "ce"}, RIPSNET])
    (finding,) = with_verdict(preflight.examine(experiment), "warning")
    assert finding.found.startswith("topkd must first be fitted to the teacher")
    assert not [*tmp_path.iterdir()]
    experiment.fit_losses()
    before = everything_in(tmp_path)
    findings = preflight.examine(experiment)
    r2 = experiment.losses(experiment.recipe.main, experiment.new_student(), 0)[1].loss.metadata()[
        "fidelity"
    ]["r2"]
    (finding,) = [finding for finding in findings if "explains" in finding.found]
    assert f"the approximator of topkd explains {max(r2, 0):.0%} of the" in finding.found
    assert finding.verdict == ("warning" if r2 < 0.5 else "ok")
    assert everything_in(tmp_path) == before


def test_a_term_that_is_too_light_is_told_unless_it_is_meant_to_be(taught, tmp_path):
    light, none = ([{"name": "ce"}, {"name": "kd", "weight": weight}] for weight in (1e-9, 0.0))
    findings = preflight.examine(tiny(tmp_path, taught, losses=light, controls={"none": none}))
    (finding,) = with_verdict(findings, "warning")
    assert finding.part == "losses of kd"
    assert finding.found.startswith("in the first steps, kd carries 0.00% of the gradient")
    assert finding.advice == "give it more weight, or a share"


@pytest.mark.parametrize(
    ("error", "found", "advice"),
    [
        (RuntimeError("a must match b"), "a must match b", "use other taps or options, or"),
        (torch.OutOfMemoryError("no"), "a step of kd does not fit", "reduce batch_size"),
    ],
)
def test_a_step_that_fails_is_told(taught, tmp_path, monkeypatch, error, found, advice):
    def fail(self, student, teacher, batch):
        raise error

    monkeypatch.setattr("topkd.losses.KD.forward", fail)
    (finding,) = with_verdict(preflight.examine(tiny(tmp_path, taught)), "error")
    assert finding.found == found
    assert finding.advice.startswith(advice)


# --- Time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "found"),
    [
        # 1257 images are 39 batches of 32: 39 + 1.08 seconds, and four times that
        (1, "about 40.1 seconds (kd) per epoch; 4 epochs of all runs: 2.7 minutes per seed"),
        (3, "about 39.5 seconds (kd) per epoch; 4 epochs of all runs: 2.6 minutes per seed"),
        (9, "about 39.3 seconds (kd) per epoch; 4 epochs of all runs: 2.6 minutes per seed"),
    ],
)
def test_an_epoch_takes_its_steps_and_its_evaluation(taught, tmp_path, monkeypatch, every, found):
    """A step takes a second but for the first three; evaluating 500 of 540 images another.

    The last epoch is always evaluated.
    """
    clock = SimpleNamespace(perf_counter=chain([0, 10, 20], count(30)).__next__)
    monkeypatch.setattr(runs, "time", clock)
    findings = preflight.examine(tiny(tmp_path, taught, evaluate_every=every))
    (finding,) = [finding for finding in findings if finding.part == "time"]
    assert finding.found == found


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 seconds"),
        (119, "119.0 seconds"),
        (150, "2.5 minutes"),
        (3 * 3600, "3.0 hours"),
        (36 * 3600, "36.0 hours"),
        (60 * 3600, "2.5 days"),
    ],
)
def test_durations_are_told_in_the_unit_that_suits(seconds, text):
    assert preflight._duration(seconds) == text
