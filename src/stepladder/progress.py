"""The live view of a run: which stage is running, how far it is, and how long it will still take."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

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

BEAT_SECONDS = 1.0
MAX_CURVE_POINTS = 500


class Heartbeat:
    """A file that says how far a stage is, while it is made, for whoever looks on (``stepladder view``).

    Args:
        file: it is written when other work begins, and else at most every :data:`BEAT_SECONDS`; where it cannot be
            written, it is not.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._fields: dict[str, object] = {}
        self._curve: list[tuple[float, float]] = []
        self._written_at = 0.0

    def begin(self, label: str) -> None:
        """A stage has begun."""
        self._fields = {"stage": label}
        self._curve = []
        self._write()

    def end(self) -> None:
        """It has ended."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    def move(self, what: str, done: float, total: float, note: str, left: float | None, value: float | None) -> None:
        """Something was done of its work; ``left`` are seconds, and ``value`` is a point of a curve over what is
        done."""
        is_new = what != self._fields.get("what")
        self._fields |= {"what": what, "done": done, "total": total, "note": note, "left": left}
        if value is not None:
            self._curve.append((done, value))
            if len(self._curve) > MAX_CURVE_POINTS:
                self._curve = self._curve[::2]
        if is_new or time.monotonic() > self._written_at + BEAT_SECONDS:
            self._write()

    def _write(self) -> None:
        self._written_at = time.monotonic()
        text = json.dumps(self._fields | {"time": time.time(), "curve": self._curve})
        partial = self._file.with_name(f"{self._file.name}.partial")
        with contextlib.suppress(OSError):
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._file)


class Progress:
    """One line for each finished stage, and a live line for the running one.

    Where the output is no terminal (a log file, CI), there is a plain line a minute instead of the live one.
    """

    def __init__(self, console: Console, log_seconds: float = 60, heartbeat: Heartbeat | None = None) -> None:
        self.console, self._heartbeat = console, heartbeat
        self._log_seconds = log_seconds
        """Between two plain lines."""
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._pace = Pace()
        self._logged: str | None = None
        """Name of the work that the last plain line was about."""
        self._logged_at = 0.0
        """When it was printed, or its work begun, in monotonic seconds."""

    def up_to_date(self, label: str) -> None:
        self.console.print(f"  ·  {printable(label):<24} up to date", style="dim", markup=False, highlight=False)

    @contextlib.contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """Show the stage ``label`` as running until the block ends, then as finished, or as stopped if it raises."""
        start = time.monotonic()
        self._pace, self._logged = Pace(), None  # two stages may use the same name for their work
        columns = (
            SpinnerColumn(), TextColumn("{task.description:<24}", markup=False),
            TextColumn("{task.fields[what]}", markup=False), BarColumn(24), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Bars(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bars:
            self._bars, self._task = bars, bars.add_task(label, total=None, what="", note="")
            if self._heartbeat is not None:
                self._heartbeat.begin(label)
            try:
                yield
            except BaseException:
                bars.stop()
                self._mark("x", "red", label, "stopped")
                raise
            finally:
                self._bars = self._task = None
                if self._heartbeat is not None:
                    self._heartbeat.end()
        self._mark("✓", "green", label, duration(time.monotonic() - start))

    def _mark(self, mark: str, style: str, label: str, text: str) -> None:
        self.console.print(Text.assemble("  ", (mark, style), f"  {printable(label):<24} {text}"))

    def update(self, what: str, done: float, total: float, note: str = "", value: float | None = None) -> None:
        """Show how far the running stage is. ``what`` names the work, ``note`` is shown beside it, and ``value`` is a
        point of the curve that those who look on see."""
        left = self._pace.left(what, done, total)
        if self._heartbeat is not None:
            self._heartbeat.move(what, done, total, note, left, value)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, total=total, what=what, note=note)
            if not self.console.is_terminal:
                self._log(what, done, total, note, left)

    def _log(self, what: str, done: float, total: float, note: str, left: float | None) -> None:
        """Print a plain line, if the last one is long enough ago."""
        now_seconds = time.monotonic()
        if what != self._logged:
            self._logged, self._logged_at = what, now_seconds
        if now_seconds - self._logged_at < self._log_seconds:
            return
        self._logged_at = now_seconds
        remaining = "" if left is None else f", about {duration(left)} left"
        self.say(f"{what}: {done:,.0f} of {total:,.0f}{remaining}{f'  {note}' if note else ''}")

    def say(self, text: str) -> None:
        """Print a message of one line."""
        self.console.print(f"     {printable(text)}", style="dim", highlight=False, markup=False)


class Pace:
    """How long work takes: what is left is extrapolated from its start."""

    def __init__(self) -> None:
        self._what: str | None = None
        self._begun_at = self._done_at_begin = 0.0

    def left(self, what: str, done: float, total: float) -> float | None:
        """Seconds; None where nothing was done yet, or nothing is left."""
        if what != self._what:
            self._what, self._begun_at, self._done_at_begin = what, time.monotonic(), done
        done_since = done - self._done_at_begin
        if done_since <= 0 or done >= total:
            return None
        return (time.monotonic() - self._begun_at) * (total - done) / done_since


class Lane:
    """The progress of one of several members that answer side by side. The view shows the sum of all lanes.

    Args:
        progress: the view.
        name: of the member.
        counts: (done, total) by member and work; shared by all lanes.
    """

    def __init__(self, progress: Progress, name: str, counts: dict[tuple[str, str], tuple[float, float]]) -> None:
        self._progress, self._name, self._counts = progress, name, counts

    def update(self, what: str, done: float, total: float) -> None:
        self._counts[self._name, what] = done, total
        pairs = [*self._counts.values()]
        lanes = len({name for name, _ in self._counts})
        self._progress.update(f"{lanes} side by side", sum(done for done, _ in pairs), sum(total for _, total in pairs))

    def say(self, text: str) -> None:
        self._progress.say(f"{self._name}: {text}")


def duration(seconds: float) -> str:
    """A duration in words: ``42 s``, ``3 min 05 s``, ``1 h 20 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes} min {remainder:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
