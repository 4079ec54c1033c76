"""Group commit: what many tasks want written becomes few transactions, each on the disk before anybody goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from stepladder.ask.ledger import Ledger

T = TypeVar("T")


class Committer:
    """The one user of a ledger while tasks run. Use as an async context manager.

    While one transaction waits for the disk, the operations of other tasks gather for the next. Only what waits (for
    the lock, for the disk) happens in a thread: statements take microseconds, and each one run beside a busy event
    loop would wait milliseconds for the interpreter.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._busy = asyncio.Lock()
        self._waiting: list[tuple[Callable[[Ledger], Any], asyncio.Future[Any]]] = []
        self._runner: asyncio.Task[None] | None = None

    async def read(self, look: Callable[[Ledger], T]) -> T:
        """Run ``look`` on the ledger, outside of any transaction."""
        async with self._busy:
            return look(self._ledger)

    async def write(self, operation: Callable[[Ledger], T]) -> T:
        """Run ``operation`` in a transaction; when this returns, what it wrote is on the disk."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((operation, future))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            async with self._busy:
                group: list[tuple[Callable[[Ledger], Any], asyncio.Future[Any]]] = []
                try:
                    await self._aside(self._ledger.begin)
                    group, self._waiting = self._waiting, []
                    results = [operation(self._ledger) for operation, _ in group]
                    await self._aside(self._ledger.commit)
                except Exception as error:  # noqa: BLE001 (whoever waits gets it, whatever it is)
                    self._ledger.rollback()
                    if not group:
                        group, self._waiting = self._waiting, []
                    for _, future in group:
                        if not future.done():
                            future.set_exception(error)
                    continue
            for (_, future), result in zip(group, results, strict=True):
                if not future.done():  # its task may be gone; the write stays
                    future.set_result(result)

    async def _aside(self, wait: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, wait)

    async def __aenter__(self) -> Self:
        await self.read(Ledger.begin_session)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner
        self._thread.shutdown()
