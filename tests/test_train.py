"""The loop: what one step does, how rates change, how runs resume and how they fail."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from topkd._io.progress import Progress
from topkd.config.recipe import parse
from topkd.data import Data, InMemory
from topkd.features import Batch, FeatureExtractor, Features, Teacher
from topkd.losses import CE, KD, Loss
from topkd.losses.base import LossTerm
from topkd.models import MODELS
from topkd.training.precision import Runtime
from topkd.training.tracking import Sums
from topkd.training.trainer import Diverged, Trainer

STATISTICS = ((0.5,) * 3, (0.25,) * 3)


def data(count: int = 64) -> Data:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8, generator=generator)
    target = torch.arange(count) % 10
    images = InMemory(pixels, target, *STATISTICS, padding=1, flip=True)
    return Data("noise", images, images, [str(c) for c in range(10)], *STATISTICS)


def recipe(**changes):
    tree = {
        "data": {"name": "digits"},
        "teacher": {"model": "resnet8", "checkpoint": "unused"},
        "student": {"model": "resnet8x0.25"},
        "losses": [{"name": "ce"}, {"name": "kd", "weight": 2.0}],
        "epochs": 3,
        "batch_size": 16,
        "precision": "float32",
        "optimizer": {"lr": 0.05},
    }
    return parse(tree | changes)


def trainer(made=None, **changes) -> Trainer:
    settings = recipe(**changes)
    torch.manual_seed(0)
    student, teacher = MODELS["resnet8x0.25"].build(10), MODELS["resnet8"].build(10)
    made = made or (CE(), KD())
    weighted = [LossTerm(t, loss) for t, loss in zip(settings.losses, made, strict=True)]
    images, device = data(), Runtime.of(settings, 64)
    taught_by = Teacher(teacher, *STATISTICS)
    return Trainer(student, taught_by, weighted, images, settings, 0, device, Progress(quiet=True))


def a_batch() -> Batch:
    index = torch.arange(16)
    return Batch(data().train.read(index, None), data().train.target[index], index)


class TwoHeads(torch.nn.Module):
    """A network with a head of its own that learns from teachers."""

    def __init__(self):
        super().__init__()
        self.body, self.fc, self.other = (
            torch.nn.Linear(i, o) for i, o in ((192, 5), (5, 10), (5, 10))
        )

    def forward(self, images):
        embedding = self.body(images.flatten(1))
        self.other(embedding)
        return self.fc(embedding)


def test_a_head_that_no_term_trains_is_told():
    settings = recipe(teacher=None, losses=[{"name": "ce"}])
    losses = [LossTerm(settings.losses[0], CE())]
    student = FeatureExtractor(TwoHeads(), [], "fc", distilled="other")
    one = Trainer(
        student, None, losses, data(), settings, 0, Runtime.of(settings, 64), Progress(quiet=True)
    )
    with pytest.raises(
        ValueError, match="has a distillation head, which contributes to predictions, but no"
    ):
        one.step(a_batch(), 1, Sums(), measure=False)


@pytest.mark.parametrize("augmentation_seed", [None, 3])
def test_an_augmentation_seed_shows_every_run_the_same_images(augmentation_seed):
    drawn = []
    for seed in (0, 1):
        one = trainer(data={"name": "digits", "augmentation_seed": augmentation_seed})
        one.seed, seen = seed, {}

        def keep(batch, epoch, sums, *, measure, seen=seen, step=one.step):
            seen |= dict(zip(batch.index.tolist(), batch.images, strict=True))
            step(batch, epoch, sums, measure=measure)

        one.step = keep
        one._epoch(1, lambda amount, news: None)
        drawn.append(seen)
    assert list(drawn[0]) != list(drawn[1])  # the order is each run's own
    same = [torch.equal(image, drawn[1][index]) for index, image in drawn[0].items()]
    assert all(same) == (augmentation_seed is not None)


def test_a_step_is_the_step_of_a_plain_loop():
    ours, plain, batch = trainer(), trainer(), a_batch()
    ours.student.train()
    ours.step(batch, 1, Sums(), measure=True)

    network, teacher = plain.student.network.train(), plain.teacher
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    logits, taught = network(batch.images), teacher(batch.images).logits
    kd = 16 * F.kl_div((logits / 4).log_softmax(1), (taught / 4).softmax(1), reduction="batchmean")
    (F.cross_entropy(logits, batch.target) + 2 * kd).backward()
    optimizer.step()
    torch.testing.assert_close(ours.student.network.state_dict(), network.state_dict())


class Square(Loss):
    """The mean square of the first feature map, where there are any."""

    def forward(self, student, teacher, batch):
        assert len(student.maps) == len(teacher.maps) == (4 if self.reads_maps else 0)
        return student.maps[0].square().mean() if self.reads_maps else student.logits.sum() * 0


@pytest.mark.parametrize("reads_maps", [True, False])
def test_maps_are_there_for_losses_that_read_them(reads_maps):
    loss = Square()
    loss.reads_maps = reads_maps
    ours = trainer((CE(), loss))
    plain, batch = trainer().student.network.train(), a_batch()
    ours.student.train()
    ours.step(batch, 1, Sums(), measure=True)

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    value = F.cross_entropy(plain(batch.images), batch.target)
    first = F.relu(plain.bn1(plain.conv1(batch.images)))  # weight 2, as the recipe has it
    (value + 2 * reads_maps * first.square().mean()).backward()
    optimizer.step()
    weights = dict(ours.student.network.named_parameters())
    torch.testing.assert_close(weights, dict(plain.named_parameters()))


class OfClassifier(Loss):
    """The embedding through the student's own classifier, which gets a gradient of its own."""

    def forward(self, student, teacher, batch):
        return self.classifier[0](student.embedding).square().mean()


