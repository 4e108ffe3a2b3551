"""Runs per hour of a study on CIFAR-100: `topkd study run`, and the plain way of `plain_study.py`.

python benchmarks/study.py --data FOLDER --teacher FILE [--quick] [--overhead] [--csv FILE]

A ResNet-20 teaches ResNet-8 on 5,000 images for 3 epochs, with five methods and two seeds. The two
ways take turns, each in a new process and with an empty folder. For the plain way, imports and the
decoding of the images do not count. With ONEDNN_MAX_CPU_ISA=AVX2 and ATEN_CPU_CAPABILITY=avx2 the
times of a lesser processor are seen. Rows are added to the CSV.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

METHODS = ("ce", "kd", "dkd", "rkd", "topkd")
FIRST_STEP = "seconds from the start of a job to its first step"

arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
arguments.add_argument("--data", required=True, help="folder of CIFAR-100")
arguments.add_argument("--teacher", required=True, help="weights of a ResNet-20")
arguments.add_argument("--variants", default=",".join(METHODS))
arguments.add_argument("--seeds", type=int, default=2)
arguments.add_argument("--epochs", type=int, default=3)
arguments.add_argument("--limit", type=int, default=5000, help="training images")
arguments.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes of ours")
arguments.add_argument("--rounds", type=int, default=1)
arguments.add_argument("--quick", action="store_true", help="kd and topkd, 1 seed, 1 epoch")
arguments.add_argument("--overhead", action="store_true", help=f"measure only the {FIRST_STEP}")
arguments.add_argument("--json", action="store_true", help="print JSON")
arguments.add_argument("--csv", type=Path)
arguments.add_argument("--worker", choices=("plain", "forked", "alone"), help=argparse.SUPPRESS)
arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
arguments.add_argument("--started", type=float, help=argparse.SUPPRESS)


def study_file(asked: argparse.Namespace, folder: Path) -> Path:
    """Writes the study as JSON, which is YAML."""
    variants = asked.variants.split(",")
    known = {name: {"recipe": f"methods/resnet20-resnet8/{name}"} for name in METHODS}
    known["ce"] = [{"name": "ce"}]
    data = {"name": "cifar100", "root": asked.data, "limit": asked.limit, "augmentation_seed": 0}
    teacher = {"model": "resnet20", "checkpoint": asked.teacher, "cache": True}
    epochs = {"epochs": asked.epochs, "evaluate_every": asked.epochs}
    tree = {
        "recipe": "cifar100/resnet20-resnet8",
        "set": {"data": data, "teacher": teacher, **epochs},
        "baseline": variants[0],
        "variants": {name: known[name] for name in variants},
        "seeds": list(range(asked.seeds)),
    }
    path = folder / "study.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def plain(asked: argparse.Namespace) -> tuple[float, list[float]]:
    """Returns the seconds of the study and the accuracies of its runs."""
    return tuple(json.loads(_worker("plain", asked, Path())))


def ours(asked: argparse.Namespace) -> tuple[float, list[float]]:
    """Returns the seconds of the study and the accuracies of its runs."""
    with tempfile.TemporaryDirectory() as name:
        file, out = study_file(asked, Path(name)), Path(name) / "runs"
        words = ["study", "run", str(file), "--out", str(out), "--jobs", str(asked.jobs), "--quiet"]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "topkd", *words], check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - start
        results = [
            json.loads(path.read_text(encoding="utf-8")) for path in out.rglob("result.json")
        ]
        return seconds, [result["last"]["top1"] for result in results]


def compare(asked: argparse.Namespace) -> list[dict]:
    """Runs both studies in turn."""
    runs = len(asked.variants.split(",")) * asked.seeds
    seconds, top1 = {"plain": [], "ours": []}, {}
    for _ in range(asked.rounds):
        for way, study in (("plain", plain), ("ours", ours)):
            taken, accuracies = study(asked)
            seconds[way].append(taken)
            top1[way] = statistics.mean(accuracies)
    ratios = {
        way: statistics.median(a / b for a, b in zip(seconds["plain"], times, strict=True))
        for way, times in seconds.items()
    }
    return [
        {
            "way": way,
            "runs": runs,
            "median s": round(statistics.median(times), 1),
            "runs per hour": round(3600 * runs / statistics.median(times), 1),
            "plain / this": round(ratios[way], 2),
            "top-1": round(top1[way], 2),
        }
        for way, times in seconds.items()
    ]


def overhead(asked: argparse.Namespace) -> list[dict]:
    """Measures the time to the first step of jobs whose teacher and kernels are cached."""
    with tempfile.TemporaryDirectory() as name:
        study_file(asked, Path(name))
        forked = [float(line) for line in _worker("forked", asked, Path(name)).split()]
        alone = [float(_worker("alone", asked, Path(name))) for _ in range(asked.rounds)]
    ways = (("of `topkd study run`", forked), ("of `topkd study job`, a new process", alone))
    return [
        {"job": way, "median s": round(statistics.median(times), 2), "most s": round(max(times), 2)}
        for way, times in ways
    ]


def work(asked: argparse.Namespace) -> None:
    """Does the part of a worker process."""
    if asked.worker == "plain":
        import plain_study

        variants = asked.variants.split(",")
        counts = asked.seeds, asked.epochs, asked.limit
        print(json.dumps(plain_study.run(asked.data, asked.teacher, variants, *counts)))
        return
    from topkd.config import study
    from topkd.studies.executors import Local, base
    from topkd.training.trainer import Trainer

    started = [asked.started]

    class Timed(Local):
        def start(self, tasks):
            started[0] = time.monotonic()
            return super().start(tasks)

    def first_step(*_, **__):
        seconds = time.monotonic() - started[0]
        with (asked.folder / asked.worker).open("a", encoding="utf-8") as file:
            file.write(f"{seconds}\n")
        os._exit(0)

    Trainer.step = first_step
    jobs, out = study.load(asked.folder / "study.yaml").jobs(), asked.folder / "runs"
    if asked.worker == "forked":
        for ended in Timed(1).run(jobs, out):
            assert ended.error is None, ended.error
    else:
        base.work(jobs[-1], out)


def _worker(name: str, asked: argparse.Namespace, folder: Path) -> str:
    """Starts a worker process and returns what it reports."""
    options = {key: getattr(asked, key) for key in ("data", "teacher", "variants")}
    options |= {key: getattr(asked, key) for key in ("seeds", "epochs", "limit", "jobs")}
    options |= {"worker": name, "folder": folder, "started": time.monotonic()}
    words = [f"--{key}={value}" for key, value in options.items()]
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    report = folder / name
    if not report.is_file():
        return done.stdout
    text = report.read_text(encoding="utf-8")
    report.unlink()
    return text


def table(rows: list[dict]) -> Iterator[str]:
    """Formats rows as lines."""
    texts = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for first, *others in texts:
        rest = (f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True))
        yield "  ".join([f"{first:<{widths[0]}}", *rest])


def _append(path: Path, rows: list[dict]) -> None:
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    asked = arguments.parse_args()
    if asked.quick:
        asked.variants, asked.seeds, asked.epochs = "kd,topkd", 1, 1
    if asked.worker:
        work(asked)
        return
    from topkd._runtime.environment import environment

    machine = environment()
    rows = overhead(asked) if asked.overhead else compare(asked)
    if asked.json:
        print(json.dumps(rows, indent=2))
    else:
        title = FIRST_STEP if asked.overhead else f"{asked.jobs} processes of ours"
        print(f"{title}; {machine['instruction_set']}, {os.cpu_count()} CPUs")
        print(*table(rows), sep="\n")
    if asked.csv is not None:
        where = {"instruction set": machine["instruction_set"], "CPUs": os.cpu_count()}
        _append(asked.csv, [where | row for row in rows])


if __name__ == "__main__":
    main()
