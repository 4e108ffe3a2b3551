"""The summands of a loss: schedules, shares of the gradient, views and warnings."""

import os
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference.features import Recorder, bound, features, tapped
from test_train import STATISTICS, a_batch, data, trainer
from torch import multiprocessing, nn

from topkd.config.recipe import parse
from topkd.config.terms import Term, View
from topkd.config.validation import RecipeError
from topkd.features import FeatureExtractor, Teacher
from topkd.losses import CE, KD, LOSSES, Loss, LossContext, LossTerm
from topkd.losses.base import needed_taps, select
from topkd.training.objective import GradientBalancer, cosines, gradients, warnings
from topkd.training.precision import Runtime
from topkd.training.tracking import Sums
from topkd.training.trainer import Trainer


def terms(*trees):
    tree = {"data": {"name": "digits"}, "student": {"model": "resnet8"}, "losses": list(trees)}
    return parse(tree | {"epochs": 10}).losses


# --- Schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"warmup": 3}, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ({"start": 3}, [0, 0, 1, 1, 1, 1]),
        ({"stop": 2}, [1, 1, 0, 0, 0, 0]),
        ({"decay": 2}, [1, 1, 1, 1, 1, 0.5]),
        ({"start": 2, "stop": 5, "warmup": 2, "decay": 4}, [0, 0.5, 0.75, 0.5, 0.25, 0]),
        ({"stop": 100, "decay": 3}, [1, 1, 1, 1, 2 / 3, 1 / 3]),
        ({"stop": 0.5}, [1, 1, 1, 0, 0, 0]),
        ({"start": 0.5}, [0, 0, 0, 1, 1, 1]),
        ({"start": 0.34, "stop": 0.99, "warmup": 2}, [0, 0, 0.5, 1, 1, 0]),
        ({"stop": 0.001}, [1, 0, 0, 0, 0, 0]),  # at least one epoch
        ({"start": 0.999}, [0, 0, 0, 0, 0, 1]),
    ],
)
def test_a_weight_follows_its_schedule(options, expected):
    term = Term(name="kd", **options)
    assert [term.schedule(epoch, 6) for epoch in range(1, 7)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([{"name": "ce", "stop": 9}], "losses: no term with a weight is active in epoch 10"),
        ([{"name": "ce", "weight": 0}], "losses: no term with a weight is active in epoch 1"),
        ([{"name": "ce", "share": 0.5}], "losses: the sum of shares must be below 1"),
        (
            [{"name": "ce"}, {"name": "kd", "share": 0.6}, {"name": "topkd", "share": 0.4}],
            "losses: the sum of shares must be below 1",
        ),
        (
            [{"name": "ce"}, {"name": "kd", "share": 0.6, "weight": 2}],
            r"losses\[1\]: share replaces",
        ),
        ([{"name": "ce", "start": 4, "stop": 3}], r"losses\[0\]: stop \(3\) is before start"),
        ([{"name": "ce", "start": 0.5, "stop": 0.2}], r"losses\[0\]: stop \(0.2\) is before start"),
        ([{"name": "ce"}, {"name": "ce"}], "losses: ce appears twice; give a label to each"),
        (
            [{"name": "ce"}, {"name": "kd", "start": 11}],
            r"^losses\[1\]: kd is never active in 10 epochs \(start 11\); use a fraction",
        ),
        (
            [{"name": "ab", "stop": 30}, {"name": "ce", "label": "labels", "start": 31}],
            r"^losses\[1\]: labels is never active in 10 epochs \(start 31\); use a fraction",
        ),
        (
            [{"name": "ce"}, {"name": "kd", "share": 0.1, "start": 0.5, "stop": 5}],
            r"^losses\[1\]: kd is never active in 10 epochs \(start 0.5, stop 5\); use a",
        ),
        (
            [{"name": "ce", "start": 2.5}],
            r"losses\[0\].start: must be a whole number of epochs, or a fraction of them in \(0, 1",
        ),
        ([{"name": "ce", "stop": "all"}], r"losses\[0\].stop: expected number, got 'all'"),
    ],
)
def test_terms_that_do_not_go_together_are_refused(losses, message):
    with pytest.raises(RecipeError, match=message):
        terms(*losses)


