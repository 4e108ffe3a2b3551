"""Executors, which run the jobs of a study."""

from topkd.studies.executors.base import Ended, Executor
from topkd.studies.executors.local import Local

__all__ = ["Ended", "Executor", "Local"]
