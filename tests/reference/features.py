"""What networks might have made of a batch, with all that a loss may ask for."""

import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from topkd._io.progress import Progress
from topkd.features import Batch, FeatureExtractor, Features, Teacher
from topkd.losses import Loss, LossContext
from topkd.models.reused import reuse

CLOUD, IMAGES, CLASSES = 6, 48, 4
WIDTH = 5  # of the teacher's embedding; its maps have WIDTH channels, WIDTH - 1, WIDTH - 2, ...
SIDES = (4, 4, 2, 2)  # of the maps, shallow to deep


def features(width: int, seed: int, n: int = CLOUD) -> Features:
    """Random features; the deepest map has `width` channels, each shallower one fewer, at least 2.

    Maps are pre-activations after a ReLU. Everything is float64.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    logits, embedding = draw(n, CLASSES), draw(n, width)
    channels = [max(2, width - back) for back in range(len(SIDES))][::-1]
    before = [draw(n, c, side, side) for c, side in zip(channels, SIDES, strict=True)]
    maps = [m.relu() for m in before]
    return Features(logits, embedding, maps, before, distilled=draw(n, CLASSES))


def batch(n: int = CLOUD) -> Batch:
    return Batch(torch.zeros(n, 3, 8, 8), torch.arange(n) % CLASSES, torch.arange(n))


class Network(nn.Module):
    """A network whose taps have the shapes of `features(width, ...)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = [max(2, width - back) for back in range(len(SIDES))][::-1]
        strides = [2, 1, 2, 1]
        stages = zip([3, *channels], channels, strides, strict=False)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()
            )
            for a, b, stride in stages
        )
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, images):
        for stage in self.stages:
            images = stage(images)
        return self.fc(images.mean((2, 3)))


def tapped(width: int, seed: int) -> FeatureExtractor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Network(width).double()
    maps = [f"stages.{i}" for i in range(4)]
    return FeatureExtractor(network, maps, "fc", [f"stages.{i}.2:in" for i in range(4)])


def answers(epoch: int, width: int = WIDTH):
    """A teacher's answers to all images, batch by batch, in an order of each epoch's own."""
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch))
    for index in order.split(CLOUD):
        made = features(width, seed=1000 * epoch + int(index[0]))
        shown = Batch(torch.zeros(CLOUD, 3, 8, 8), index % CLASSES, index)
        size = 1 + int(index[0]) / IMAGES  # so that clouds differ
        made = made.apply(lambda t: t.float())
        yield shown, Features(made.logits, size * made.embedding, made.maps, made.preactivations)


def never(epoch: int):
    raise AssertionError("the teacher was asked again")


class Recorder(Progress):
    """Keeps what is said; stops the work, as Ctrl-C does, when a bar has advanced so often."""

    def __init__(self, stop_at: float = math.inf, bar: str = "RipsNet") -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []
        self.stop_at, self.of = stop_at, bar

    def say(self, text):
        self.said.append(text)

    @contextmanager
    def bar(self, title, total, unit):
        steps = 0

        def advance(amount, news):
            nonlocal steps
            steps += 1
            if title == self.of and steps >= self.stop_at:
                raise KeyboardInterrupt

        yield advance


def source_in(folder: Path, width: int = 3) -> LossContext:
    """All that a loss may ask for, for a student of some width."""
    teacher = Teacher(tapped(WIDTH, seed=2), (0.5,) * 3, (0.25,) * 3).double()
    target = torch.arange(IMAGES) % CLASSES
    student = tapped(width, seed=1)
    sample = torch.zeros(CLOUD, 3, 8, 8)
    return LossContext(answers, target, student, teacher, "a teacher", folder, Recorder(), sample)


def agreeing(made: Features, network: FeatureExtractor) -> Features:
    """Features whose classifier reads the averages of the last map, as that of the network."""
    embedding = made.maps[-1].mean((2, 3))
    with torch.no_grad():
        return replace(made, embedding=embedding, logits=network.head(embedding))


def agreeing_networks(loss: type[Loss], context: LossContext, width: int):
    """A context with the student that a loss needs, and features of both networks."""
    own = replace(context, student=tapped(width, seed=1))
    teacher = agreeing(features(WIDTH, seed=2), own.teacher.network)
    if loss.replaces_classifier:
        student = reuse(own.student, own.teacher, own.sample.double()).double()
        own, width = replace(own, student=student), WIDTH
    return own, agreeing(features(width, seed=1), own.student), teacher


def bound(loss, student, teacher, context, **options):
    """Configures a loss and binds it to the sizes of two networks' features."""
    made = loss(**options)
    made.setup(student, teacher, context)
    return made