def test_weights_that_a_loss_uses_itself_get_both_gradients():
    loss = OfClassifier()
    ours, plain, batch = trainer((CE(), loss)), trainer().student.network.train(), a_batch()
    loss.classifier = [ours.student.classifier]  # in a list, so that it is no submodule
    ours.student.train()
    ours.step(batch, 1, Sums(), measure=False)

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    logits = plain(batch.images)
    (F.cross_entropy(logits, batch.target) + 2 * logits.square().mean()).backward()
    optimizer.step()
    weights = dict(ours.student.network.named_parameters())
    torch.testing.assert_close(weights, dict(plain.named_parameters()))


def test_the_gradient_is_clipped_to_its_greatest_norm():
    clipped = trainer(gradient_clip=0.01)
    before = [weight.detach().clone() for weight in clipped.weights]
    clipped.optimizer.param_groups[0]["weight_decay"] = 0.0
    clipped.student.train()
    clipped.step(a_batch(), 1, Sums(), measure=False)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, clipped.weights, strict=True)])
    assert moved.norm().item() == pytest.approx(0.05 * 0.01, rel=1e-3)


def test_shares_are_those_of_the_gradients_at_the_embedding():
    ours, batch, sums = trainer(), a_batch(), Sums()
    ours.student.train()
    features = ours.student(batch.images)
    taught = ours.teacher(batch.images)
    norms = []
    for weight, loss in ((1.0, CE()), (2.0, KD())):
        value = weight * loss(features, taught, batch)
        (gradient,) = torch.autograd.grad(value, features.embedding, retain_graph=True)
        norms.append(gradient.norm().item())
    ours.step(batch, 1, sums, measure=True)
    shares = sums.means("share/")
    assert shares["ce"] == pytest.approx(norms[0] / sum(norms), rel=1e-4)
    assert shares["kd"] == pytest.approx(norms[1] / sum(norms), rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "float32"},
        {"precision": "bfloat16"},
        {"optimizer": {"name": "adamw", "lr": 1e-3}},
    ],
)
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, changes):
    whole = trainer(**changes)
    whole.run(tmp_path / "a" / "seed0")

    class Stop(Exception):
        pass

    stopped = trainer(**changes)
    epoch = stopped._epoch
    stopped._epoch = lambda number, advance: (
        _raise(Stop()) if number == 3 else epoch(number, advance)
    )
    with pytest.raises(Stop):
        stopped.run(tmp_path / "b" / "seed0")
    resumed = trainer(**changes)
    history = resumed.run(tmp_path / "b" / "seed0")
    for name, tensor in whole.student.network.state_dict().items():
        assert torch.equal(tensor, resumed.student.network.state_dict()[name]), name
    assert [entry["losses"] for entry in history] == [entry["losses"] for entry in whole.history]


def _raise(error: Exception):
    raise error


def test_metrics_are_written_for_each_epoch(tmp_path):
    trainer().run(tmp_path / "a" / "seed0")
    lines = (tmp_path / "a" / "seed0" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["epoch"] for entry in entries] == [1, 2, 3]
    for entry in entries:
        assert set(entry["losses"]) == set(entry["gradient_share"]) == {"ce", "kd"}
        assert math.isclose(sum(entry["gradient_share"].values()), 1, rel_tol=1e-5)


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = trainer().run(tmp_path / "a" / "seed0")
    events = EventAccumulator(str(tmp_path / "a" / "seed0" / "tensorboard"))
    events.Reload()
    written = [event.value for event in events.Scalars("losses/kd")]
    assert written == pytest.approx([entry["losses"]["kd"] for entry in history])


class Broken(Loss):
    def forward(self, student: Features, teacher: Features, batch: Batch) -> torch.Tensor:
        return student.logits.sum() * torch.nan


def test_a_loss_that_is_not_a_number_stops_the_run_and_is_named(tmp_path):
    with pytest.raises(Diverged, match=r"^epoch 1, losses\.kd: the loss is nan"):
        trainer(made=(CE(), Broken())).run(tmp_path / "a" / "seed0")


def test_features_that_are_not_numbers_are_named_by_the_term_that_met_them():
    from topkd.losses import TopKD
    from topkd.topology import rips

    term = recipe(losses=[{"name": "topkd"}]).losses[0]
    loss = TopKD()
    loss.describe = lambda points: rips(points).deaths
    weighted = LossTerm(term, loss)
    broken = Features(torch.zeros(4, 10), torch.full((4, 3), torch.nan))
    batch = Batch(torch.zeros(4, 3, 8, 8), torch.zeros(4).long(), torch.arange(4))
    one = trainer()
    one.losses = [weighted]
    with pytest.raises(Diverged, match=r"^epoch 1, losses\.topkd: cloud 0, point 0: a coordina"):
        one._values(broken, broken, batch, 1)


def test_metrics_that_a_kill_kept_from_being_written_are_written_on_resume(tmp_path):
    folder = tmp_path / "a" / "seed0"
    trainer(epochs=2).run(folder)
    path = folder / "metrics.jsonl"
    content = path.read_bytes()
    path.unlink()  # the state of the last epoch was saved, and then the process was killed
    trainer(epochs=2).run(folder)
    assert path.read_bytes() == content
