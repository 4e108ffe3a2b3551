"""Every method for two epochs of CIFAR-100: that all run, and what they cost. It ranks nothing.

python benchmarks/methods.py OUT DATA_ROOT TEACHER [METHOD ...]

Each recipe of methods/resnet20-resnet8 is carried out by `topkd run`, on one thread, and resumed
where it was stopped. The teacher's answers are kept for all methods that look at no feature map.
`topkd report OUT --markdown` makes the table.
"""

import subprocess
import sys

from topkd import recipe

FAMILY = "methods/resnet20-resnet8/"
SHORT = {  # stages that are longer than two epochs
    "ab": ["losses.ab.stop=1", "losses.ce.start=2"],
    "fsp": ["losses.fsp.stop=1", "losses.ce.start=2"],
    "ft": ["losses.ft.epochs=1"],
    "topkd-ripsnet": ["losses.topkd.training={passes: 2, epochs: 100, pooling: mean}"],
}
# These read feature maps, which are not kept, or two views of each image.
NOT_KEPT = {
    "ab",
    "at",
    "cat",
    "fitnet",
    "fsp",
    "ft",
    "nst",
    "ofd",
    "review",
    "simkd",
    "srrl",
    "vid",
}

out, root, teacher, *chosen = sys.argv[1:]
names = [name.removeprefix(FAMILY) for name in recipe.names() if name.startswith(FAMILY)]
for method in chosen or names:
    changes = [f"data.root={root}", f"teacher.checkpoint={teacher}", "epochs=2", "threads=1"]
    if method not in NOT_KEPT | {"mlkd"}:
        changes += ["teacher.cache=true", "data.augmentation_seed=0"]
    command = [sys.executable, "-m", "topkd", "run", FAMILY + method, "--out", out, "--quiet"]
    print(f"{method:16}", flush=True)
    subprocess.run([*command, *changes, *SHORT.get(method, [])], check=False)
