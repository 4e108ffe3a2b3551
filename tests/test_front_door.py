"""The Python front door: a distiller for any loop, and the whole pipeline in one call."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import topkd
from topkd.losses import AT, CE, CRD, KD, Loss, TopKD
from topkd.models import create, wrap

CLASSES = 4


@pytest.fixture
def images():
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def target():
    return torch.arange(16) % CLASSES


def networks():
    torch.manual_seed(0)
    return create("resnet8x0.25", classes=CLASSES), create("resnet8", classes=CLASSES)


def small(classes=CLASSES):
    """A network of no known family."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )


def test_all_names_are_there_and_load_nothing_before_their_use():
    assert set(dir(topkd)) >= {"distill", "Distiller", "load", "Recipe", "Study"}
    for name in topkd.__all__:
        assert getattr(topkd, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        topkd.distil  # noqa: B018
    code = "import sys, topkd; dir(topkd); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_distiller_is_the_sum_of_its_weighted_terms(images, target):
    student, teacher = networks()
    distiller = topkd.Distiller(student, teacher, [CE(), 2 * KD(temperature=3.0)]).setup(images)
    distiller.eval()
    out = distiller(images, target)
    with torch.no_grad():
        z, t = student(images), teacher(images)
    soft = F.kl_div((z / 3).log_softmax(1), (t / 3).softmax(1), reduction="batchmean") * 9
    expected = F.cross_entropy(z, target) + 2 * soft
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(out.logits, z)
    assert out.weights == {"ce": 1.0, "kd": 2.0}


def test_the_teacher_learns_nothing_and_is_not_saved(images, target):
    student, teacher = networks()
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    distiller = topkd.Distiller(student, teacher, [CE(), KD(), 100 * AT()]).setup(images)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    distiller.train()
    for _ in range(3):
        optimizer.zero_grad()
        distiller(images, target).loss.backward()
        optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert not teacher.training
    own = sum(weight.numel() for weight in student.parameters())
    assert sum(weight.numel() for weight in distiller.parameters()) == own
    assert len(distiller.state_dict()) == len(student.state_dict())


def test_a_share_is_that_of_the_gradient_at_the_embedding(images, target):
    student, teacher = networks()
    distiller = topkd.Distiller(student, teacher, [CE(), KD(), TopKD().term(share=0.25)]).setup(
        images
    )
    out = distiller(images, target)
    made = distiller.student(images)
    answer = distiller.teacher(images)
    from topkd.features import Batch

    batch = Batch(images, target, torch.arange(16))
    norms = {}
    for term in distiller.terms:
        (slope,) = torch.autograd.grad(
            term.value(made, answer, batch), made.embedding, retain_graph=True
        )
        norms[term.title] = out.weights[term.title] * slope.norm().item()
    assert norms["topkd"] / sum(norms.values()) == pytest.approx(0.25, rel=1e-4)


def test_schedules_follow_the_epoch(images, target):
    student, teacher = networks()
    late = KD().term(start=2, warmup=2)
    distiller = topkd.Distiller(student, teacher, [CE(), late], epochs=4).setup(images)
    seen = []
    for epoch in (1, 2, 3):
        distiller.on_epoch_start(epoch)
        seen.append(distiller(images, target).weights.get("kd"))
    assert seen == [0.0, 0.5, 1.0]


def test_a_term_that_is_never_active_is_refused():
    late = [CE(), KD().term(start=9)]
    message = r"losses\.kd: kd is never active in 2 epochs \(start 9\)"
    with pytest.raises(ValueError, match=message):
        topkd.Distiller(*networks(), late, epochs=2)
    with pytest.raises(ValueError, match=r"losses\[1\]: kd is never active in 2 epochs"):
        topkd.distill(*networks(), (pairs(64, 0), pairs(32, 1)), late, epochs=2)
    with pytest.raises(ValueError, match=r"losses\.kd: start or stop is a fraction of the epochs"):
        topkd.Distiller(*networks(), [CE(), KD().term(start=0.5)])


def test_networks_of_no_family_are_read_where_a_trial_shows(images, target):
    torch.manual_seed(0)
    distiller = topkd.Distiller(small(), small(), [CE(), AT(skip=0)]).setup(images)
    assert distiller(images, target).values["at"].isfinite()
    assert wrap(small(), shape=(3, 8, 8)).maps == ("1",)


def test_a_network_says_itself_where_it_is_read(images):
    network = small()
    network.taps = {"head": "4", "maps": ("0",)}
    assert wrap(network, shape=(3, 8, 8)).maps == ("0",)


def test_a_memory_takes_the_labels_of_all_images(images, target):
    student, teacher = networks()
    labels = torch.arange(100) % CLASSES
    distiller = topkd.Distiller(student, teacher, [CE(), CRD(size=8, negatives=16)])
    distiller.setup((images, target), labels=labels)
    out = distiller(images, target, index=torch.arange(40, 56))
    out.loss.backward()
    assert out.values["crd"].isfinite()


def test_a_loss_of_ones_own_is_a_term(images, target):
    class Mean(Loss):
        def forward(self, student, teacher, batch):
            return (student.logits.mean() - teacher.logits.mean()).square()

    student, teacher = networks()
    distiller = topkd.Distiller(student, teacher, [CE(), 3 * Mean()]).setup(images)
    assert distiller(images, target).weights["mean"] == 3.0


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([KD(), KD()], "kd appears twice; give a label"),
        ([AT(skip=4)], r"losses\.at: skip leaves out the first 4 of 4 maps"),
    ],
)
def test_what_cannot_be_distilled_is_one_line(images, losses, message):
    student, teacher = networks()
    with pytest.raises(ValueError, match=message):
        topkd.Distiller(student, teacher, losses).setup(images)


