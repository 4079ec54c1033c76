"""Runs a function of work.py for every piece of some work."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from stepladder.errors import PieceError, UserError
from stepladder.nodes import Ended, Nodes, Running
from stepladder.shards import work
from stepladder.workspace import digest, write_atomic

PIECE_BYTES = 32 * 2**20
"""Of a file that one process works on."""
ATTEMPTS = 3
"""At a piece whose process is lost."""
POLL_SECONDS = 0.1
SEEN_SECONDS = 60.0
"""That a result on a network file system may take to be seen here."""


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
            UserError: a piece has an error (of several, that of the first piece).
            PieceError: its process was lost too often.
        """
        pieces = [Piece(function, order, self.folder) for order in orders]
        left = [piece for piece in pieces if not piece.result.exists()]
        if len(left) == 1:
            work.perform(function, left[0].order, left[0].result)
        elif left:
            self._run(left, lambda done: self.report(what, len(pieces) - len(left) + done, len(pieces)))
        return [piece.result for piece in pieces]

    def _run(self, pieces: Sequence[Piece], report: Callable[[int], None]) -> None:
        waiting, failures = [*range(len(pieces))], dict[int, UserError]()
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
                    if (ended := process.poll()) is None:
                        continue
                    own.close()
                    del running[number]
                    if pieces[number].is_done(ended):
                        continue
                    if (failure := pieces[number].failure(ended)) is None:
                        waiting.insert(0, number)
                    else:
                        failures[number] = failure
                if failures:  # what comes after a failure is of no use
                    waiting = [number for number in waiting if number < min(failures)]
                    for number in [number for number in running if number > min(failures)]:
                        running.pop(number)[1].close()
                report(len(pieces) - len(waiting) - len(running) - len(failures))
                time.sleep(POLL_SECONDS)
        if failures:
            raise failures[min(failures)]


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

    def is_done(self, ended: Ended) -> bool:
        """Whether its process has made the result, which a network file system may show later."""
        deadline = time.monotonic() + SEEN_SECONDS
        while not self.result.exists():
            if ended.code != 0 or time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
            list(self.result.parent.iterdir())  # so that it is looked at anew
        return True

    def failure(self, ended: Ended) -> UserError | None:
        """Why its process has made no result; None if it may be tried again."""
        said = self.log.read_text(encoding="utf-8", errors="replace").strip() if self.log.exists() else ""
        last = said.rpartition("\n")[2]
        if ended.code == UserError.exit_code:
            return UserError(last)
        if self._attempts < ATTEMPTS:
            return None
        reason = ended.reason or last or f"exit code {ended.code}"
        return PieceError(
            f"{self._function} of a piece ended {ATTEMPTS} times without a result ({reason}); see {self.log}"
        )
