"""Progress of long work: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 20.0  # between lines where the output is no terminal

_console = Console(stderr=True)


def say(text: str) -> None:
    """One line for the user."""
    _console.print(text, highlight=False, markup=False, soft_wrap=True)


class Bar:
    """``bar.advance(n, note)`` moves it."""

    def __init__(self, description: str, total: int, progress: Progress | None):
        self.description, self.total, self._progress = description, total, progress
        self.done, self._told = 0, time.monotonic()
        self._task = None if progress is None else progress.add_task(description, total=total, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        if self._progress is not None:
            self._progress.update(self._task, completed=self.done, note=note)
        elif time.monotonic() - self._told > LOG_SECONDS:
            self._told = time.monotonic()
            say(f"{self.description}: {self.done}/{self.total} {note}")


@contextmanager
def bar(description: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A progress bar of ``total`` units, ``done`` of them finished by an earlier run of the same command."""
    if not sys.stderr.isatty():
        made = Bar(description, total, None)
        made.done = done
        yield made
        return
    parts = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    parts += [TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
    with Progress(*parts, console=_console, transient=True) as progress:
        made = Bar(description, total, progress)
        made.advance(done)
        yield made
