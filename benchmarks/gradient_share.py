"""The cost of measuring gradients at the backbone weights, as a fraction of an epoch.

python benchmarks/gradient_share.py [--student resnet8] [--teacher resnet20] [--loss review]
    [--batch 64] [--threads 1]

Images are random, of CIFAR's size; the terms are ce, kd and a loss on feature maps. Steps with and
without measurement take turns. The last lines relate the difference to an epoch of CIFAR-100 and,
for `topkd.Distiller`, to the steps between two measurements.
"""

import argparse

import torch
from turns import in_turn

from topkd._io.progress import Progress
from topkd._runtime.allocator import keep_freed_memory
from topkd.config.recipe import parse
from topkd.data import Data, InMemory
from topkd.features import Batch, Teacher
from topkd.losses import CE, KD, LOSSES
from topkd.losses.base import LossTerm
from topkd.models import MODELS
from topkd.training import objective
from topkd.training.precision import Runtime
from topkd.training.tracking import Sums
from topkd.training.trainer import Trainer

TRAINED = 50_000  # images of an epoch
ROUNDS = 25

arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
arguments.add_argument("--student", default="resnet8")
arguments.add_argument("--teacher", default="resnet20")
arguments.add_argument("--loss", default="review")
arguments.add_argument("--batch", type=int, default=64)
arguments.add_argument("--threads", type=int, default=1)


def prepared(asked: argparse.Namespace) -> tuple[Trainer, Batch]:
    """Builds a trainer and a batch of random images."""
    size = asked.batch
    recipe = parse(
        {
            "data": {"name": "cifar100"},
            "teacher": {"model": asked.teacher, "checkpoint": "unused"},
            "student": {"model": asked.student},
            "losses": [{"name": "ce"}, {"name": "kd"}, {"name": asked.loss, "share": 0.5}],
            "batch_size": size,
        }
    )
    target = torch.arange(size) % 100
    pixels = torch.zeros(size, 32, 32, 3, dtype=torch.uint8)
    memory = InMemory(pixels, target, (0.5,) * 3, (0.25,) * 3, padding=4, flip=True)
    data = Data("random", memory, memory, [str(c) for c in range(100)], (0.5,) * 3, (0.25,) * 3)
    student = MODELS[asked.student].build(100)
    teacher = Teacher(MODELS[asked.teacher].build(100))
    images = torch.randn(size, 3, 32, 32)
    on_maps = LOSSES[asked.loss]()
    with torch.no_grad():
        on_maps.setup(student(images), teacher(images), context=None)
    losses = [
        LossTerm(t, loss) for t, loss in zip(recipe.losses, (CE(), KD(), on_maps), strict=True)
    ]
    trainer = Trainer(
        student, teacher, losses, data, recipe, 0, Runtime.of(recipe, size), Progress(quiet=True)
    )
    student.train()
    return trainer, Batch(images, target, torch.arange(size))


def main() -> None:
    asked = arguments.parse_args()
    keep_freed_memory()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    trainer, batch = prepared(asked)
    trainer.step(batch, 1, Sums(), measure=True)
    times = in_turn(
        {
            name: lambda measure=measure: trainer.step(batch, 1, Sums(), measure=measure)
            for name, measure in (("a step", False), ("a measured step", True))
        },
        rounds=ROUNDS,
        unit=f"a step of {asked.batch} images",
    )
    (plain, _, _), (_, _, ratio) = times.values()
    extra, steps = 1 / ratio - 1, TRAINED // asked.batch
    measured = objective.measurements("backbone weights", steps, is_shared=True)
    print(f"a measurement costs {extra:.2f} steps of {1e3 * plain:.1f} ms")
    print(f"{measured} of {steps} steps are measured: {measured * extra / steps:.2%} of an epoch")
    every = objective.MEASURED_EVERY["backbone weights"]
    print(f"one of {every} steps is measured: {extra / every:.2%} (topkd.Distiller)")


if __name__ == "__main__":
    main()
