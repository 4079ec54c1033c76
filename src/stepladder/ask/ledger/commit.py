"""Group commit: writes of many tasks share one transaction, which is on the disk before any of them goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from stepladder.ask.ledger import Ledger

T = TypeVar("T")
_Group = list[tuple[Callable[[Ledger], Any], asyncio.Future[Any]]]
"""Operations, and the futures of the tasks that wait for their results."""


class Committer:
    """Reads and writes a ledger on behalf of concurrent tasks. Use as an async context manager.

    While one transaction waits for the disk, operations of other tasks queue for the next. Where one of them raises,
    the others of its group are committed one by one: an operation must be one that can be run again. Only waiting (for
    the lock, for the disk) happens in a thread: a statement takes microseconds, but in a thread beside a busy event
    loop it would wait milliseconds for the interpreter lock.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._lock = asyncio.Lock()
        self._queue: _Group = []
        self._commit_task: asyncio.Task[None] | None = None

    async def read(self, query: Callable[[Ledger], T]) -> T:
        """Run ``query`` on the ledger, outside of any transaction."""
        async with self._lock:
            return query(self._ledger)

    async def write(self, operation: Callable[[Ledger], T]) -> T:
        """Run ``operation`` in a transaction; when this returns, its writes are on the disk."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.append((operation, future))
        if self._commit_task is None or self._commit_task.done():
            self._commit_task = asyncio.create_task(self._commit_queue())
        return await future

    async def _commit_queue(self) -> None:
        while self._queue:
            async with self._lock:
                error = await self._begin()
                group, self._queue = self._queue, []
                if error is not None:
                    _fail(group, error)
                elif await self._commit(group) is not None:
                    for one in group:  # one of them is at fault, and only that one fails
                        if (error := await self._begin() or await self._commit([one])) is not None:
                            _fail([one], error)

    async def _begin(self) -> Exception | None:
        """Open a transaction; returns why that failed, if it did."""
        try:
            await self._in_thread(self._ledger.begin)
        except Exception as error:  # noqa: BLE001 (whatever it is, the waiting tasks raise it)
            self._ledger.rollback()
            return error
        return None

    async def _commit(self, group: _Group) -> Exception | None:
        """Run the operations in the open transaction and commit it, or undo all of them and return why."""
        try:
            results = [operation(self._ledger) for operation, _ in group]
            await self._in_thread(self._ledger.commit)
        except Exception as error:  # noqa: BLE001 (as above)
            self._ledger.rollback()
            return error
        for (_, future), result in zip(group, results, strict=True):
            if not future.done():  # its task may have been cancelled; the write stays
                future.set_result(result)
        return None

    async def _in_thread(self, call: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def __aenter__(self) -> Self:
        await self.read(Ledger.begin_session)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._commit_task is not None:
            await self._commit_task
        self._thread.shutdown()


def _fail(group: _Group, error: Exception) -> None:
    for _, future in group:
        if not future.done():
            future.set_exception(error)
