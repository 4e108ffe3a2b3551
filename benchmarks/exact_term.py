"""What the exact topological term adds to a step with CE and KD: ResNet-20 to ResNet-8, batch 64.

python benchmarks/exact_term.py
"""

import torch
from turns import in_turn

from topkd._io.progress import Progress
from topkd.config.recipe import parse
from topkd.data import Data, InMemory
from topkd.features import Batch, Teacher
from topkd.losses import CE, KD, TopKD
from topkd.losses.base import LossTerm
from topkd.models import MODELS
from topkd.topology import PersistenceVector, rips
from topkd.training.precision import Runtime
from topkd.training.tracking import Sums
from topkd.training.trainer import Trainer

SIZE = 64


def trainer(*names: str):
    recipe = parse(
        {
            "data": {"name": "cifar100"},
            "teacher": {"model": "resnet20", "checkpoint": "not read here"},
            "student": {"model": "resnet8"},
            "losses": [{"name": name} for name in names],
        }
    )
    torch.manual_seed(0)
    student, network = MODELS["resnet8"].build(100), MODELS["resnet20"].build(100)
    teacher = Teacher(network, *STATISTICS)
    vector = PersistenceVector.fit(rips(teacher(images).embedding))
    made = {
        "ce": CE(),
        "kd": KD(),
        "topkd": TopKD(),
    }
    made["topkd"].describe = lambda points: vector(rips(points))
    losses = [LossTerm(term, made[term.name]) for term in recipe.losses]
    device = Runtime.of(recipe, SIZE)
    built = Trainer(student, teacher, losses, data, recipe, 0, device, Progress())
    student.train()
    return lambda: [built.step(batch, 1, Sums(), measure=False) for _ in range(10)]


STATISTICS = (0.5,) * 3, (0.25,) * 3
torch.manual_seed(0)
images, target = torch.randn(SIZE, 3, 32, 32), torch.randint(100, (SIZE,))
memory = InMemory(
    torch.zeros(SIZE, 32, 32, 3, dtype=torch.uint8), target, *STATISTICS, padding=4, flip=True
)
data = Data("random", memory, memory, [str(c) for c in range(100)], *STATISTICS)
batch = Batch(images.to(memory_format=torch.channels_last), target, torch.arange(SIZE))
ways = {"ce + kd + exact topkd": trainer("ce", "kd", "topkd"), "ce + kd": trainer("ce", "kd")}
in_turn(ways, rounds=40, unit="ten steps")
