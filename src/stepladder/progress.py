"""The live view of a run: which stage is at work, how far, how long still. It shows state and owns none."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from stepladder.text import printable


class Progress:
    """One line per finished stage, and a live line for the one at work.

    Off a terminal (a log file, CI) the finished lines are printed, and every minute one on how far the work is.
    """

    def __init__(self, console: Console, every: float = 60) -> None:
        self.console = console
        self._every = every
        """Seconds between two lines off a terminal."""
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._work = ""
        """What the last line was about."""
        self._begun = self._said = self._had = 0.0
        """When that began, when something was last said of it, and how much was done at its begin."""

    def up_to_date(self, label: str) -> None:
        self.console.print(f"  ·  {printable(label):<24} up to date", style="dim", markup=False, highlight=False)

    @contextlib.contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """Show ``label`` as running until the block ends; a failed stage leaves a cross."""
        start = time.monotonic()
        self._work = ""  # the last stage may have called its work the same
        columns = (
            SpinnerColumn(), TextColumn("{task.description:<24}", markup=False),
            TextColumn("{task.fields[what]}", markup=False), BarColumn(24), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Bars(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bars:
            self._bars, self._task = bars, bars.add_task(label, total=None, what="", note="")
            try:
                yield
            except BaseException:
                bars.stop()
                self._mark("x", "red", label, "stopped")
                raise
            finally:
                self._bars = self._task = None
        self._mark("✓", "green", label, duration(time.monotonic() - start))

    def _mark(self, mark: str, style: str, label: str, text: str) -> None:
        self.console.print(Text.assemble("  ", (mark, style), f"  {printable(label):<24} {text}"))

    def update(self, what: str, done: float, total: float, note: str = "") -> None:
        """How far the running stage is: ``what`` names the unit of work, ``note`` a figure worth seeing."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, total=total, what=what, note=note)
            if not self.console.is_terminal:
                self._log(what, done, total, note)

    def _log(self, what: str, done: float, total: float, note: str) -> None:
        """A plain line, if the last one is long enough ago. What is left is reckoned from when this work began."""
        now = time.monotonic()
        if what != self._work:
            self._work, self._begun, self._said, self._had = what, now, now, done
        if now - self._said < self._every:
            return
        self._said = now
        new = done - self._had
        left = (
            f", about {duration((now - self._begun) * (total - done) / new)} left" if new > 0 and done < total else ""
        )
        self.say(f"{what}: {done:,.0f} of {total:,.0f}{left}{f'  {note}' if note else ''}")

    def say(self, text: str) -> None:
        """A finding worth one line."""
        self.console.print(f"     {printable(text)}", style="dim", highlight=False, markup=False)


class Lane:
    """One of several works that are done side by side; the view shows how far they are together.

    Args:
        progress: the view.
        name: whose work it is.
        beside: how far each work of all of them is, the same for all.
    """

    def __init__(self, progress: Progress, name: str, beside: dict[tuple[str, str], tuple[float, float]]) -> None:
        self._progress, self._name, self._beside = progress, name, beside

    def update(self, what: str, done: float, total: float) -> None:
        self._beside[self._name, what] = done, total
        known = [*self._beside.values()]
        count = len({name for name, _ in self._beside})
        self._progress.update(f"{count} side by side", sum(done for done, _ in known), sum(total for _, total in known))

    def say(self, text: str) -> None:
        self._progress.say(f"{self._name}: {text}")


def duration(seconds: float) -> str:
    """Seconds as a person writes them: ``42 s``, ``3 min 05 s``, ``1 h 20 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