@pytest.mark.parametrize("epochs", [*range(2, 50), 240, 10**9])
@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.125, 1 / 3, 0.5, 0.999999])
def test_stages_that_meet_at_a_fraction_leave_no_gap(epochs, fraction):
    first, second = Term(name="fsp", stop=fraction), Term(name="ce", start=fraction)
    (begin, end), (after, last) = first.span(epochs), second.span(epochs)
    assert (begin, after, last) == (1, end + 1, epochs)
    assert 1 <= end < epochs
    assert abs(end - fraction * epochs) <= 0.5 or end in (1, epochs - 1)


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({}, None),
        ({"warmup": 10}, None),
        ({"decay": 10}, None),
        ({"warmup": 5, "decay": 6}, None),  # both are 1 in epoch 5
        (
            {"warmup": 20},
            "kd reaches 50% of its weight: warmup 20 does not fit",
        ),
        (
            {"decay": 40},
            "kd reaches 25% of its weight: decay 40 does not fit",
        ),
        (
            {"warmup": 8, "start": 7},
            "kd reaches 50% of its weight: warmup 8 does not fit",
        ),
        ({"warmup": 9, "decay": 9}, "kd reaches 56% of its weight: warmup 9 and decay 9"),
    ],
)
def test_a_schedule_that_never_reaches_the_weight_is_reported(options, warning):
    term = Term(name="kd", **options)
    peak = max(term.schedule(epoch, 10) for epoch in range(1, 11))
    assert (peak == 1) == (warning is None)
    found = term.schedule_warning(10)
    assert found.startswith(warning or "")
    assert bool(found) == (warning is not None)
    assert f"{peak:.0%}" in (found or "100%")


def test_two_terms_of_one_loss_have_labels():
    first, second = terms({"name": "ce"}, {"name": "ce", "label": "again"})
    assert (first.title, second.title) == ("ce", "again")


# --- Names ---------------------------------------------------------------------------------------


class Refusing(Loss):
    def on_epoch_start(self, epoch):
        raise ValueError(f"no epoch {epoch}")

    def forward(self, student, teacher, batch):
        raise ValueError("logits differ")


def test_an_error_of_a_loss_names_its_term_once():
    (term,) = terms({"name": "kd", "label": "again"})
    made = features(3, seed=1)
    for work, message in (
        (lambda w: w.on_epoch_start(4), "losses.again: no epoch 4"),
        (lambda w: w.value(made, made, a_batch()), "losses.again: logits differ"),
    ):
        with pytest.raises(ValueError, match="again") as caught:
            work(LossTerm(term, Refusing()))
        assert str(caught.value) == message


def test_a_tap_that_reads_no_map_names_its_term():
    (term,) = terms({"name": "at", "taps": {"student": {"maps": ["fc"]}}})
    made = features(3, seed=1)
    made.others["fc"] = torch.zeros(6, 3)
    with pytest.raises(ValueError, match=r"^losses\.at: the tap 'fc' reads \(6, 3\), which is no"):
        LossTerm(term, LOSSES["at"]()).value(made, made, a_batch())


# --- Shares --------------------------------------------------------------------------------------


def test_weights_give_every_term_its_share():
    some = terms(
        {"name": "ce", "weight": 2.0},
        {"name": "kd", "weight": 0.5},
        {"name": "topkd", "share": 0.3},
        {"name": "topkd", "label": "more", "share": 0.2},
    )
    norms = {"ce": 0.7, "kd": 3.0, "topkd": 1e-4, "more": 20.0}
    weights = GradientBalancer(dict(norms)).weights(some, 1, 10)
    assert (weights["ce"], weights["kd"]) == (2.0, 0.5)
    carried = {title: weights[title] * norm for title, norm in norms.items()}
    whole = sum(carried.values())
    assert carried["topkd"] / whole == pytest.approx(0.3)
    assert carried["more"] / whole == pytest.approx(0.2)


def test_norms_are_running_means():
    balance = GradientBalancer()
    for norm in (2.0, 4.0, 0.0):
        balance.update({"ce": norm})
    assert balance.norms["ce"] == pytest.approx(0.9 * (0.9 * 2 + 0.1 * 4))


def test_a_share_grows_over_its_warmup():
    some = terms({"name": "ce"}, {"name": "kd", "share": 0.5, "warmup": 4, "start": 2})
    balance = GradientBalancer({"ce": 1.0, "kd": 0.25})
    found = [balance.weights(some, epoch, 10)["kd"] for epoch in range(1, 7)]
    assert found == pytest.approx([0, 1, 2, 3, 4, 4])


def test_a_term_that_the_embedding_does_not_feel_cannot_have_a_share():
    some = terms({"name": "ce"}, {"name": "kd", "share": 0.5})
    with pytest.raises(ValueError, match=r"losses\.kd: its gradient does not pass the student"):
        GradientBalancer({"ce": 1.0}).weights(some, 1, 10)


