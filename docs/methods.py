"""Makes the table of all methods after two epochs from the results in results/two-epochs.

python benchmarks/methods.py results/two-epochs DATA_ROOT TEACHER
python docs/methods.py > docs/methods.md
"""

import csv
from pathlib import Path

from topkd.evaluation.results import collect
from topkd.reporting.page import formula

RESULTS = Path(__file__).parent.parent / "results"


def renamed(text: str) -> str:
    """Names a recipe or an option as it is called now; the runs are older."""
    return text.replace("standardise", "standardize")


def costs(batch: int) -> dict[str, dict[str, str]]:
    """What terms cost at one size of the batch."""
    with open(RESULTS / f"speed/losses-{batch}.csv", encoding="utf-8") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


print("""# Every method, two epochs

Made by `python docs/methods.py` from `results/two-epochs`, which `benchmarks/methods.py` writes:
ResNet-20 (71.74 %) teaches ResNet-8 on all of CIFAR-100 for two epochs, one seed, by the recipes of
`methods/resnet20-resnet8`, with weights that were published for other pairs and 240 epochs.

**It ranks nothing**: it shows that each method runs, and about what it costs. Methods that begin
with a stage of their own (ab, fsp) had one epoch for it and one for the labels. DeiT's token has
another student, a transformer of 5.5 million weights.

Two runs shared two cores, one thread each, and at times other work: the seconds are rough,
[losses](losses.md) and `benchmarks/losses.py` tell the cost of a term. In runs marked \\* the
teacher's answers were read from `teacher.cache`; the first of them, kd, made them.

| recipe | losses | top-1 %, last epoch | s an epoch |
|---|---|--:|--:|""")
for study in collect(RESULTS / "two-epochs"):
    run, recipe = study.first, study.first.result.recipe
    kept = (
        "\\*" if "cache: true" in (study.folder / "recipe.yaml").read_text(encoding="utf-8") else ""
    )
    seconds = run.history[-1]["seconds"]
    losses = renamed(formula(run.result.losses))
    print(f"| `{renamed(recipe)}` | {losses} | {run.result.last.top1:.2f} | {seconds:.0f}{kept} |")

print("""
## What a term costs

Written by `benchmarks/losses.py`: forward and backward pass of a term by itself, from features to
features, beside a training step of ResNet-20 with KD, which has the teacher's pass in it; one
thread, in turn, medians. Brought are the weights and buffers of a loss, kept is what it saves from
its forward pass to its backward one.

| loss | 64 images: ms | of a step | kept, MB | 256: ms | of a step | kept, MB | brought, MB |
|---|--:|--:|--:|--:|--:|--:|--:|""")
few, many = (costs(batch) for batch in (64, 256))
for name in few:
    cells = [
        f"{row['ms']} | {float(row['share of a step']):.1%} | {row['kept MB']}"
        for row in (few[name], many[name])
    ]
    print(f"| [`{name}`](losses.md#{name}) | {' | '.join(cells)} | {few[name]['brought MB']} |")
