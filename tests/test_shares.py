"""Shares of the gradient: where it is measured, and that plain backward passes agree.

Networks are float64; the trainer computes losses in float32.
"""

import copy
import dataclasses
import os
import shutil
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference.features import CLASSES, WIDTH, Network, Recorder, bound, tapped
from test_terms import small
from test_train import STATISTICS, data
from torch import multiprocessing, nn

import topkd
from topkd.config.recipe import parse
from topkd.features import Batch, FeatureExtractor, Teacher
from topkd.losses import CE, KD, LOSSES, Loss, LossContext, LossTerm, TopKD
from topkd.losses.base import needed_taps
from topkd.models import MODELS, reused
from topkd.training import objective
from topkd.training.objective import GradientBalancer, measured_at
from topkd.training.precision import Runtime
from topkd.training.tracking import Sums
from topkd.training.trainer import Trainer

EMBEDDING, WEIGHTS = "embedding", "backbone weights"
MAPS = ("ab", "at", "cat", "fitnet", "fsp", "ft", "nst", "ofd", "review", "simkd", "sp", "srrl")
AT_WEIGHTS = (*MAPS, "vid", "deit")
OTHERS = sorted(LOSSES.keys() - {"ce", "simkd"})  # simkd needs its own student, see below
QUICK = {"ft": {"epochs": 1}}  # its paraphraser is trained first
N = 16


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Fitted networks are written to the current folder."""
    monkeypatch.chdir(tmp_path)


class TwoHeads(Network):
    """A network with a distillation head beside its classifier."""

    def __init__(self, width):
        super().__init__(width)
        self.other = nn.Linear(width, CLASSES)

    def forward(self, images):
        for stage in self.stages:
            images = stage(images)
        embedding = images.mean((2, 3))
        self.other(embedding)
        return self.fc(embedding)


def two_heads():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = TwoHeads(3).double()
    stages = [f"stages.{i}" for i in range(4)]
    return FeatureExtractor(network, stages, "fc", [f"{s}.2:in" for s in stages], "other")


def shown(n=N):
    images = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return Batch(images.double(), torch.arange(n) % CLASSES, torch.arange(n))


def context(student, teacher, batch):
    answer = teacher(batch.images).apply(lambda t: t.float())
    return LossContext(
        lambda _: iter([(batch, answer)]),
        data().train.target % CLASSES,
        student,
        teacher,
        teacher_hash="some",
        folder=Path(),
        progress=Recorder(),
        sample=batch.images,
    )


def made(name, student, teacher, batch):
    """A loss by name, bound to both networks, whose statistics are left as they are."""
    network = copy.deepcopy(student).eval()
    ask = context(student, teacher, batch)
    with torch.no_grad():
        features = [each(batch.images).apply(lambda t: t.float()) for each in (network, teacher)]
    return bound(LOSSES[name], *features, ask, **QUICK.get(name, {}))


def settings(*losses, **changes):
    tree = {
        "data": {"name": "digits"},
        "teacher": {"model": "resnet8", "checkpoint": "unused"},
        "student": {"model": "resnet8x0.25"},
        "losses": list(losses),
        "batch_size": N,
        "precision": "float32",
    }
    return parse(tree | changes)


def trainer(student, teacher, losses, recipe):
    terms = [LossTerm(term, loss) for term, loss in zip(recipe.losses, losses, strict=True)]
    device = Runtime.of(recipe, 64)
    return Trainer(student, teacher, terms, data(), recipe, 0, device, Recorder())


def networks(name="ce"):
    width = WIDTH if name == "fsp" else 3  # fsp compares maps of the same widths
    student = two_heads() if name == "deit" else tapped(width, seed=1)
    return student.train(), Teacher(tapped(WIDTH, seed=2)).double()


def backbone(student, apart=("fc.", "other.")):
    """The trainable weights of a reference network that come before its embedding."""
    named = student.network.named_parameters()
    return [weight for name, weight in named if not name.startswith(apart) and weight.requires_grad]


def gradient(value, places):
    """A backward pass of one term, flat."""
    found = torch.autograd.grad(value, places, retain_graph=True, allow_unused=True)
    pairs = zip(found, places, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def plain(student, teacher, losses, batch, places):
    """Gradients of losses in plain PyTorch: one forward pass, a full backward pass for each."""
    output = student(batch.images)
    half = output.apply(lambda t: t.float())
    answer = teacher(batch.images).apply(lambda t: t.float())
    where = [output.embedding] if places is None else places
    return [gradient(loss(half, answer, batch), where) for loss in losses]


# --- Every loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_a_share_is_that_of_separate_backward_passes(name):
    batch, (student, teacher) = shown(), networks(name)
    losses = [CE(), made(name, student, teacher, batch)]
    other, others = copy.deepcopy((student, losses))
    other_losses = _rebound(others, other, teacher)
    recipe = settings({"name": "ce"}, {"name": name, "share": 0.3})
    one, sums = trainer(student, teacher, losses, recipe), Sums()
    torch.manual_seed(5)
    one.step(batch, 1, sums, measure=True)

    places = backbone(other) if name in AT_WEIGHTS else None
    torch.manual_seed(5)
    slopes = plain(other, teacher, other_losses, batch, places)
    ce, term = (slope.norm().item() for slope in slopes)
    weight = sums.means("weight/")[name]
    assert one.balance.at == (WEIGHTS if name in AT_WEIGHTS else EMBEDDING)
    assert one.balance.norms == pytest.approx({"ce": ce, name: term}, rel=1e-4)
    assert weight * term / (ce + weight * term) == pytest.approx(0.3, rel=1e-4)
    assert sums.means("share/") == pytest.approx({"ce": 0.7, name: 0.3}, rel=1e-5)
    cosine = F.cosine_similarity(*slopes, dim=0).item()
    assert sums.means("cosine/")[f"ce|{name}"] == pytest.approx(cosine, rel=1e-3, abs=1e-5)


def _rebound(losses, student, teacher):
    """References of copied losses to networks point to the copies; CAT-KD has one."""
    for loss in losses:
        if hasattr(loss, "_networks"):
            loss._networks = [student, teacher.network]
    return losses


@pytest.mark.parametrize("name", OTHERS)
def test_a_distiller_measures_the_same(name):
    batch, (student, teacher) = shown(), networks(name)
    loss = LOSSES[name](**QUICK.get(name, {}))
    distiller = topkd.Distiller(student, teacher, [CE(), loss.term(share=0.3)])
    labels = data().train.target % CLASSES
    distiller.setup((batch.images, batch.target), labels=labels).double()
    twin = copy.deepcopy(distiller)
    _rebound([term.loss for term in twin.terms], twin.student, twin.teacher)
    torch.manual_seed(5)
    out = distiller(batch.images, batch.target, batch.index)

    torch.manual_seed(5)
    output, answer = twin.student(batch.images), twin.teacher(batch.images)
    places = backbone(twin.student) if name in AT_WEIGHTS else [output.embedding]
    ce, other = (
        gradient(term.value(output, answer, batch), places).norm().item() for term in twin.terms
    )
    weighted = out.weights[name] * other
    assert weighted / (ce + weighted) == pytest.approx(0.3, rel=1e-9)


def test_every_term_of_a_sum_is_measured_at_the_same_place():
    batch, (student, teacher) = shown(), networks()
    losses = [CE(), KD(), made("review", student, teacher, batch)]
    losses.append(made("topkd", student, teacher, batch))
    other, others = copy.deepcopy((student, losses))
    names = ("ce", "kd", "review", "topkd")
    given = [{"name": "ce"}, {"name": "kd"}, {"name": "review", "share": 0.5}]
    recipe = settings(*given, {"name": "topkd", "share": 0.1})
    one, sums = trainer(student, teacher, losses, recipe), Sums()
    one.step(batch, 1, sums, measure=True)
    found = plain(other, teacher, others, batch, backbone(other))
    assert one.balance.norms == pytest.approx(
        {name: g.norm().item() for name, g in zip(names, found, strict=True)}, rel=1e-4
    )
    shares = sums.means("share/")
    assert (shares["review"], shares["topkd"]) == pytest.approx((0.5, 0.1), rel=1e-5)


# --- The place -----------------------------------------------------------------------------------


def terms(*given):
    return [LossTerm(t, LOSSES[t.name]()) for t in settings({"name": "ce"}, *given).losses]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([{"name": "kd"}, {"name": "topkd"}, {"name": "crd"}], EMBEDDING),
        ([{"name": "kd"}, {"name": "at"}], WEIGHTS),
        ([{"name": "deit"}], WEIGHTS),
        ([{"name": "rkd", "taps": {"teacher": {"embedding": "layer2"}}}], EMBEDDING),
        ([{"name": "rkd", "taps": {"student": {"embedding": "layer2"}}}], WEIGHTS),
        ([{"name": "at", "stop": 2}], EMBEDDING),
        ([{"name": "at", "start": 3}], WEIGHTS),
    ],
)
def test_the_place_is_the_last_that_all_gradients_pass(given, expected):
    assert measured_at(terms(*given), 3, 4) == expected


def test_norms_at_another_place_are_not_averaged():
    balance = GradientBalancer()
    balance.update({"ce": 4.0, "kd": 1.0}, WEIGHTS)
    balance.update({"ce": 2.0})
    assert balance == GradientBalancer({"ce": 2.0}, EMBEDDING)


def test_a_rare_measurement_counts_as_several():
    one, many = GradientBalancer({"ce": 1.0}), GradientBalancer({"ce": 1.0})
    one.update({"ce": 2.0}, times=4)
    for _ in range(4):
        many.update({"ce": 2.0})
    assert one.norms["ce"] == pytest.approx(many.norms["ce"])


def test_a_frozen_stage_and_a_second_head_are_no_backbone():
    student = two_heads()
    student.network.stages[0].requires_grad_(False)
    features = student(shown().images)
    found = objective.backbone(student, features.embedding)
    assert [id(weight) for weight in found] == [id(weight) for weight in backbone(student)]


def test_the_projector_is_backbone_and_the_classifier_of_the_teacher_is_not():
    student, teacher = MODELS["resnet8x0.25"].build(10), Teacher(MODELS["resnet8"].build(10))
    images = torch.randn(4, 3, 8, 8)
    student = reused.reuse(student, teacher, images)
    found = objective.backbone(student, student(images).embedding)
    named = [n for n, p in student.network.named_parameters() if any(p is each for each in found)]
    assert named == [n for n, p in student.network.named_parameters() if p.requires_grad]
    assert any(name.startswith("projector") for name in named)
    assert not any(name.startswith("classifier") for name in named)


def test_a_reused_classifier_takes_shares():
    batch, teacher = shown(), Teacher(MODELS["resnet8"].build(10))
    batch = batch.apply(lambda t: t.float() if t.is_floating_point() else t)
    student = reused.reuse(MODELS["resnet8x0.25"].build(10), teacher, batch.images).train()
    other, loss = copy.deepcopy(student), made("simkd", student, teacher, batch)
    recipe = settings({"name": "ce"}, {"name": "simkd", "share": 0.8})
    one, sums = trainer(student, teacher, [CE(), loss], recipe), Sums()
    one.step(batch, 1, sums, measure=True)
    places = [weight for weight in other.parameters() if weight.requires_grad]
    ce, term = (g.norm().item() for g in plain(other, teacher, [CE(), loss], batch, places))
    assert one.balance.norms == pytest.approx({"ce": ce, "simkd": term}, rel=1e-3)
    assert sums.means("share/")["simkd"] == pytest.approx(0.8, rel=1e-5)


def test_a_view_of_an_earlier_layer_takes_a_share():
    batch, (student, teacher) = shown(), networks()
    view = {"student": {"embedding": "stages.1"}}
    recipe = settings({"name": "ce"}, {"name": "rkd", "share": 0.2, "taps": view})
    student.also(needed_taps(recipe.losses[1].taps.student))
    other = copy.deepcopy(student)
    one, sums = trainer(student, teacher, [CE(), LOSSES["rkd"]()], recipe), Sums()
    one.step(batch, 1, sums, measure=True)
    output, answer = other(batch.images), teacher(batch.images)
    seen = dataclasses.replace(output, embedding=output.others["stages.1"].mean((2, 3)))
    values = [CE()(output, answer, batch), LOSSES["rkd"]()(seen, answer, batch)]
    norms = [gradient(value, backbone(other)).norm().item() for value in values]
    assert one.balance.norms == pytest.approx(
        dict(zip(("ce", "rkd"), norms, strict=True)), rel=1e-4
    )


# --- Refusals and messages -----------------------------------------------------------------------


@pytest.mark.parametrize("reads_maps", [True, False])
def test_a_term_without_a_gradient_there_is_refused(reads_maps):
    student, teacher = networks()
    loss = Frozen()
    loss.reads_maps = reads_maps
    recipe = settings({"name": "ce"}, {"name": "kd", "share": 0.2})
    one = trainer(student, teacher, [CE(), loss], recipe)
    place = WEIGHTS if reads_maps else EMBEDDING
    message = rf"^losses\.kd: its gradient does not pass the student's {place}, so it cannot have"
    with pytest.raises(ValueError, match=message) as caught:
        one.step(shown(), 1, Sums(), measure=True)
    assert "\n" not in str(caught.value)


class Frozen(Loss):
    """A loss that trains weights of its own only."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, student, teacher, batch):
        return self.weight.square()