def test_a_trained_step_carries_the_share_that_was_asked_for():
    losses = [{"name": "ce"}, {"name": "kd", "share": 0.4}]
    one, sums, shown = trainer_with(losses), Sums(), a_batch()
    one.student.train()
    one.step(shown, 1, sums, measure=True)
    # The same by hand: one backward pass a term, all the way to the embedding.
    student = trainer_with(losses).student.train()
    made, taught = student(shown.images), one.teacher(shown.images).logits
    logits = made.logits
    kd = 16 * F.kl_div((logits / 4).log_softmax(1), (taught / 4).softmax(1), reduction="batchmean")
    norms = [
        torch.autograd.grad(value, made.embedding, retain_graph=True)[0].norm()
        for value in (F.cross_entropy(logits, shown.target), kd)
    ]
    weight = sums.means("weight/")["kd"]
    assert weight * norms[1] / (norms[0] + weight * norms[1]) == pytest.approx(0.4, rel=1e-4)
    assert sums.means("share/") == pytest.approx({"ce": 0.6, "kd": 0.4}, rel=1e-4)


def trainer_with(losses, epochs=3):
    made = [{"ce": CE, "kd": KD}[tree["name"]]() for tree in losses]
    return trainer(made, **{"losses": losses, "epochs": epochs})


def test_a_run_with_shares_resumes_to_the_same_bits(tmp_path):
    losses = [{"name": "ce"}, {"name": "kd", "share": 0.4, "start": 2}]
    whole = trainer_with(losses)
    whole.run(tmp_path / "a" / "seed0")
    half = trainer_with(losses)
    half.recipe = whole.recipe.model_copy(update={"epochs": 3})
    stop = half._epoch
    half._epoch = lambda epoch, advance: stop(epoch, advance) if epoch < 3 else _stop()
    with pytest.raises(KeyboardInterrupt):
        half.run(tmp_path / "b" / "seed0")
    again = trainer_with(losses)
    again.run(tmp_path / "b" / "seed0")
    for name, tensor in whole.student.network.state_dict().items():
        assert torch.equal(tensor, again.student.network.state_dict()[name]), name
    assert again.balance == whole.balance
    weights = [entry["weights"] for entry in again.history]
    assert "kd" not in weights[0]
    assert weights[1]["kd"] != weights[2]["kd"]


def _stop():
    raise KeyboardInterrupt


# --- Gradients -----------------------------------------------------------------------------------


def test_gradients_are_those_through_the_classifier():
    student = tapped(5, seed=1)
    made = features(5, seed=3).apply(lambda t: t.requires_grad_())
    values = {
        "logits": made.logits.square().sum(),
        "embedding": made.embedding.pow(3).sum(),
        "maps": made.maps[0].sum(),
    }
    found = gradients(values, made, student)
    assert found.keys() == {"logits", "embedding"}  # maps lie before the embedding
    weight = student.classifier.weight
    torch.testing.assert_close(found["logits"], 2 * made.logits @ weight)
    torch.testing.assert_close(found["embedding"], 3 * made.embedding.square())
    expected = F.cosine_similarity(found["logits"].flatten(), found["embedding"].flatten(), dim=0)
    torch.testing.assert_close(cosines(found), {"logits|embedding": expected})


def test_silent_and_redundant_terms_are_told():
    lines = warnings({"ce": 0.9, "topkd": 0.0009}, {"ce|kd": 0.995, "ce|topkd": -0.999})
    assert len(lines) == 2
    assert lines[0].startswith("topkd carries 0.09% of the gradient")
    assert lines[1].startswith("ce and kd are redundant")
    assert warnings({"ce": 0.5, "kd": 0.5}, {"ce|kd": 0.5}) == []


def test_a_silent_term_is_told_once_and_recorded_every_epoch(tmp_path):
    one = trainer_with([{"name": "ce"}, {"name": "kd", "weight": 1e-6}])
    one.progress = Recorder()
    history = one.run(tmp_path / "a" / "seed0")
    assert [len(entry["warnings"]) for entry in history] == [1, 1, 1]
    assert sum("kd carries" in line for line in one.progress.said) == 1


# --- Views ---------------------------------------------------------------------------------------


def test_a_view_chooses_maps_and_embedding():
    network = tapped(5, seed=1)
    view = View(maps=("stages.3", "stages.0"), embedding="stages.2.0:in")
    network.also(needed_taps(view))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    made = network(images)
    chosen = select(made, view)
    assert torch.equal(chosen.maps[0], made.maps[3])
    assert torch.equal(chosen.maps[1], made.maps[0])
    assert torch.equal(chosen.embedding, made.maps[1].mean((2, 3)))
    assert select(made, View()).maps is made.maps


