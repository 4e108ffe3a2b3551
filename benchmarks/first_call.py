"""How long the first call of `rips` takes, which compiles, and that of the next process.

python benchmarks/first_call.py [--csv FILE]

Every round starts processes with an empty cache, and the same again with what they left there.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile

ROUNDS = 3
CALL = """
import time, torch
from topkd.topology import rips
points = torch.randn(2, 64, 64, requires_grad=True)
start = time.perf_counter()
rips(points, max_dim={dimension}).deaths.sum().backward()
print(time.perf_counter() - start)
"""


def seconds(dimension: int, cache: str) -> float:
    command = [sys.executable, "-c", CALL.format(dimension=dimension)]
    environment = os.environ | {"NUMBA_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, check=True, capture_output=True, encoding="utf-8"
    )
    return float(done.stdout)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--csv", help="where to write them")
asked = parser.parse_args()
found = {}
for _ in range(ROUNDS):
    for dimension, name in enumerate(("H0", "H0 and H1")):
        with tempfile.TemporaryDirectory() as cache:
            for when in ("compiled", "from the disk"):
                found.setdefault((name, when), []).append(seconds(dimension, cache))
print(f"the first call with its gradient, seconds, median of {ROUNDS}")
rows = [(*case, statistics.median(values)) for case, values in found.items()]
for name, when, median in rows:
    print(f"{name:12}{when:16}{median:6.2f}")
if asked.csv:
    with open(asked.csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "when", "median s"])
        writer.writerows((name, when, f"{median:.2f}") for name, when, median in rows)
