"""Executors: each starts the jobs of a study in its own way."""

from topkd.studies.executors.base import Ended, Executor
from topkd.studies.executors.local import Local

__all__ = ["Ended", "Executor", "Local"]