def test_setup_and_teacher_are_asked_for(images, target):
    student, teacher = networks()
    with pytest.raises(ValueError, match=r"call setup\(sample\) once"):
        topkd.Distiller(student, teacher, [CE()])(images, target)
    with pytest.raises(ValueError, match="kd cannot be computed without a teacher"):
        topkd.Distiller(student, None, [KD()])


def pairs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 3, 8, 8, generator=generator)
    return [(picture, number % CLASSES) for number, picture in enumerate(pixels)]


def test_modules_and_data_sets_are_distilled_into_a_folder_of_runs(tmp_path):
    torch.manual_seed(0)
    teacher, student = small(), small()
    study = topkd.distill(
        student=student,
        teacher=teacher,
        data=(pairs(64, 0), pairs(32, 1)),
        losses=[CE(), 2 * KD(temperature=4.0), TopKD().term(share=0.1)],
        controls={"kd": [CE(), 2 * KD(temperature=4.0)]},
        epochs=2,
        seeds=range(2),
        out=tmp_path / "mine",
        batch_size=16,
        quiet=True,
    )
    results = study.results()
    assert len(results) == 4
    assert {(r["seed"], r["epochs"]) for r in results} == {(0, 2), (1, 2)}
    assert "| kd" in study.table()
    assert (tmp_path / "mine/recipe.yaml").exists()
    again = topkd.distill(
        student,
        teacher,
        (pairs(64, 0), pairs(32, 1)),
        [CE(), 2 * KD(temperature=4.0), TopKD().term(share=0.1)],
        controls={"kd": [CE(), 2 * KD(temperature=4.0)]},
        epochs=2,
        seeds=[0],
        out=tmp_path / "mine",
        batch_size=16,
        quiet=True,
    )
    assert again.results() == results  # nothing was trained again
    images = torch.stack([picture for picture, _ in pairs(32, 1)])
    trained = study.network(seed=1)
    right = trained.predict(images).argmax(1) == torch.arange(32) % CLASSES
    (last,) = [r["last"] for r in results if (r["seed"], r["variant"]) == (1, "kd+topkd")]
    assert 100 * right.double().mean().item() == pytest.approx(last["top1"])
    loaded = topkd.load(tmp_path / "mine/kd+topkd/seed1", network=small())
    assert torch.equal(loaded.predict(images), trained.predict(images))
    with pytest.raises(ValueError, match=r"without a name .*topkd.load\(PATH, network=MODULE\)"):
        topkd.load(tmp_path / "mine/kd/seed0")
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(ValueError, match="does not fit this network"):
        topkd.load(tmp_path / "mine/kd/seed0", network=other)


