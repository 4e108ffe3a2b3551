"""What every method of the catalog costs beside a training step with KD alone.

python benchmarks/losses.py [--batch 64] [--threads 1] [--csv FILE]

Student and teacher are ResNet-20 for 100 classes, images are 32x32. A step is the student's forward
and backward pass, the teacher's forward pass, cross-entropy and KD, in the numbers that training
chooses here. A term is its own forward and backward pass, from features to features, in turn with
the step. `kept` is what a term saves for its backward pass, `brought` its weights and buffers.
"""

import argparse
import csv
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from topkd._io.progress import Progress
from topkd.config.recipe import parse
from topkd.data import InMemory, training_batches
from topkd.features import Features, Teacher
from topkd.losses import KD, LOSSES, Loss, LossContext
from topkd.models import MODELS
from topkd.models.reused import reuse
from topkd.training.precision import Runtime

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--csv", help="where to write them")
asked = parser.parse_args()
torch.set_num_threads(asked.threads)
torch.manual_seed(0)
IMAGES, CLASSES, ROUNDS = 50_000, 100, 15
GLANCE = 64  # batches of the teacher's answers, for terms that learn from them: it changes no time
OPTIONS = {"ft": {"epochs": 1, "lr": 1e-3}}

pixels = torch.randint(256, (IMAGES, 32, 32, 3), dtype=torch.uint8)
memory = InMemory(pixels, torch.arange(IMAGES) % CLASSES, (0.5,) * 3, (0.25,) * 3, 4, True)
network, taught_by = MODELS["resnet20"].build(CLASSES), MODELS["resnet20"].build(CLASSES)
teacher = Teacher(taught_by, (0.5,) * 3, (0.25,) * 3)
settings = {"data": {"name": "cifar100"}, "student": {"model": "resnet20"}}
device = Runtime.of(parse(settings | {"losses": [{"name": "ce"}]}), IMAGES)


def answers(epoch: int):
    for batch in islice(training_batches(memory, asked.batch, 0, epoch), GLANCE):
        with device.autocast():
            answer = teacher(batch.images)
        yield batch, answer.apply(torch.Tensor.float)


def step() -> None:
    with device.autocast():
        made, answer = network(batch.images), teacher(batch.images)
    made, answer = made.apply(torch.Tensor.float), answer.apply(torch.Tensor.float)
    loss = torch.nn.functional.cross_entropy(made.logits, batch.target)
    (loss + kd(made, answer, batch)).backward()


def term(loss: Loss) -> None:
    copies = features.apply(lambda tensor: tensor.detach().requires_grad_())
    loss(copies, target, batch).backward()


def kept_for_backward(loss: Loss) -> int:
    """Bytes, each tensor once; the features themselves are there anyway."""
    seen = {
        tensor.untyped_storage().data_ptr() for f in (features, target) for tensor in f.tensors()
    }
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(features.apply(lambda tensor: tensor.detach().requires_grad_()), target, batch)
    held = sum(sizes.values())
    del value
    return held


def built(name: str, folder: Path) -> Loss | None:
    quiet = Progress(quiet=True)
    loss = LOSSES[name](**OPTIONS.get(name, {}))
    student = reuse(network, teacher, batch.images) if loss.replaces_classifier else network
    with torch.no_grad():  # in float32, in which training sets losses up
        made, answer = student(batch.images), teacher(batch.images)
    made = replace(made, distilled=made.logits)
    context = LossContext(answers, memory.target, student, teacher, "", folder, quiet, batch.images)
    try:
        loss.setup(made, answer, context)
    except ValueError as error:
        print(f"{name:14}left out: {error}")
        return None
    return loss.train()


def milliseconds(work) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


network.train()
kd = KD()
batch, target = next(answers(0))
with torch.no_grad(), device.autocast():
    features: Features = network(batch.images).apply(torch.Tensor.float)
features = replace(features, distilled=features.logits.clone())  # for deit, as of a second head
print(f"batch {asked.batch}, {asked.threads} thread(s), {ROUNDS} rounds in turn, medians")
print(f"{'':14}{'ms':>9}{'of a step':>11}{'kept':>11}{'brought':>11}")
rows = []
for name in LOSSES:
    with tempfile.TemporaryDirectory() as folder:
        loss = built(name, Path(folder))
    if loss is None:
        continue
    for work in (step, lambda loss=loss: term(loss)):
        work()
    times = [
        (milliseconds(lambda loss=loss: term(loss)), milliseconds(step)) for _ in range(ROUNDS)
    ]
    own = statistics.median(t for t, _ in times)
    share = statistics.median(t / s for t, s in times)
    kept = kept_for_backward(loss) / 1e6
    brought = sum(t.nbytes for t in (*loss.parameters(), *loss.buffers())) / 1e6
    rows.append((name, f"{own:.2f}", f"{share:.4f}", f"{kept:.2f}", f"{brought:.2f}"))
    print(f"{name:14}{own:9.2f}{share:11.1%}{kept:8.1f} MB{brought:8.1f} MB", flush=True)
if asked.csv:
    with open(asked.csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "ms", "share of a step", "kept MB", "brought MB"])
        writer.writerows(rows)
