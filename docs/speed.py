"""Makes the page of timings from what the benchmark wrote.

python benchmarks/topology.py EMBEDDINGS --growth --csv results/speed/topology.csv \\
    --plot docs/topology-speed.png && python docs/speed.py > docs/speed.md
"""

import csv
from pathlib import Path

here = Path(__file__).parent
with open(here.parent / "results/speed/topology.csv", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
PARTS = ("Gaussian", "embeddings")


def table(columns: list[tuple[str, dict[str, str]]]) -> None:
    """A line for each way, a column for each setting: the median, and how many times ours it is."""
    print("| | " + " | ".join(name for name, _ in columns) + " |")
    print("|---|" + "--:|" * len(columns))
    for what in dict.fromkeys(what for _, values in columns for what in values):
        cells = []
        for _, values in columns:
            if what not in values:
                cells.append("–")
                continue
            times = float(values[what]) / float(values["ours"])
            cells.append(
                f"{float(values[what]):,.0f}" + ("" if what == "ours" else f" ({times:.1f})")
            )
        print(f"| {what} | " + " | ".join(cells) + " |")


def column(clouds: str, dimension: str, points: str) -> dict[str, str]:
    chosen = [
        row
        for row in rows
        if (row["clouds"], row["dimension"], row["points"]) == (clouds, dimension, points)
    ]
    return {row["what"]: row["median us"] for row in chosen}


print("# Speed of exact persistence\n")
print("Made by `python docs/speed.py` from `results/speed/topology.csv`, which")
print("`benchmarks/topology.py` writes: one thread, all ways in turn in one process, distances and")
print(
    "Python included, answers compared first. Microseconds a cloud, median; in brackets, how many"
)
print("times ours. The machine is a virtual one, whose speed wanders by half and more: trust the")
print("brackets, not the digits.\n")
print("## 64 points in 64 dimensions, batches of 781 (ours) and a few at a time (peers)\n")
names = {"H0": "H0", "H1": "H0 and H1"}
table([(f"{part}, {names[d]}", column(part, d, "64")) for d in names for part in PARTS])
for dimension, name in names.items():
    sizes = dict.fromkeys(
        r["points"] for r in rows if (r["clouds"], r["dimension"]) == ("growth", dimension)
    )
    print(f"\n## {name} of larger Gaussian clouds, one at a time\n")
    table([(f"{n} points", column("growth", dimension, n)) for n in sizes])
print(
    "\nAlone, a cloud of 64 points costs more in Python than in the kernels: batches are what this"
)
print("is made for. There, and beyond 256 points, redzed-tda as it is timed here, without critical")
print("edges and gradients, is ahead in H1; beyond 256 points it also does the work behind ours.")
with open(here.parent / "results/speed/kernels.csv", encoding="utf-8") as file:
    stages = list(csv.DictReader(file))
print("\n## What bounds it\n")
print("Written by `benchmarks/kernels.py`: the stages of a batch of 781 clouds of 64 points in 64")
print("dimensions, one upon the other, microseconds a cloud, in turn, the least of 60 rounds.\n")
print("| | us |\n|---|--:|")
for row in stages:
    print(f"| {row['stage']} | {float(row['least us']):.1f} |")
print(
    "\nThe distances are in float64, as differences: in float32, or as a product of matrices, near"
)
print("points would change places. The tree takes a step for every point, and each waits for the")
print(
    "nearest point of the one before: that is latency, which wider vectors do not shorten. For H1"
)
print(
    "up to 2,016 edges are sorted, and each is laid against every cocycle that is alive, in turn.\n"
)
with open(here.parent / "results/speed/first_call.csv", encoding="utf-8") as file:
    calls = list(csv.DictReader(file))
print("## The first call\n")
print(
    "It compiles, and leaves what it compiled on the disk for the processes to come. Seconds, with"
)
print("the gradient, written by `benchmarks/first_call.py`:\n")
print("| | s |\n|---|--:|")
for row in calls:
    print(f"| {row['what']}, {row['when']} | {float(row['median s']):.1f} |")
print("\n![Time against the number of points](topology-speed.png)")
with open(here.parent / "results/speed/training_step.csv", encoding="utf-8") as file:
    steps = list(csv.DictReader(file))
print("\n# Speed of a training step\n")
print("Written by `benchmarks/training_step.py --csv results/speed/training_step.csv`, under")
print("`ONEDNN_MAX_CPU_ISA=AVX2`, `AVX512_CORE` and no limit, on one processor: batches of")
print(
    f"{steps[0]['batch']} CIFAR images, threads: {steps[0]['threads']}. A step of the loop as it is"
)
print("usually written, in float32 and contiguous, against one of ours as `topkd` runs it, each in")
print("a process of its own, in turn. Milliseconds, median; in brackets, the median ratio.\n")
sets = list(dict.fromkeys(row["instruction set"] for row in steps))
columns = [(model, s) for model in dict.fromkeys(row["model"] for row in steps) for s in sets]
print("| | " + " | ".join(f"{model}, {s}" for model, s in columns) + " |")
print("|---|" + "--:|" * len(columns))
for way in dict.fromkeys(row["way"] for row in steps):
    found = {(row["model"], row["instruction set"]): row for row in steps if row["way"] == way}
    cells = [f"{float(r['median ms']):.0f} ({r['plain / this']})" for r in map(found.get, columns)]
    print(f"| {way} | " + " | ".join(cells) + " |")
print(
    "\nWith AVX512-BF16 ours is computed in bfloat16, elsewhere in float32, so a claim of twice the"
)
print(
    "speed holds for processors with bfloat16 alone. In float32 the gain comes from channels-last"
)
print("images and from memory that is kept between steps; a step's weights are the same bits with")
print("and without the latter. The last line is a bound: our step if all but its convolutions cost")
print("nothing. Under AVX2 these run at some 100 GFLOP/s on one core, which is what its two units")
print("for multiplication and addition can do; faster ones need another algorithm and round")
print("otherwise. In-place ReLUs and additions were tried and changed nothing.")