def test_a_view_of_no_map_is_refused():
    network = tapped(5, seed=1)
    network.also(["fc"])
    with pytest.raises(ValueError, match=r"the tap 'fc' reads \(2, 4\), which is not a map"):
        select(network(torch.zeros(2, 3, 8, 8, dtype=torch.float64)), View(maps=("fc",)))


def test_an_unknown_tap_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="Network has no module 'layer9'; it has stages, fc"):
        tapped(5, seed=1).also(["layer9"])


# --- Several processes ---------------------------------------------------------------------------


class Spread(Loss):
    """A loss of the whole batch: it is not the mean of what its parts lose."""

    def forward(self, student, teacher, batch):
        return (student.embedding - student.embedding.mean(0)).norm() * batch.target.double().std()


class Small(nn.Module):
    """A network without normalization, which would see the images of its own process alone."""

    def __init__(self):
        super().__init__()
        self.stage = nn.Conv2d(3, 4, 2, stride=2)
        self.body, self.fc = nn.Linear(64, 5), nn.Linear(5, 10)

    def forward(self, images):
        return self.fc(self.body(self.stage(images).flatten(1)))


def small(seed):
    torch.manual_seed(seed)
    return FeatureExtractor(Small(), ["stage"], "fc")


class Direct(Loss):
    """A loss that uses a weight of the student beside its features, as class attention does."""

    def __init__(self, student):
        super().__init__()
        self.student = [student]

    def forward(self, student, teacher, batch):
        return (student.embedding @ self.student[0].classifier.weight.T).square().mean()


COUPLED = (
    *("dist", "mlkd", "sp", "cc", "rkd", "pkt", "crd", "topkd", "wasserstein", "pce"),
    *("edge_matching", "rtd_lite", "ultrametric"),
)


def made(loss, student, teacher):
    """A loss by name: one of those above, or of the catalog."""
    if loss == "spread":
        return Spread()
    if loss == "direct":
        return Direct(student)
    shown, target = a_batch(), data().train.target
    ask = LossContext(
        lambda _: iter([(shown, teacher(shown.images))]),
        target,
        student,
        teacher,
        teacher_hash="some",
        folder=Path(),
        progress=Recorder(),
        sample=shown.images,
    )
    return bound(LOSSES[loss], student(shown.images), teacher(shown.images), ask)


def trained(loss, mode, size):
    """A network after two steps on this process's part of a batch."""
    settings = parse(
        {
            "data": {"name": "digits"},
            "student": {"model": "resnet8"},
            "losses": [{"name": "ce", "batch": mode}],
            "batch_size": size,
            "precision": "float32",
            "optimizer": {"lr": 0.1, "weight_decay": 0.0},
        }
    )
    student, teacher = small(seed=0), Teacher(small(seed=1), *STATISTICS)
    losses = [LossTerm(settings.losses[0], made(loss, student, teacher))]
    device = Runtime.of(settings, 64)
    one = Trainer(student, teacher, losses, data(), settings, 0, device, Recorder())
    own = slice(one.accelerator.process_index * size, (one.accelerator.process_index + 1) * size)
    student.train()
    for _ in range(2):
        one.step(a_batch().apply(lambda t: t[own]), 1, Sums(), measure=True)
    return student.state_dict()


def _process(rank, folder, losses, mode):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port(folder)}
    torch.save({loss: trained(loss, mode, 8) for loss in losses}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _port(folder):
    return str(20000 + zlib.crc32(str(folder).encode()) % 20000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("losses", "mode"), [(("direct",), "local"), (("spread", *COUPLED), "gathered")]
)
def test_two_processes_are_one_process(tmp_path, losses, mode):
    multiprocessing.spawn(_process, (str(tmp_path), losses, mode), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for loss in losses:
        alone = trained(loss, "local", 16)
        for each in found:
            torch.testing.assert_close(
                each[loss], alone, rtol=1e-4, atol=1e-6, msg=lambda told, of=loss: f"{of}: {told}"
            )


@pytest.mark.slow
def test_a_local_term_is_the_mean_over_processes(tmp_path):
    multiprocessing.spawn(_process, (str(tmp_path), ("spread",), "local"), nprocs=2)
    network, shown = small(seed=0).train(), a_batch()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        values = [
            Spread()(network(shown.images[half]), None, shown.apply(lambda t, h=half: t[h]))
            for half in (slice(8), slice(8, 16))
        ]
        optimizer.zero_grad()
        torch.stack(values).mean().backward()
        optimizer.step()
    found = torch.load(tmp_path / "0.pt", weights_only=True)["spread"]
    torch.testing.assert_close(found, network.state_dict())