def test_a_warning_names_the_place():
    for place in (EMBEDDING, WEIGHTS):
        (line,) = objective.warnings({"ce": 0.9999, "at": 1e-4}, {}, place)
        assert line.startswith(f"at carries 0.01% of the gradient at the {place}: it has no")


def test_metrics_say_where_shares_were_measured(tmp_path):
    batch, (student, teacher) = shown(), _float32_networks()
    losses = [CE(), made("at", student, teacher, batch.apply(_single)), KD()]
    given = [{"name": "ce"}, {"name": "at", "share": 0.2, "stop": 1}, {"name": "kd"}]
    one = trainer(student, teacher, losses, settings(*given, epochs=2))
    history = one.run(tmp_path / "a/seed0")
    assert [entry["gradient_at"] for entry in history] == [WEIGHTS, EMBEDDING]
    assert history[0]["gradient_share"]["at"] == pytest.approx(0.2, rel=1e-4)
    assert history[1]["gradient_share"].keys() == {"ce", "kd"}


def _float32_networks():
    student, teacher = MODELS["resnet8x0.25"].build(10), Teacher(MODELS["resnet8"].build(10))
    return student, teacher


def _single(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor


def test_a_run_with_shares_at_the_weights_resumes_to_the_same_bits(tmp_path):
    def begun():
        torch.manual_seed(0)
        student, teacher = _float32_networks()
        losses = [CE(), made("fitnet", student, teacher, shown().apply(_single))]
        recipe = settings({"name": "ce"}, {"name": "fitnet", "share": 0.5}, epochs=3)
        return trainer(student, teacher, losses, recipe)

    whole, half, again = begun(), begun(), begun()
    whole.run(tmp_path / "a/seed0")
    epoch = half._epoch
    half._epoch = lambda number, advance: epoch(number, advance) if number < 3 else _stop()
    with pytest.raises(KeyboardInterrupt):
        half.run(tmp_path / "b/seed0")
    again.run(tmp_path / "b/seed0")
    for name, tensor in whole.student.network.state_dict().items():
        assert torch.equal(tensor, again.student.network.state_dict()[name]), name
    assert again.balance == whole.balance
    assert again.balance.at == WEIGHTS


def _stop():
    raise KeyboardInterrupt


# --- A step is unchanged by measuring ------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_measuring_at_the_weights_does_not_change_a_step(precision):
    states = []
    for measure in (True, False):
        torch.manual_seed(0)
        student, teacher = _float32_networks()
        batch = shown().apply(_single)
        losses = [CE(), made("at", student, teacher, batch)]
        recipe = settings({"name": "ce"}, {"name": "at", "weight": 50.0}, precision=precision)
        one, sums = trainer(student.train(), teacher, losses, recipe), Sums()
        one.step(batch, 1, sums, measure=measure)
        states.append(one.student.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_half_precision_measures_the_same_shares():
    shares = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        student, teacher = _float32_networks()
        batch = shown().apply(_single)
        losses = [CE(), made("review", student, teacher, batch)]
        recipe = settings({"name": "ce"}, {"name": "review"}, precision=precision)
        one, sums = trainer(student.train(), teacher, losses, recipe), Sums()
        one.step(batch, 1, sums, measure=True)
        shares.append(sums.means("share/")["review"])
    assert shares[0] == pytest.approx(shares[1], rel=0.1)


# --- The Distiller -------------------------------------------------------------------------------


def test_a_distiller_measures_when_a_term_with_a_share_starts():
    batch, (student, teacher) = shown(), networks()
    late = LOSSES["at"]().term(share=0.4, start=2)
    distiller = topkd.Distiller(student, teacher, [CE(), late], epochs=3)
    distiller.setup((batch.images, batch.target)).double()
    for _ in range(3):
        distiller(batch.images, batch.target)
    distiller.on_epoch_start(2)
    twin = copy.deepcopy(distiller)
    out = distiller(batch.images, batch.target)
    output, answer = twin.student(batch.images), twin.teacher(batch.images)
    values = [term.value(output, answer, batch) for term in twin.terms]
    ce, at = (gradient(value, backbone(twin.student)).norm().item() for value in values)
    assert out.weights["at"] * at / (ce + out.weights["at"] * at) == pytest.approx(0.4, rel=1e-9)


def test_a_distiller_with_shares_at_the_weights_is_trained():
    batch, (student, teacher) = shown(), networks()
    distiller = topkd.Distiller(student, teacher, [CE(), LOSSES["at"]().term(share=0.4), TopKD()])
    distiller.setup((batch.images, batch.target)).double()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05)
    values = []
    for _ in range(5):
        optimizer.zero_grad()
        out = distiller(batch.images, batch.target)
        out.loss.backward()
        optimizer.step()
        values.append(out.values["ce"].item())
    assert values[-1] < values[0]


# --- Compiled students ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("default")  # of the compiler itself
def test_a_compiled_student_is_measured_as_others_are():
    norms = []
    for compiled in (True, False):
        torch.manual_seed(0)
        student, teacher = _float32_networks()
        batch = shown().apply(_single)
        losses = [CE(), made("at", student, teacher, batch)]
        given = [{"name": "ce"}, {"name": "at", "share": 0.5}]
        one = trainer(student.train(), teacher, losses, settings(*given, compile=compiled))
        for measure in (True, False, True):
            one.step(batch, 1, Sums(), measure=measure)
        assert one.progress.said == []  # compilation has not failed
        norms.append(one.balance.norms)
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


# --- Several processes ---------------------------------------------------------------------------


def one_step(size):
    """State of a trainer after a measured step on this process's part of a batch."""
    recipe = settings(
        {"name": "ce"}, {"name": "at", "share": 0.5}, batch_size=size, optimizer={"lr": 0.1}
    )
    student, teacher = small(seed=0), Teacher(small(seed=1), *STATISTICS)
    one = trainer(student.train(), teacher, [CE(), LOSSES["at"](skip=0)], recipe)
    part = slice(one.accelerator.process_index * size, (one.accelerator.process_index + 1) * size)
    batch = Batch(
        data().train.read(torch.arange(16), None), torch.arange(16) % 10, torch.arange(16)
    )
    own = batch.apply(lambda t: t[part])
    before = copy.deepcopy(student)
    one.step(own, 1, Sums(), measure=True)
    named = dict(before.named_parameters())
    output, answer = before(own.images), teacher(own.images)
    places = [named[n] for n in named if not n.startswith("network.fc")]
    values = [loss(output, answer, own) for loss in (CE(), LOSSES["at"](skip=0))]
    norms = [gradient(value, places).norm().item() for value in values]
    return {"norms": one.balance.norms, "own": norms, "student": student.state_dict()}


def _process(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    port = 20000 + zlib.crc32(str(folder).encode()) % 20000
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.save(one_step(8), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_average_the_norms_of_their_parts(tmp_path):
    multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["norms"] == second["norms"]
    torch.testing.assert_close(first["student"], second["student"], rtol=0, atol=0)
    means = [(a + b) / 2 for a, b in zip(first["own"], second["own"], strict=True)]
    assert list(first["norms"].values()) == pytest.approx(means, rel=1e-4)
