"""Times `topkd --help` and the lists of a study, and measures the memory of a CIFAR-100 run.

python benchmarks/command.py [folder of CIFAR-100]
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from turns import in_turn

TOPKD = [sys.executable, "-m", "topkd"]
STUDY = """
recipe: cifar100/resnet20-resnet8
baseline: kd
variants:
  kd: {recipe: methods/resnet20-resnet8/kd}
  dkd: {recipe: methods/resnet20-resnet8/dkd}
  rkd: {recipe: methods/resnet20-resnet8/rkd}
  topkd: {recipe: methods/resnet20-resnet8/topkd}
  fitnet: {recipe: methods/resnet20-resnet8/fitnet}
settings: {all: {}, few: {data.limit: 5000}}
seeds: 0-99
"""


def quietly(*words: str) -> None:
    subprocess.run([*TOPKD, *words], check=True, capture_output=True)


with tempfile.TemporaryDirectory() as out:
    study = Path(out) / "study.yaml"
    study.write_text(STUDY, encoding="utf-8")
    ways = {"topkd --help": lambda: quietly("--help")}
    for word in ("status", "jobs"):
        ways[f"topkd study {word}, 1,000 jobs"] = lambda word=word: quietly(
            "study", word, str(study), "--out", out
        )
    in_turn(ways, rounds=10, unit="a process")
if len(sys.argv) > 1:
    with tempfile.TemporaryDirectory() as out:
        recipe = ("cifar100/teachers/resnet20", f"data.root={sys.argv[1]}", "epochs=1")
        quietly("student", *recipe, "data.limit=2000", "--out", out)
    kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"a CIFAR-100 run took {kilobytes / 2**20:.2f} GiB at most")
