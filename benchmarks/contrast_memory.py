"""How long CRD takes to mix a batch into its memory, in place and into a copy of the whole.

python benchmarks/contrast_memory.py [--images 50000] [--batch 64] [--width 128]
"""

import argparse

import torch
from turns import in_turn

from topkd.losses.crd import update_memory

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--images", type=int, default=50_000, help="rows of the memory")
parser.add_argument("--batch", type=int, default=64, help="rows that are mixed in")
parser.add_argument("--width", type=int, default=128, help="numbers in a row")
asked = parser.parse_args()
torch.set_num_threads(1)

generator = torch.Generator().manual_seed(0)
memory = torch.randn(asked.images, asked.width, generator=generator)
embedding = torch.randn(asked.batch, asked.width, generator=generator)
index = torch.randperm(asked.images, generator=generator)[: asked.batch]


def into_a_copy() -> None:
    """What a memory that is never changed in place costs."""
    update_memory(memory.clone(), index, embedding, 0.5)


ways = {
    "in place": lambda: update_memory(memory, index, embedding, 0.5),
    "into a copy": into_a_copy,
}
in_turn(ways, rounds=50, unit=f"{asked.batch} of {asked.images} rows")
