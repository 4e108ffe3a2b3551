"""Every method for two epochs of CIFAR-100: that all run, and what they cost. It ranks nothing.

python benchmarks/methods.py OUT DATA_ROOT TEACHER [METHOD ...]

Each recipe of methods/resnet20-resnet8, and deit for a network that has its token, is carried out
by `topkd run`, on one thread, and resumed where it was stopped. The teacher's answers are kept for
all methods that look at no feature map.
`topkd report OUT --markdown` makes the table.
"""

import subprocess
import sys

from topkd.config import recipe

FAMILY = "methods/resnet20-resnet8/"
ELSEWHERE = {"deit": "cifar100/resnet20-deit-tiny"}
SHORT = {  # pre-training that is longer than two epochs
    "ft": ["losses.ft.epochs=1"],
    "topkd-ripsnet": ["losses.topkd.training={passes: 2, epochs: 100, pooling: mean}"],
}
READ_MAPS = {"ab", "at", "cat", "fitnet", "fsp", "ft", "nst", "ofd", "review", "simkd", "sp"}
NOT_KEPT = READ_MAPS | {
    "srrl",
    "vid",
    "mlkd",
}  # feature maps are not kept, nor two views of each image

out, root, teacher, *chosen = sys.argv[1:]
names = [name.removeprefix(FAMILY) for name in recipe.names() if name.startswith(FAMILY)]
names += ELSEWHERE
for method in chosen or names:
    changes = [f"data.root={root}", f"teacher.checkpoint={teacher}", "epochs=2", "threads=1"]
    if method not in NOT_KEPT:
        changes += ["teacher.cache=true", "data.augmentation_seed=0"]
    name = ELSEWHERE.get(method, FAMILY + method)
    command = [sys.executable, "-m", "topkd", "run", name, "--out", out, "--quiet"]
    print(f"{method:16}", flush=True)
    subprocess.run([*command, *changes, *SHORT.get(method, [])], check=False)
