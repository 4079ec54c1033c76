"""Runs a function of work.py for every piece of some work."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from stepladder.errors import UserError
from stepladder.nodes import Ended, Nodes, Running
from stepladder.shards import work
from stepladder.workspace import digest, write_atomic

ATTEMPTS = 3
"""At a piece whose process is lost."""
POLL_SECONDS = 0.05


class Pool(NamedTuple):
    """Processes on some nodes."""

    nodes: Nodes
    folder: Path
    """For orders, logs and results; all nodes reach it by this path. Results that it holds are not made again."""
    report: Callable[[str, int, int], None]
    """Called with the name of the work, how many pieces are done, and of how many."""

    def each(self, function: str, what: str, orders: Sequence[Mapping[str, Any]]) -> list[Path]:
        """The folders of the results of one function of work.py for some orders, in their order. A single piece is done
        in this process.

        Raises:
            UserError: a piece has an error (of several, that of the first piece), or its process was lost too often.
        """
        pieces = [Piece(function, order, self.folder) for order in orders]
        left = [piece for piece in pieces if not piece.result.exists()]
        if len(left) == 1:
            work.perform(function, left[0].order, left[0].result)
        elif left:
            self._run(left, lambda done: self.report(what, len(pieces) - len(left) + done, len(pieces)))
        return [piece.result for piece in pieces]

    def _run(self, pieces: Sequence[Piece], report: Callable[[int], None]) -> None:
        waiting, failures = [*range(len(pieces))], dict[int, str]()
        with ExitStack() as stack:
            running: dict[int, tuple[Running, ExitStack]] = {}
            while running or waiting:
                slots = self.nodes.workers()[len(running) :] if waiting else ()
                for slot, number in zip(slots, [*waiting], strict=False):
                    waiting.remove(number)
                    own = stack.enter_context(ExitStack())
                    command = pieces[number].command()
                    started = self.nodes.running(slot, command, {"OMP_NUM_THREADS": "1"}, pieces[number].log)
                    running[number] = own.enter_context(started), own
                for number, (process, own) in [*running.items()]:
                    if (ended := process.poll()) is not None:
                        own.close()
                        del running[number]
                        if (failure := pieces[number].failure(ended)) is not None:
                            failures[number] = failure
                        elif not pieces[number].result.exists():
                            waiting.insert(0, number)
                if failures:  # what comes after a failure is of no use
                    waiting = [number for number in waiting if number < min(failures)]
                    for number in [number for number in running if number > min(failures)]:
                        running.pop(number)[1].close()
                report(sum(piece.result.exists() for piece in pieces))
                time.sleep(POLL_SECONDS)
        if failures:
            raise UserError(failures[min(failures)])


class Piece:
    """A piece of some work.

    Args:
        function: of work.py.
        order: what it is given.
        folder: for its order, log and result.
    """

    def __init__(self, function: str, order: Mapping[str, Any], folder: Path) -> None:
        self.order, self._function, self._attempts = order, function, 0
        self.result = folder / f"{function}-{digest(order)[:16]}"
        self.log = self.result.with_suffix(".log")

    def command(self) -> list[str]:
        """What a process of its own runs, which starts in the working directory of this one wherever it is there."""
        self._attempts += 1
        self.log.unlink(missing_ok=True)
        order = self.result.with_suffix(".json")
        write_atomic(order, json.dumps(self.order))
        words = [self._function, order.absolute(), self.result.absolute(), Path.cwd()]
        return [sys.executable, "-m", "stepladder.shards.work", *map(str, words)]

    def failure(self, ended: Ended) -> str | None:
        """Why its process has made no result; None if it has, or may be tried again."""
        if self.result.exists():
            return None
        said = self.log.read_text(encoding="utf-8", errors="replace").strip() if self.log.exists() else ""
        last = said.rpartition("\n")[2]
        if ended.code == UserError.exit_code:
            return last
        if self._attempts < ATTEMPTS:
            return None
        reason = ended.reason or last or f"exit code {ended.code}"
        return f"{self._function} of a piece ended {ATTEMPTS} times without a result ({reason}); see {self.log}"
