"""Progress output: a bar on a terminal, single lines elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import progress
from rich.console import Console
from rich.text import Text

from topkd._io import files


class Progress:
    """Prints progress and messages to standard error.

    Args:
        quiet: Whether to suppress all output.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        # With several processes, only rank 0 prints.
        quiet = quiet or os.environ.get("RANK", "0") != "0"
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Prints a permanent line."""
        self._console.print(text, markup=False)

    @contextmanager
    def alone(self, path: Path) -> Iterator[None]:
        """Holds the lock of a path; prints a message while another process holds it."""
        with files.locked(path, lambda: self.say(f"waiting for another process to release {path}")):
            yield

    @contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        """Shows a progress bar with the rate and the remaining time.

        Args:
            title: Description of the task.
            total: Number of units.
            unit: Name of the unit, in the plural.

        Yields:
            A function ``(amount, news)`` that advances the bar by ``amount`` units. A non-empty
            ``news`` is shown beside the bar, or printed as a line if there is no terminal.
        """
        if not self._console.is_terminal:
            yield lambda amount, news: self.say(f"{title}: {news}") if news else None
            return
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.TaskProgressColumn(),
            _Rate(unit),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[news]}"),
        )
        with progress.Progress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(title, total=total, news="")

            def advance(amount: int, news: str) -> None:
                bars.advance(task, amount)
                if news:
                    bars.update(task, news=news)

            yield advance


class _Rate(progress.ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: progress.Task) -> Text:
        return Text(f"{task.speed:,.0f} {self.unit}/s" if task.speed else "")
