"""How long `topkd --help` takes, and the greatest memory of a CIFAR-100 run.

python benchmarks/command.py [folder of CIFAR-100]
"""

import resource
import subprocess
import sys
import tempfile

from turns import in_turn

TOPKD = [sys.executable, "-m", "topkd"]


def quietly(*words: str) -> None:
    subprocess.run([*TOPKD, *words], check=True, capture_output=True)


in_turn({"topkd --help": lambda: quietly("--help")}, rounds=10, unit="a process")
if len(sys.argv) > 1:
    with tempfile.TemporaryDirectory() as out:
        recipe = ("cifar100/teachers/resnet20", f"data.root={sys.argv[1]}", "epochs=1")
        quietly("student", *recipe, "data.limit=2000", "--out", out)
    kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"a CIFAR-100 run took {kilobytes / 2**20:.2f} GiB at most")
