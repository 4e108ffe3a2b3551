"""Draws the picture of the README from a finished run.

topkd run digits && python docs/picture.py runs/digits docs/exact-and-guessed.png
"""

import sys
from pathlib import Path

from topkd.evaluation.results import collect
from topkd.reporting.sections import images

folder, picture = map(Path, sys.argv[1:])
study = next(study for study in collect(folder) if study.first.result.teacher)
images(study).pictures[0].figure.savefig(picture, dpi=110)
