"""A training step: the plain fp32 contiguous loop, as it is usually run, and ours.

python benchmarks/training_step.py [--batch 128] [--threads 1] [--csv FILE]

Each way is a process of its own, since ours also sets how memory is allocated; they take their
steps in turn. With ONEDNN_MAX_CPU_ISA=AVX2 or AVX512_CORE the times of a lesser processor are seen.
The last line is a bound: the time that our step spends in convolutions. Rows are added to the CSV.
"""

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

from turns import in_turn

WAYS = ("plain fp32 contiguous loop", "ours", "ours, compiled", "bound: our convolutions")
ROUNDS = 15

arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
arguments.add_argument("--batch", type=int, default=128)
arguments.add_argument("--threads", type=int, default=1)
arguments.add_argument("--csv", type=Path)
arguments.add_argument("--worker", nargs=2, metavar=("WAY", "MODEL"), help=argparse.SUPPRESS)


def plain(model: str, batch: int):
    import torch
    import torch.nn.functional as F

    from topkd.models import MODELS

    images, target = torch.randn(batch, 3, 32, 32), torch.randint(100, (batch,))
    network = MODELS[model].network(classes=100).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), target).backward()
        optimizer.step()

    return step


def ours(model: str, size: int, *, compiled: bool):
    import torch

    from topkd._io.progress import Progress
    from topkd.config.recipe import parse
    from topkd.data import Data, InMemory
    from topkd.features import Batch
    from topkd.losses import CE
    from topkd.losses.base import LossTerm
    from topkd.models import MODELS
    from topkd.training.precision import Runtime
    from topkd.training.tracking import Sums
    from topkd.training.trainer import Trainer

    recipe = parse(
        {
            "data": {"name": "cifar100"},
            "student": {"model": model},
            "losses": [{"name": "ce"}],
            "batch_size": size,
            "compile": compiled,
        }
    )
    images, target = torch.randn(size, 3, 32, 32), torch.randint(100, (size,))
    pixels = torch.zeros(size, 32, 32, 3, dtype=torch.uint8)
    memory = InMemory(pixels, target, (0.5,) * 3, (0.25,) * 3, padding=4, flip=True)
    data = Data("random", memory, memory, [str(c) for c in range(100)], (0.5,) * 3, (0.25,) * 3)
    device = Runtime.of(recipe, size)
    losses = [LossTerm(recipe.losses[0], CE())]
    student = MODELS[model].build(100)
    trainer = Trainer(student, None, losses, data, recipe, 0, device, Progress())
    student.train()
    batch = Batch(images.to(memory_format=torch.channels_last), target, torch.arange(size))
    return lambda: trainer.step(batch, 1, Sums(), measure=False)


def in_convolutions(step) -> float:
    """Seconds that a call of ``step`` spends in convolutions."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = profile.key_averages()
    kinds = ("aten::mkldnn_convolution", "aten::convolution_backward")
    return sum(event.cpu_time_total for event in events if event.key in kinds) / 1e6


def work(way: str, model: str, batch: int, threads: int) -> None:
    """Takes a step for each line on standard input and prints its seconds."""
    if way != WAYS[0]:
        from topkd._runtime.allocator import keep_freed_memory

        keep_freed_memory()
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = plain(model, batch) if way == WAYS[0] else ours(model, batch, compiled="," in way)
    for _ in range(3):
        step()
    for _ in sys.stdin:
        start = time.perf_counter()
        if way == WAYS[3]:
            print(in_convolutions(step), flush=True)
            continue
        step()
        print(time.perf_counter() - start, flush=True)


def main() -> None:
    asked = arguments.parse_args()
    if asked.worker:
        work(*asked.worker, asked.batch, asked.threads)
        return
    from topkd._runtime.environment import environment

    machine = environment()
    for model in ("resnet8", "resnet20"):
        print(
            f"\n{model}, batch {asked.batch}, threads {asked.threads}, {machine['instruction_set']}"
        )
        started = {way: _start(way, model, asked) for way in WAYS}
        times = in_turn(
            {way: lambda worker=worker: _ask(worker) for way, worker in started.items()},
            rounds=ROUNDS,
            unit="a step",
        )
        for worker in started.values():
            worker.communicate()
        if asked.csv is not None:
            _append(asked.csv, machine, asked, model, times)


def _start(way: str, model: str, asked: argparse.Namespace) -> subprocess.Popen:
    options = ["--batch", str(asked.batch), "--threads", str(asked.threads)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    words = [sys.executable, __file__, *options, "--worker", way, model]
    return subprocess.Popen(words, text=True, encoding="utf-8", **pipes)


def _ask(worker: subprocess.Popen) -> float:
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def _append(path: Path, machine: dict, asked: argparse.Namespace, model: str, times: dict) -> None:
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                ["processor", "instruction set", "threads", "batch", "model", "way", "median ms"]
                + ["least ms", "plain / this"]
            )
        where = (machine["processor"], machine["instruction_set"], asked.threads, asked.batch)
        for way, (median, least, ratio) in times.items():
            numbers = (f"{1e3 * median:.2f}", f"{1e3 * least:.2f}", f"{ratio:.3f}")
            writer.writerow([*where, model, way, *numbers])


if __name__ == "__main__":
    main()
