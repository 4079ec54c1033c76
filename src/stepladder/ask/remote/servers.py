"""The servers of a model: which there are just now, and which of them may be sent requests."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepladder.ask.ledger.commit import Committer
from stepladder.ask.outcome import Unreachable
from stepladder.ask.remote.admission import Admission, WrongServer
from stepladder.ask.remote.gate import Gate
from stepladder.ask.remote.listener import Note
from stepladder.ask.remote.openai_http import Http
from stepladder.errors import AskError

LOOK = 1.0
"""Seconds between looks at which servers there are."""
WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds between the first tries to reach a server; one that never answered is given up after them."""
RETURN = (*WAITS, *(30.0,) * 20)
"""The same for one that has answered before: it may be on its way back, for ten minutes."""


@dataclass
class Endpoint:
    """One server: its address, how to connect, its gate, and what it must pass before it is sent anything."""

    name: str
    connect: Callable[[], Http]
    gate: Gate
    admission: Admission | None = None


class Servers:
    """Who is there and who may be asked, while one call of the engine lasts.

    Args:
        present: which endpoints there are now; the same address is the same endpoint every time.
        changed: called when that, or who is admitted, changes.
    """

    def __init__(
        self,
        present: Callable[[], Sequence[Endpoint]],
        committer: Committer,
        note: Note,
        changed: Callable[[], None],
    ) -> None:
        self._find, self._committer, self._note, self._changed = present, committer, note, changed
        self._present: Sequence[Endpoint] = ()
        self._looked_at = float("-inf")
        self._connections: dict[str, Http] = {}
        self._doors: dict[str, asyncio.Task[None]] = {}
        self._admitted: set[str] = set()
        self._known: set[str] = set()  # admitted at some time
        self._turned_away: dict[str, str] = {}

    def look_around(self) -> None:
        """Note who came and who went; whoever came must first pass its admission."""
        if (now := time.monotonic()) - self._looked_at < LOOK:
            return
        self._looked_at = now
        for door in self._doors.values():
            if door.done():
                door.result()  # raises what nobody foresaw
        self._present = self._find()
        for name in self._doors.keys() - {
            endpoint.name for endpoint in self._present
        }:  # who returns shows itself again
            self._doors.pop(name).cancel()
            self._admitted.discard(name)
            self._turned_away.pop(name, None)
        for endpoint in self._present:
            name = endpoint.name
            if endpoint.admission is None:
                self._admitted.add(name)
            elif name not in self._doors and name not in self._turned_away:
                self._doors[name] = asyncio.create_task(self._admit(endpoint, endpoint.admission))

    @property
    def admitted(self) -> list[Endpoint]:
        """Endpoints that are there and may be sent requests."""
        return [endpoint for endpoint in self._present if endpoint.name in self._admitted]

    @property
    def hopeless(self) -> str | None:
        """Why nobody is left to ask, if that is so."""
        reasons = [self._turned_away.get(endpoint.name) for endpoint in self._present]
        return reasons[0] if reasons and all(reasons) else None

    def connection(self, endpoint: Endpoint) -> Http:
        """The open connection to a server."""
        if endpoint.name not in self._connections:
            self._connections[endpoint.name] = endpoint.connect()
        return self._connections[endpoint.name]

    def lost(self, endpoint: Endpoint) -> None:
        """It did not answer the door: what comes back under its address must show again who it is."""
        if endpoint.admission is not None and endpoint.name in self._admitted:
            self._admitted.discard(endpoint.name)
            del self._doors[endpoint.name]

    async def _admit(self, endpoint: Endpoint, admission: Admission) -> None:
        name = endpoint.name
        patience = RETURN if name in self._known else WAITS
        for wait in itertools.chain(patience, [None]):
            try:
                await admission.check(self.connection(endpoint), self._committer)
            except WrongServer as error:
                self._turn_away(name, str(error))
            except Unreachable as error:
                if wait is not None:
                    await asyncio.sleep(wait)
                    continue
                self._turn_away(name, f"it cannot be reached ({error})")
            else:
                self._admitted.add(name)
                self._known.add(name)
            break
        self._changed()

    def _turn_away(self, name: str, why: str) -> None:
        self._turned_away[name] = f"{name}: {why}"
        self._note(f"not asked any more: {name}: {why}")

    async def close(self) -> None:
        """Give up on who is still at the door, and close every connection."""
        for door in self._doors.values():
            door.cancel()
        await asyncio.gather(*self._doors.values(), return_exceptions=True)
        for connection in self._connections.values():
            await connection.close()


class Addresses:
    """Base URLs of a file that may change at any time: one a line; empty lines and lines that begin with # say nothing.

    A change that cannot be read leaves the last good list in force.

    Raises:
        AskError: the file cannot be read at first, or a line is no address.
    """

    def __init__(self, file: Path, note: Note) -> None:
        self._file, self._note = file, note
        self._stamp = self._look()
        self._urls = read_addresses(file)
        if not self._urls:
            note(f"{file}: no server yet; waiting for one")

    def __call__(self) -> list[str]:
        if (stamp := self._look()) != self._stamp:
            self._stamp = stamp
            try:
                self._urls = read_addresses(self._file)
            except AskError as error:
                self._note(f"{error}; the last list stays in force")
            else:
                self._note(f"{self._file}: servers now: {', '.join(self._urls) or 'none'}")
        return self._urls

    def _look(self) -> tuple[int, int] | None:
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size


def read_addresses(file: Path) -> list[str]:
    """Base URLs of a file, one a line; empty lines and lines that begin with # say nothing.

    Raises:
        AskError: it cannot be read, or a line is no address.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise AskError(f"{file}: cannot be read ({error}); write one base URL a line into it") from None
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith(("#", "http://", "https://")):
            raise AskError(f"{file}:{number}: {line!r} is no base URL; it begins with http:// and ends with /v1")
    return list(dict.fromkeys(line.rstrip("/") for line in lines if line and not line.startswith("#")))
