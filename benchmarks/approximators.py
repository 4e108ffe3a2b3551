"""How well approximators guess, given the same clouds and the same time; H0 and H1, one thread.

python benchmarks/approximators.py RECIPE SECONDS [key=value ...]

RECIPE tells data and teacher, as in
cifar100/resnet20-resnet8 90 data.root=FOLDER teacher.checkpoint=FILE
"""

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

from topkd._io.progress import Progress  # noqa: E402
from topkd.config.recipe import load  # noqa: E402
from topkd.topology import (  # noqa: E402  # noqa: E402
    Exact,
    PersistenceImage,
    PersistenceVector,
    Training,
    fidelity,
    rips,
    train,
)
from topkd.topology.approximation import cut_clouds  # noqa: E402
from topkd.training.experiment import Experiment  # noqa: E402

torch.set_num_threads(1)
name, seconds, *changes = sys.argv[1:]
recipe = load(name, changes)
answers = Experiment(recipe, Path(tempfile.mkdtemp()), Progress()).teacher_features
passes = []
for epoch in range(2):
    pairs = [(batch.index, answer.embedding) for batch, answer in answers(epoch)]
    passes.append([torch.cat(column) for column in zip(*pairs, strict=True)])
images = 1 + max(int(index.max()) for index, _ in passes)
kept_back = torch.zeros(images, dtype=torch.bool)
kept_back[torch.randperm(images, generator=torch.Generator().manual_seed(0))[::10]] = True


def clouds(number: int, *, held_out: bool) -> torch.Tensor:
    index, embeddings = passes[number % 2]
    here = embeddings[kept_back[index] == held_out]
    return cut_clouds(here, recipe.batch_size, torch.Generator().manual_seed(number))


first, held_out = clouds(0, held_out=False), clouds(0, held_out=True)
eval_split = torch.cat([clouds(number, held_out=True) for number in range(4)])
loops = rips(first, max_dim=1).of(1)
targets = {
    "H0, vector of 20": Exact(PersistenceVector.fit(rips(first))),
    "H0, TopKD's image": Exact(PersistenceImage.fit(rips(first))),
    "H1, image 10 x 10": Exact(PersistenceImage.fit_cells(loops, resolution=10), dimension=1),
}
for what, exact in targets.items():
    for network in ("ripsnet", "distancenet"):
        epochs, took = 20, 0.0
        for trial in (True, False):  # the first tells how many epochs fit into the time
            if not trial:
                epochs = max(1, int(20 * float(seconds) / took))
            start = time.process_time()
            learned = train(
                lambda number: clouds(number, held_out=False),
                held_out,
                exact,
                Training(epochs=epochs, patience=epochs),
                network=network,
            )
            took = time.process_time() - start
        judged = fidelity(learned, exact, first, eval_split)
        print(f"{what:18} {network:12} {epochs:5} epochs, {took:4.0f} s: {judged}", flush=True)
