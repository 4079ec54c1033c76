"""Group commit: writes of many tasks share one transaction, which is on the disk before any of them goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from stepladder.ask.ledger import Ledger

T = TypeVar("T")


class Committer:
    """Reads and writes a ledger on behalf of concurrent tasks. Use as an async context manager.

    While one transaction waits for the disk, operations of other tasks queue for the next. Only waiting (for the lock,
    for the disk) happens in a thread: a statement takes microseconds, but in a thread beside a busy event loop it would
    wait milliseconds for the interpreter lock.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._lock = asyncio.Lock()
        self._queue: list[tuple[Callable[[Ledger], Any], asyncio.Future[Any]]] = []
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
                group: list[tuple[Callable[[Ledger], Any], asyncio.Future[Any]]] = []
                try:
                    await self._in_thread(self._ledger.begin)
                    group, self._queue = self._queue, []
                    results = [operation(self._ledger) for operation, _ in group]
                    await self._in_thread(self._ledger.commit)
                except Exception as error:  # noqa: BLE001 (whatever it is, the waiting tasks raise it)
                    self._ledger.rollback()
                    if not group:
                        group, self._queue = self._queue, []
                    for _, future in group:
                        if not future.done():
                            future.set_exception(error)
                    continue
            for (_, future), result in zip(group, results, strict=True):
                if not future.done():  # its task may have been cancelled; the write stays
                    future.set_result(result)

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
