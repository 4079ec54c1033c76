"""Calls of a provider's batch API, tried again while the provider is unreachable, and the waits between them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from stepladder.ask.ledger import Batch
from stepladder.ask.outcome import Unreachable
from stepladder.ask.remote.batch_api import BatchApi, BatchRecord, QueueFull, Refused
from stepladder.ask.remote.engine import MAX_ATTEMPTS
from stepladder.ask.remote.listener import Note
from stepladder.ask.remote.teacher import RemoteModel
from stepladder.ask.remote.waiting import Wait, WaitNotes
from stepladder.errors import AskError

PAUSES_SECONDS = (1, 2, 4, 8, 15, 30, 60)
"""Between polls of a batch; the last one repeats."""
LISTING_WAIT_SECONDS = 5.0
"""Before a batch that is in no listing is searched for again: it may only just have been created."""

T = TypeVar("T")


class BatchCalls:
    """The batch API of one model's provider. All methods raise :class:`AskError` when it stays unreachable, and pass on
    what :class:`BatchApi` raises at a refusal."""

    def __init__(self, model: RemoteModel, key: str, note: Note) -> None:
        self._model, self._key = model, key
        self.endpoint = model.settings.base_url[0]
        self._wait_notes = WaitNotes(note, time.monotonic())

    @functools.cached_property
    def _api(self) -> BatchApi:
        return BatchApi(self.endpoint, self._key, self._model.settings.timeout)

    def close(self) -> None:
        if "_api" in self.__dict__:
            self._api.close()

    def upload(self, content: bytes) -> str:
        """Upload an input file; returns its id."""
        return self._until_reached(lambda: self._api.upload(content))

    def create(self, file: str, batch: Batch) -> str:
        """Start a batch over an uploaded file; returns its id. A batch that was made without a reply is found."""
        for attempt in range(MAX_ATTEMPTS):
            try:
                remote: str | None = self._api.create(file, batch.intent)
            except Unreachable:
                remote = self.find(batch)
            except QueueFull:
                # After a try without a reply, it may be this batch itself that fills the queue.
                if not attempt or (remote := self.find(batch)) is None:
                    raise
            if remote is not None:
                return remote
        raise AskError(
            f"model {self._model.name!r}: {self.endpoint} did not reply whether it made the batch; run again to find "
            "out"
        )

    def find(self, batch: Batch) -> str | None:
        """The remote id of a batch by its intent, or None if the provider has no such batch. All of its list is looked
        through, not only what is as young by this machine's clock: a batch that is not found is made, and paid, again.
        """

        def search() -> str | None:
            return next((record.id for record in self._api.list_batches() if record.intent == batch.intent), None)

        for wait in (0.0, LISTING_WAIT_SECONDS):
            time.sleep(wait)
            if (remote := self._until_reached(search)) is not None:
                return remote
        return None

    def retrieve(self, remote: str) -> BatchRecord:
        """The provider's record of a batch."""
        return self._until_reached(lambda: self._api.retrieve(remote))

    def content(self, file: str, limit_bytes: int) -> bytes:
        """The bytes of a file; of one that is longer than ``limit_bytes``, its beginning."""
        return self._until_reached(lambda: self._api.content(file, limit_bytes))

    def delete(self, file: str | None) -> None:
        """Delete an input file, which holds the questions. What a result file holds is on the disk by now; the provider
        deletes it after a while, and this file too where it cannot be reached."""
        if file is not None:
            with contextlib.suppress(Unreachable, Refused):
                self._api.delete(file)

    def wait(self, seconds: float, what: str, limit_seconds: float | None = None) -> None:
        """Sleep, after saying what for; ``limit_seconds`` is when the wait ends at the latest, where more sleeps may
        follow."""
        now_seconds = time.monotonic()
        until = now_seconds + (seconds if limit_seconds is None else limit_seconds)
        self._wait_notes.look(Wait(what, until, what, is_pause=limit_seconds is None), now_seconds)
        time.sleep(seconds)

    def _until_reached(self, call: Callable[[], T]) -> T:
        for pause in PAUSES_SECONDS:
            try:
                return call()
            except Unreachable as error:
                reason = str(error)
                self.wait(pause, f"the next try to reach {self.endpoint} ({reason})")
        raise AskError(
            f"model {self._model.name!r}: {self.endpoint} does not answer ({reason}); nothing is lost, run "
            "again to collect what it has done"
        )


def pauses() -> Iterator[float]:
    """Seconds between polls."""
    yield from PAUSES_SECONDS
    while True:
        yield PAUSES_SECONDS[-1]
