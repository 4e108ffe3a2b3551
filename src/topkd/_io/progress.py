"""How far long work is: a bar on a terminal, a line now and then elsewhere."""

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
    """Tells the user what is going on, on standard error.

    Args:
        quiet: Whether to tell nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        # Of several processes only the first speaks.
        quiet = quiet or os.environ.get("RANK", "0") != "0"
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(text, markup=False)

    @contextmanager
    def alone(self, path: Path) -> Iterator[None]:
        """Holds a lock while something is made; says so when another process holds it."""
        with files.locked(path, lambda: self.say(f"waiting for another process to make {path}")):
            yield

    @contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        """Shows a bar with the rate and the time left while work is done.

        Args:
            title: What is being done.
            total: How many units there are.
            unit: What is counted, in the plural.

        Yields:
            A function that advances the bar by so many units and, where its second argument is
            not empty, tells the latest news: beside the bar, or as a line without a terminal.
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