def other_pixels(pairs):
    return [(1 - picture, label) for picture, label in pairs]


def other_labels(pairs):
    return [(picture, (label + 1) % CLASSES) for picture, label in pairs]


def test_objects_with_other_content_are_other_runs(tmp_path):
    """A result is not returned for another teacher, student or data set of the same class."""
    torch.manual_seed(0)
    teacher, student, data = small(), small(), (pairs(64, 0), pairs(32, 1))

    def distill(student, teacher, data, out="mine"):
        options = {"epochs": 1, "batch_size": 16, "out": tmp_path / out, "quiet": True}
        return topkd.distill(student, teacher, data, [CE(), KD()], **options).results()

    first = distill(student, teacher, data)
    assert distill(student, teacher, data) == first
    others = {
        "teacher": (student, small(), data),
        "student": (small(), teacher, data),
        "pixels": (student, teacher, (data[0], other_pixels(data[1]))),
        "labels": (student, teacher, (other_labels(data[0]), data[1])),
        "number": (student, teacher, (data[0], data[1][:-4])),
    }
    for arguments in others.values():
        with pytest.raises(ValueError, match="holds runs of another recipe: .* choose another"):
            distill(*arguments)


def shaped(activation, width=6):
    """Networks with the same weights that compute something else."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, width, 3, padding=1), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def in_memory(**augmentation):
    from topkd.data import Data, InMemory

    pixels = torch.randint(256, (64, 8, 8, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    images = InMemory(pixels, torch.arange(64) % CLASSES, mean, std, **augmentation)
    return Data("noise", images, images, list("abcd"), mean, std)


class Scaled(Loss):
    """A loss with options of every kind."""

    def __init__(self, scale, *more, table=None, **others):
        super().__init__()
        self.scale = scale

    def forward(self, student, teacher, batch):
        return self.scale * student.logits.square().mean()


FLAT, SHIFTED = {"padding": 0, "flip": False}, {"padding": 4, "flip": True}


@pytest.mark.parametrize(
    ("key", "one", "other"),
    [
        ("student", lambda: lambda: small(), lambda: lambda: shaped(nn.ReLU, 12)),
        ("student", lambda: lambda: shaped(nn.ReLU), lambda: lambda: shaped(nn.Tanh)),
        ("student", lambda: shaped(nn.ReLU), lambda: shaped(nn.Tanh)),
        ("student", lambda: wrap(small_of(0)), lambda: wrap(small_of(0), maps=["0"])),
        ("teacher", lambda: shaped(nn.ReLU), lambda: shaped(nn.Tanh)),
        ("data", lambda: in_memory(**FLAT), lambda: in_memory(**SHIFTED)),
        ("losses", lambda: [Scaled(1.0)], lambda: [Scaled(3.0)]),
        ("losses", lambda: [Scaled(1.0, 2)], lambda: [Scaled(1.0, 3)]),
        ("losses", lambda: [Scaled(1.0, power=2)], lambda: [Scaled(1.0, power=3)]),
        (
            "losses",
            lambda: [Scaled(1.0, table=torch.ones(3))],
            lambda: [Scaled(1.0, table=torch.zeros(3))],
        ),
        (
            "losses",
            lambda: [Scaled(1.0, table=shaped(nn.ReLU))],
            lambda: [Scaled(1.0, table=shaped(nn.Tanh))],
        ),
    ],
)
def test_objects_that_compute_something_else_are_other_runs(tmp_path, key, one, other):
    arguments = {"teacher": small_of(0), "data": in_memory(**FLAT), "losses": [CE()]}
    arguments |= {"student": small_of(1)}
    options = {"epochs": 1, "batch_size": 16, "out": tmp_path / "mine", "quiet": True}
    first = topkd.distill(**arguments | {key: one()}, **options).results()
    assert topkd.distill(**arguments | {key: one()}, **options).results() == first
    with pytest.raises(ValueError, match="holds runs of another recipe: .* choose another"):
        topkd.distill(**arguments | {key: other()}, **options)


def small_of(seed):
    torch.manual_seed(seed)
    return small()


def test_a_function_is_called_without_a_trace_in_the_random_numbers(tmp_path):
    import random

    import numpy as np

    def student():
        random.random(), np.random.rand()  # noqa: NPY002
        return small()

    from topkd.studies.pipeline import _student

    def states():
        arrays = np.random.get_state()[1]  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), arrays.tolist()

    before = states()
    name = _student(student)[0]
    assert states() == before
    torch.manual_seed(7)
    assert _student(student)[0] == name


def test_a_function_may_return_a_network_without_weights_yet(tmp_path):
    def student():
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, CLASSES))

    options = {"epochs": 1, "batch_size": 16, "out": tmp_path / "mine", "quiet": True}
    (first,) = topkd.distill(student, None, in_memory(**FLAT), [CE()], **options).results()
    assert first["model"].startswith("object:student-")


def test_options_of_a_loss_are_known_by_name():
    loss = Scaled(1.0, 2, 3, table=4, other=5)
    assert loss.options == {"scale": 1.0, "more": (2, 3), "table": 4, "other": 5}
    with pytest.raises(TypeError, match="scale"):
        Scaled()

    class Weighted(Loss):
        def __init__(self, weight):
            super().__init__()

        def forward(self, student, teacher, batch):
            raise NotImplementedError

    with pytest.raises(ValueError, match="Weighted: the option 'weight' has the name of a setting"):
        2 * Weighted(3.0)


def test_outputs_of_a_teacher_with_the_same_weights_are_kept_apart(tmp_path):
    from topkd._io.progress import Progress
    from topkd.config import recipe
    from topkd.training.build import Objects
    from topkd.training.experiment import Experiment

    tree = {
        "name": "kept",
        "data": {"name": "digits", "limit": 64},
        "student": {"model": "resnet8x0.25"},
        "teacher": {"model": "object:net", "checkpoint": "object", "cache": True},
        "losses": [{"name": "ce"}, {"name": "kd"}],
    }

    def outputs(activation):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), activation(), nn.Linear(8, 10))
        objects = Objects(teacher=teacher)
        found = Experiment(recipe.parse(tree), tmp_path, Progress(quiet=True), objects)
        return found.teacher_outputs

    one, same, other = outputs(nn.ReLU), outputs(nn.ReLU), outputs(nn.Tanh)
    assert one.hash == other.hash
    assert torch.equal(one.predictions.logits, same.predictions.logits)
    assert not torch.equal(one.predictions.logits, other.predictions.logits)
    assert one.cache(0).folder == same.cache(0).folder != other.cache(0).folder


def test_data_sets_with_random_pictures_are_distilled_again(tmp_path):
    class Noisy:
        def __len__(self):
            return 32

        def __getitem__(self, index):
            return torch.rand(3, 8, 8), index % CLASSES

    torch.manual_seed(0)
    options = {"epochs": 1, "batch_size": 16, "out": tmp_path / "mine", "quiet": True}
    arguments = small(), None, (Noisy(), Noisy()), [CE()]
    first = topkd.distill(*arguments, **options).results()
    assert topkd.distill(*arguments, **options).results() == first


def test_names_are_distilled_as_a_recipe_of_them_is(tmp_path):
    from topkd._io.progress import Progress
    from topkd.config import recipe
    from topkd.models import checkpoint
    from topkd.models.registry import MODELS
    from topkd.training.experiment import Experiment

    path = tmp_path / "resnet8.safetensors"
    torch.manual_seed(0)
    checkpoint.save_weights(path, MODELS["resnet8"].build(10).network, {})
    study = topkd.distill(
        "resnet8x0.25",
        path,
        {"name": "digits", "limit": 128},
        [CE(), 2 * KD()],
        epochs=1,
        out=tmp_path / "python/same",
        quiet=True,
    )
    written = recipe.load(str(tmp_path / "python/same/recipe.yaml"))
    Experiment(written, tmp_path / "yaml", Progress(quiet=True)).run([0])
    place = "same/kd/seed0/student.safetensors"
    one, other = (checkpoint.load_weights(tmp_path / part / place) for part in ("python", "yaml"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    network = study.network(seed=0)
    assert len(network.classes) == 10
