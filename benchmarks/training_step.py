"""A training step: the plain fp32 contiguous loop and ours, as it is and compiled.

python benchmarks/training_step.py [batch size]
"""

import sys

import torch
import torch.nn.functional as F
from turns import in_turn

from topkd.data import Data, InMemory
from topkd.device import Device
from topkd.features import Batch
from topkd.losses import CrossEntropy
from topkd.metrics import Sums
from topkd.models import MODELS
from topkd.progress import Progress
from topkd.recipe import parse
from topkd.terms import Weighted
from topkd.train import Trainer

SIZE = int(sys.argv[1]) if len(sys.argv) > 1 else 128


def plain(model: str):
    network = MODELS[model].network(classes=100).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), target).backward()
        optimizer.step()

    return step


def ours(model: str, *, compiled: bool):
    recipe = parse(
        {
            "data": {"name": "cifar100"},
            "student": {"model": model},
            "losses": [{"name": "ce"}],
            "batch_size": SIZE,
            "compile": compiled,
        }
    )
    pixels = torch.zeros(SIZE, 32, 32, 3, dtype=torch.uint8)
    memory = InMemory(pixels, target, (0.5,) * 3, (0.25,) * 3, padding=4, flip=True)
    data = Data("random", memory, memory, [str(c) for c in range(100)], (0.5,) * 3, (0.25,) * 3)
    device = Device.of(recipe, SIZE)
    student = MODELS[model].build(100)
    losses = [Weighted(recipe.losses[0], CrossEntropy())]
    trainer = Trainer(student, None, losses, data, recipe, 0, device, Progress())
    student.train()
    batch = Batch(images.to(memory_format=torch.channels_last), target, torch.arange(SIZE))
    return lambda: trainer.step(batch, 1, Sums(), measure=False)


torch.manual_seed(0)
images, target = torch.randn(SIZE, 3, 32, 32), torch.randint(100, (SIZE,))
for model in ("resnet8", "resnet20"):
    print(f"\n{model}, batch {SIZE}, {torch.get_num_threads()} threads")
    ways = {
        "plain fp32 contiguous loop": plain(model),
        "ours": ours(model, compiled=False),
        "ours, compiled": ours(model, compiled=True),
    }
    in_turn(ways, rounds=25, unit="a step")
