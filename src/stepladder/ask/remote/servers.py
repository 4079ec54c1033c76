"""The servers of a model: which there are at the moment, and which of them are admitted."""

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
from stepladder.ask.remote.waiting import Wait
from stepladder.config.addresses import address_problem, without_password
from stepladder.errors import AskError

REFRESH_SECONDS = 1.0
"""Between two refreshes of the list of servers."""
RETRY_WAITS_SECONDS = (0.5, 1.0, 2.0, 4.0)
"""Between tries to reach a server; one that has never answered is given up after them."""
RETURN_WAITS_SECONDS = (*RETRY_WAITS_SECONDS, *(30.0,) * 20)
"""The same for a server that was admitted before: it has ten minutes to restart."""
CHECK_CALLS = 3
"""Calls of an admission, each of which may take as long as an answer."""


@dataclass
class Endpoint:
    """One server: its address, how to connect to it, its gate, and the admission it must pass, if any."""

    name: str
    connect: Callable[[], Http]
    gate: Gate
    admission: Admission | None = None
    timeout_seconds: float = 600.0
    """For a whole answer."""


class Servers:
    """The servers of a model during one call of the engine.

    Args:
        list_endpoints: returns the current endpoints; for the same address always the same endpoint.
        committer: of the ledger with the probe's answer.
        note: called with a message when a server is rejected.
        on_change: called when an admission has ended.
    """

    def __init__(
        self,
        list_endpoints: Callable[[], Sequence[Endpoint]],
        committer: Committer,
        note: Note,
        on_change: Callable[[], None],
    ) -> None:
        self._list_endpoints, self._committer, self._note, self._on_change = list_endpoints, committer, note, on_change
        self._endpoints: Sequence[Endpoint] = ()
        self._refreshed_at = float("-inf")
        self._connections: dict[str, Http] = {}
        self._admissions: dict[str, asyncio.Task[None]] = {}
        self._admitted: set[str] = set()
        self._ever_admitted: set[str] = set()
        self._rejections: dict[str, str] = {}
        self._waits: dict[str, Wait] = {}

    def refresh(self) -> None:
        """Update the list of endpoints, if the last time is long enough ago; new ones begin their admission."""
        if (now_seconds := time.monotonic()) - self._refreshed_at < REFRESH_SECONDS:
            return
        self._refreshed_at = now_seconds
        for admission in self._admissions.values():
            if admission.done():
                admission.result()  # raises its exception, if any
        self._endpoints = self._list_endpoints()
        tracked_names = self._admissions.keys() | self._rejections.keys() | self._admitted
        for name in tracked_names - {endpoint.name for endpoint in self._endpoints}:  # if it returns, it begins anew
            if name in self._admissions:
                self._admissions.pop(name).cancel()
            self._admitted.discard(name)
            self._rejections.pop(name, None)
            self._waits.pop(name, None)
        for endpoint in self._endpoints:
            name = endpoint.name
            if name in self._rejections:
                continue
            if endpoint.admission is None:
                self._admitted.add(name)
            elif name not in self._admissions:
                self._admissions[name] = asyncio.create_task(self._admit(endpoint, endpoint.admission))

    @property
    def admitted(self) -> list[Endpoint]:
        """Current endpoints that may be sent requests."""
        return [endpoint for endpoint in self._endpoints if endpoint.name in self._admitted]

    @property
    def rejection(self) -> str | None:
        """Why the first endpoint was rejected, if all of them were; otherwise None."""
        reasons = [self._rejections.get(endpoint.name) for endpoint in self._endpoints]
        return reasons[0] if reasons and all(reasons) else None

    def awaited(self) -> Wait:
        """What is waited for while no server may be sent requests."""
        return next(iter(self._waits.values()), Wait("a server; none is in the list yet", None, "no server"))

    def give_up(self, endpoint: Endpoint) -> None:
        """Use a server no more after too many failures in a row."""
        self._admitted.discard(endpoint.name)
        if endpoint.name not in self._rejections:
            self._reject(endpoint.name, f"{endpoint.gate.last_failure}, {endpoint.gate.failures} times in a row")

    def connection(self, endpoint: Endpoint) -> Http:
        """The open connection to a server."""
        if endpoint.name not in self._connections:
            self._connections[endpoint.name] = endpoint.connect()
        return self._connections[endpoint.name]

    def revoke(self, endpoint: Endpoint) -> None:
        """Require a new admission of a server that could not be reached: another one may return at its address."""
        if endpoint.admission is not None and endpoint.name in self._admitted:
            self._admitted.discard(endpoint.name)
            del self._admissions[endpoint.name]

    async def _admit(self, endpoint: Endpoint, admission: Admission) -> None:
        name = endpoint.name
        waits = RETURN_WAITS_SECONDS if name in self._ever_admitted else RETRY_WAITS_SECONDS
        for wait in itertools.chain(waits, [None]):
            try:
                until = time.monotonic() + CHECK_CALLS * endpoint.timeout_seconds
                self._waits[name] = Wait(f"{name} to show which model it serves", until, (name, "check"))
                await admission.check(self.connection(endpoint), self._committer)
            except WrongServer as error:
                self._reject(name, str(error))
            except Unreachable as error:
                if wait is not None:
                    until = time.monotonic() + wait
                    what = f"the next try to reach {name} ({error})"
                    self._waits[name] = Wait(what, until, (name, str(error)), is_pause=True)
                    await asyncio.sleep(wait)
                    continue
                self._reject(name, f"it cannot be reached ({error})")
            else:
                self._admitted.add(name)
                self._ever_admitted.add(name)
                endpoint.gate.forgive()
            break
        self._waits.pop(name, None)
        self._on_change()

    def _reject(self, name: str, reason: str) -> None:
        self._rejections[name] = f"{name}: {reason}"
        if self.rejection is None:  # otherwise the call ends with the reason
            self._note(f"server not used: {name}: {reason}")

    async def close(self) -> None:
        """Cancel admissions that have not ended, and close every connection."""
        for admission in self._admissions.values():
            admission.cancel()
        await asyncio.gather(*self._admissions.values(), return_exceptions=True)
        for connection in self._connections.values():
            await connection.close()


class Addresses:
    """Base URLs from a file that may change at any time; see :func:`read_addresses`.

    If a changed file cannot be read, the last valid list stays in use.

    Raises:
        AskError: on construction, the file cannot be read, or a line is no base URL.
    """

    def __init__(self, file: Path, note: Note) -> None:
        self._file, self._note = file, note
        self._version = self._file_version()
        self._urls = read_addresses(file)
        if not self._urls:
            note(f"{file}: no server yet; waiting for one")

    def __call__(self) -> list[str]:
        if (version := self._file_version()) != self._version:
            self._version = version
            try:
                self._urls = read_addresses(self._file)
            except AskError as error:
                self._note(f"{error}; the last valid list stays in use")
            else:
                self._note(f"{self._file}: servers now: {', '.join(self._urls) or 'none'}")
        return self._urls

    def _file_version(self) -> tuple[int, int] | None:
        try:
            stat = self._file.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size


def read_addresses(file: Path) -> list[str]:
    """Base URLs from a file, one a line; empty lines and lines that begin with # are ignored.

    Raises:
        AskError: it cannot be read, or a line is no base URL.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise AskError(f"{file}: cannot be read ({error}); write one base URL a line into it") from None
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#") and (problem := address_problem(line)) is not None:
            raise AskError(f"{file}:{number}: {without_password(line)!r} {problem}")
    return list(dict.fromkeys(line.rstrip("/") for line in lines if line and not line.startswith("#")))
