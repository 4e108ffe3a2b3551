"""The folders of runs: one recipe per folder, one process at a time per run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from topkd._io import files
from topkd._io.progress import Progress
from topkd._runtime import processes
from topkd.config import recipe as recipes
from topkd.config.recipe import Recipe
from topkd.config.validation import RecipeError


def claim(folder: Path, recipe: Recipe, *, own: Path | None = None) -> None:
    """Writes the recipe to the folder of its runs.

    Args:
        folder: Folder of all runs of the recipe.
        recipe: The recipe.
        own: Folder of the run whose lock this process holds.

    Raises:
        RecipeError: If the recipe in the folder was altered.
        ValueError: If the folder has runs of another recipe, or such a run is active.
    """
    processes.by_first(lambda: _claim(folder, recipe, own))


def _claim(folder: Path, recipe: Recipe, own: Path | None) -> None:
    path = folder / "recipe.yaml"
    if not (path.exists() and _has_runs(folder, own)):
        files.write(path, recipes.write(recipe))
        return
    try:
        there = recipes.load(str(path))
    except RecipeError as error:
        raise RecipeError(f"{path} was altered: {error}") from error
    if there.hash != recipe.hash:
        differs = recipes.difference(there, recipe)
        raise ValueError(
            f"{folder} holds runs of another recipe: {differs}; "
            "choose another name with name=NAME, or another folder with --out"
        )


def _has_runs(folder: Path, own: Path | None) -> bool:
    """Tests whether a run has a result or a state, or another process is working on one."""
    patterns = ("*/seed*/result.json", "*/seed*/checkpoint/latest.json")
    locks = (path for path in folder.glob("*/.seed*.lock"))
    runs = (path.with_name(path.name[1:].removesuffix(".lock")) for path in locks)
    return any(True for pattern in patterns for _ in folder.glob(pattern)) or any(
        files.is_locked(run) for run in runs if run != own
    )


@contextmanager
def locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Locks the folder of a run and deletes temporary files of killed processes."""
    if processes.rank() != 0:
        yield
        return
    with progress.alone(folder):
        files.sweep(folder)
        yield
