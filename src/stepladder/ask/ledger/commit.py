"""Group commit: writes of many tasks share one transaction, which is on the disk before any of them goes on."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from stepladder.ask.ledger import Ledger
from stepladder.ask.ledger.faults import passes
from stepladder.ask.ledger.patience import Patience

T = TypeVar("T")


class Write(NamedTuple):
    """An operation in the queue, and the future that its task waits for."""

    operation: Callable[[Ledger], Any]
    future: asyncio.Future[Any]
    begins: bool


class Committer:
    """Reads and writes a ledger on behalf of concurrent tasks. Use as an async context manager.

    While one transaction waits for the disk, operations of other tasks queue for the next. Where one of them raises,
    the others of its group are committed one by one: an operation must be one that can be run again. Only waiting (for
    the lock, for the disk) happens in a thread: a statement takes microseconds, but in a thread beside a busy event
    loop it would wait milliseconds for the interpreter lock.

    While the ledger cannot be written (disk full, locked, read-only), operations wait and are tried again, so that
    their answers are not lost; ``note`` is called with one line that says so (``patience``).
    """

    def __init__(self, ledger: Ledger, note: Callable[[str], None] = lambda line: None) -> None:
        self._ledger = ledger
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._lock = asyncio.Lock()
        self._queue: list[Write] = []
        self._commit_task: asyncio.Task[None] | None = None
        self._patience = Patience(ledger.path, note)

    async def read(self, query: Callable[[Ledger], T]) -> T:
        """Run ``query`` on the ledger, outside of any transaction."""
        async with self._lock:
            return query(self._ledger)

    async def write(self, operation: Callable[[Ledger], T], *, begins: bool = False) -> T:
        """Run ``operation`` in a transaction; when this returns, its writes are on the disk. It may be run more than
        once, until a transaction with it is committed.

        Args:
            operation: what to write.
            begins: whether it begins something new, such as a request, which waits while the disk is nearly full.

        Raises:
            LedgerError: the ledger is damaged, or could not be written for long.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.append(Write(operation, future, begins))
        if self._commit_task is None or self._commit_task.done():
            self._commit_task = asyncio.create_task(self._commit_queue())
        return await future

    def withdraw(self) -> None:
        """Cancel what would begin something new, if it waits for a ledger that cannot be written."""
        if self._patience.is_waiting:
            for write in self._queue:
                if write.begins:
                    write.future.cancel()
            self._queue = [write for write in self._queue if not write.begins]

    async def _commit_queue(self) -> None:
        while self._queue:
            async with self._lock:
                error = await self._commit_group()
                held_back = error is None and bool(self._queue) and not self._patience.has_room
            if error is not None or held_back:
                await self._wait(error)
            else:
                self._patience.end()

    async def _commit_group(self) -> sqlite3.Error | None:
        """Commit what is in the queue, without what begins something new if there is too little room. Returns the error
        if the ledger cannot be written; then what is not committed is in the queue again."""
        if (error := await self._begin()) is not None:
            return self._put_off(self._take_queue(), error)
        has_room = self._patience.has_room
        group = [write for write in self._queue if has_room or not write.begins]
        self._queue = [write for write in self._queue if not has_room and write.begins]
        error = await self._commit(group)
        if error is None or passes(error):
            return None if error is None else self._put_off(group, error)
        for number, write in enumerate(group):  # one of them is at fault, and only that one fails
            error = await self._begin() or await self._commit([write])
            if error is not None and (passing := self._put_off([write], error)) is not None:
                self._queue += group[number + 1 :]
                return passing
        return None

    async def _begin(self) -> Exception | None:
        """Open a transaction; returns why that failed, if it did."""
        try:
            await self._in_thread(self._ledger.begin)
        except Exception as error:  # noqa: BLE001 (whatever it is, the waiting tasks raise it)
            self._ledger.rollback()
            return error
        return None

    async def _commit(self, group: list[Write]) -> Exception | None:
        """Run the operations in the open transaction and commit it, or undo all of them and return why."""
        try:
            results = [write.operation(self._ledger) for write in group]
            await self._in_thread(self._ledger.commit)
        except Exception as error:  # noqa: BLE001 (as above)
            self._ledger.rollback()
            return error
        for write, result in zip(group, results, strict=True):
            if not write.future.done():  # its task may have been cancelled; the write stays
                write.future.set_result(result)
        return None

    def _put_off(self, writes: list[Write], error: Exception) -> sqlite3.Error | None:
        """Return writes to the queue if the error passes, and the error with it; otherwise their tasks raise it."""
        if passes(error):
            self._queue = writes + self._queue
            return error
        self._fail(writes, error)
        return None

    async def _wait(self, error: sqlite3.Error | None) -> None:
        """Wait before the next try to write; once that was too long, give up what is in the queue."""
        answers = sum(not write.begins for write in self._queue)
        try:
            await asyncio.sleep(self._patience.pause(error, answers))
        except Exception as reason:  # noqa: BLE001 (the waiting tasks raise it)
            self._fail(self._take_queue(), reason)

    def _take_queue(self) -> list[Write]:
        taken, self._queue = self._queue, []
        return taken

    @staticmethod
    def _fail(writes: list[Write], error: Exception) -> None:
        for write in writes:
            if not write.future.done():
                write.future.set_exception(error)

    async def _in_thread(self, call: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def __aenter__(self) -> Self:
        await self.read(Ledger.begin_session)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._patience.give_up()  # whoever waited for a write has gone
        if self._commit_task is not None:
            await self._commit_task
        self._thread.shutdown()
