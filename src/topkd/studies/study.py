"""The ``Study`` class: results, table, report and trained networks of finished runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from topkd._io.progress import Progress
from topkd.config import recipe as recipes
from topkd.evaluation import results
from topkd.evaluation.loading import Classifier, load
from topkd.reporting import page


@dataclass(frozen=True)
class Study:
    """Finished runs of one recipe.

    Args:
        folder: Folder of the runs, named after the recipe, e.g. ``runs/digits``.
        student: Creates an untrained student, if it has no name.

    Examples:
        >>> study = Study(Path("runs/digits"))
        >>> study.report("page.html")  # doctest: +SKIP
    """

    folder: Path
    student: Callable[[], nn.Module] | None = None

    def results(self) -> list[dict[str, Any]]:
        """Returns the content of every ``result.json``, verified against its hash.

        Raises:
            ValueError: If there is no finished run, or a file was altered.
        """
        paths = sorted(self.folder.glob("*/seed*"))
        loaded = [results.finished(path) for path in paths]
        done = [each for each in loaded if each is not None]
        if not done:
            raise ValueError(f"{self.folder} has no finished run")
        return done

    def table(self) -> str:
        """Returns all runs as a Markdown table with means, standard deviations and comparisons.

        Raises:
            ValueError: If there is no finished run, or a file was altered.
        """
        return page.markdown(self.folder)

    def report(self, path: str | Path) -> Path:
        """Writes a self-contained HTML page with tables and plots.

        Args:
            path: Path of the file.

        Raises:
            ValueError: If there is no finished run, or a file was altered.
        """
        page.write_report(self.folder, Path(path), Progress())
        return Path(path)

    def network(self, seed: int = 0, variant: str | None = None) -> Classifier:
        """Loads a trained student.

        Args:
            seed: Seed of the run.
            variant: Name of a control. Defaults to the recipe's own ``losses``.

        Raises:
            FileNotFoundError: If there is no such run.
        """
        if variant is None:
            variant = recipes.load(str(self.folder / "recipe.yaml")).main
        network = None if self.student is None else self.student()
        return load(self.folder / variant / f"seed{seed}", network=network)
