"""Studies: several runs that belong together, started from Python, with their tables."""

from topkd.studies.pipeline import distill
from topkd.studies.study import Study

__all__ = ["Study", "distill"]
