"""Location and completion of the jobs of a study."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from topkd._io import files
from topkd.config.study import Job


@dataclass(frozen=True)
class Place:
    """Folders of a study's runs.

    Args:
        out: Parent folder of new runs.
        results: Folders of the same layout with finished results only, such as committed
            ``result.json`` files without weights.

    Raises:
        FileNotFoundError: If one of ``results`` does not exist.
    """

    out: Path
    results: Sequence[Path] = ()

    def __post_init__(self) -> None:
        for folder in self.results:
            if not folder.is_dir():
                raise FileNotFoundError(f"--results: there is no folder {folder}")

    def run(self, job: Job, root: Path | None = None) -> Path:
        """Returns the folder of a job's run."""
        return (root or self.out) / job.recipe.name / job.recipe.main / f"seed{job.seed}"

    def result(self, job: Job) -> Path | None:
        """Finds the result of a job in any of the folders; None if the job is not done.

        Raises:
            ValueError: If a result was altered or belongs to another recipe or seed.
        """
        for root in (self.out, *self.results):
            path = self.run(job, root) / "result.json"
            if path.is_file():
                result = files.read_sealed(path)
                if result.get("seed", job.seed) != job.seed:
                    raise ValueError(f"{path} is the result of seed {result['seed']}")
                found = result.get("recipe_hash")
                if found != job.recipe.hash:
                    raise ValueError(
                        f"{path} belongs to another recipe ({found}, not {job.recipe.hash}); "
                        "rename the study, or choose another --out"
                    )
                return path
        return None

    def pending(self, jobs: Iterable[Job]) -> list[Job]:
        """Lists the jobs that are not done.

        Raises:
            ValueError: If a result was altered or belongs to another recipe or seed.
        """
        return [job for job in jobs if self.result(job) is None]
