"""Progress on standard error: bars on a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

__all__ = ["Bars", "Report", "many_bars", "progress"]

_QUIET_S = 30.0  # between two lines of a log

Report = Callable[[int, str], None]
"""Called with the number of units done so far and a short text."""


@contextmanager
def progress(description: str, total: int) -> Iterator[Report]:
    """Show one bar with the time left while the block runs.

    Args:
        description: What is being done.
        total: Number of units.

    Yields:
        Call it with the units done so far and a text, such as the loss.
    """
    if not sys.stderr.isatty():
        yield _lines(description, total)
        return
    with _rich_bars() as bars:
        task = bars.add_task(description, total=total, text="")
        yield lambda done, text: bars.update(task, completed=done, text=text)


def _lines(description: str, total: int, clock: Callable[[], float] = time.monotonic) -> Report:
    """Say how far it is, and how long it will take, in a log: a line every half minute."""
    last = begun = clock()
    skipped: int | None = None  # units that were done before, as after a resume

    def report(done: int, text: str) -> None:
        nonlocal last, skipped
        skipped = done - 1 if skipped is None else skipped
        now = clock()
        if now - last >= _QUIET_S:
            last = now
            left = timedelta(seconds=round((now - begun) * (total - done) / (done - skipped)))
            line = f"{description}: {done}/{total} {text}".rstrip()
            print(f"{line}, {left} left", file=sys.stderr, flush=True)

    return report


class Bars:
    """One bar for each of several jobs.

    Args:
        title: What the jobs are, for the lines of a log.
        jobs: How many there are.
        bars: rich's bars, or None where there is no terminal.
    """

    def __init__(self, title: str, jobs: int, bars: Any | None) -> None:
        self._title, self._jobs, self._bars, self._finished = title, jobs, bars, 0
        self._tasks: dict[str, Any] = {}

    def update(self, job: str, description: str, done: int, total: int, text: str) -> None:
        """Show how far a job is."""
        if self._bars is not None:
            if job not in self._tasks:
                self._tasks[job] = self._bars.add_task(job, total=total, text="")
            shown = f"{job}: {description}"[:44]
            self._bars.update(
                self._tasks[job], description=shown, completed=done, total=total, text=text
            )

    def finished(self, job: str, seconds: float) -> None:
        """Take a job's bar away and leave a line."""
        self._finished += 1
        line = f"{self._title} {self._finished}/{self._jobs}: {job}, {seconds:.0f} s"
        if self._bars is None:
            print(line, file=sys.stderr, flush=True)
            return
        if job in self._tasks:
            self._bars.remove_task(self._tasks.pop(job))
        self._bars.console.print(line)


@contextmanager
def many_bars(title: str, jobs: int) -> Iterator[Bars]:
    """Show a bar for each running job while the block runs."""
    if not sys.stderr.isatty():
        yield Bars(title, jobs, None)
        return
    with _rich_bars() as bars:
        yield Bars(title, jobs, bars)


def _rich_bars() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
    )
