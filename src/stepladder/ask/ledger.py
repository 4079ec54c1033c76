"""The ledger: every model call ever made, in one SQLite file beside the runs. The only SQL of the package.

Money is integer micro-dollars. What a run has spent is a sum over its attempts, each at its settled charge or, while
that is unknown, at the worst case reserved for it; so whatever happens to a process, the sum is never too small.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from stepladder.ask.outcome import Delivery, Outcome
from stepladder.ask.request import Request, Response, TokenLogprob, worst_case
from stepladder.ask.schema import MIGRATIONS
from stepladder.config import Price
from stepladder.errors import UserError

CHUNK = 500
"""Keys looked up in one statement."""


class Scope(NamedTuple):
    """On whose account a request goes: the run and its rung, with their caps in micro-dollars (None: no cap)."""

    run: str
    rung: str = ""
    run_cap: int | None = None
    rung_cap: int | None = None


class Grant(NamedTuple):
    """Leave to send, and under which attempt."""

    attempt: int
    worst: int
    """Micro-dollars set aside."""
    answers_before: int
    """Responses this request already drew, unusable ones: a retry after none of them may reuse its idempotency key."""


Refusal = Literal["stored", "busy", "broke"]
"""``stored``: somebody answered it meanwhile; ``busy``: another process is asking it now; ``broke``: over a cap."""


class Open(NamedTuple):
    """An attempt without an outcome."""

    attempt: int
    model: str
    reserved: int
    alive: bool
    """Whether the process that sent it still runs; if not, nobody will ever know what became of it."""


class Batch(NamedTuple):
    """Requests handed to a provider in one file, or about to be."""

    id: int
    intent: str
    """What the batch's metadata carries, so that one whose name was never heard can be found."""
    scope: Scope
    """On whose account it goes; without caps, which have been seen to."""
    price: Price
    """At which its lines were reserved, and are charged."""
    remote: str | None
    """The provider's name for it, once known."""
    created: float
    """Seconds since the epoch."""


class Waiting(NamedTuple):
    """A batch that has not ended."""

    remote: str | None
    requests: int
    reserved: int
    """Micro-dollars."""


class Account(NamedTuple):
    """What one run did with one model on one rung."""

    rung: str
    model: str
    micro_dollars: int
    outcomes: dict[str, int]
    """Attempts by outcome, the most frequent first; ``open``: without one."""
    prompt_tokens: int
    completion_tokens: int
    hits: int
    """Requests answered from the ledger."""
    seconds: tuple[float, ...]
    """How long each attempt took, sorted."""


class Ledger:
    """Open ``path``, creating or migrating it. Use as a context manager.

    One instance belongs to one thread at a time. Any number of processes may have the same file open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._session: int | None = None
        self._lock: int | None = None
        self._sums: dict[tuple[str, str | None], int] = {}
        self._version = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.OperationalError) as error:
            raise UserError(f"{path}: cannot be opened ({error}); name a folder you can write to") from None
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._migrate(path)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise UserError(f"{path}: not a usable ledger ({error}); move it away to start a new one") from None

    def _migrate(self, path: Path) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            self._db.execute("ROLLBACK")
            raise UserError(f"{path}: written by a newer Stepladder; upgrade this one")
        for migration in MIGRATIONS[version:]:
            for statement in migration.split(";"):
                self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        self._db.execute("COMMIT")

    # Looking up

    def find(self, request: Request) -> Response | None:
        """The stored response that serves the request, or None. A finished one wins, then the longest."""
        return self.find_all([request]).get(request.key)

    def find_all(self, requests: Iterable[Request]) -> dict[str, Response]:
        """The stored responses that serve the requests, by key."""
        wanted = {request.key: request for request in requests}
        keys = list(wanted)
        found: dict[str, Response] = {}
        for at in range(0, len(keys), CHUNK):
            some = keys[at : at + CHUNK]
            marks = ",".join("?" * len(some))
            rows = self._db.execute(
                "SELECT key, text, finish, max_tokens, prompt_tokens, completion_tokens, reasoning, micro_dollars,"  # noqa: S608
                f" logprobs FROM responses WHERE key IN ({marks}) ORDER BY finish != 'length', max_tokens",
                some,
            )
            for key, text, finish, max_tokens, prompt, completion, reasoning, micro_dollars, logprobs in rows:
                response = Response.model_construct(
                    text=text,
                    finish=finish,
                    max_tokens=max_tokens,
                    prompt_tokens=prompt,
                    completion_tokens=completion,
                    reasoning=reasoning,
                    micro_dollars=micro_dollars,
                    logprobs=tuple(TokenLogprob(*row) for row in json.loads(logprobs)) if logprobs else (),
                )
                if response.serves(wanted[key]):
                    found[key] = response
        return found

    # Writing

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; when the block ends, what it wrote is on the disk."""
        self.begin()
        try:
            yield
        except BaseException:
            self.rollback()
            raise
        self.commit()

    def begin(self) -> None:
        """Open a transaction, after waiting for other processes to end theirs."""
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Wait until what the transaction wrote is on the disk."""
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        """Undo the transaction, if one is open."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._sums.clear()

    def store(self, run: str, answers: Iterable[tuple[Request, Response]]) -> None:
        """Commit a group of answers that cost nothing; when this returns they are on the disk.

        The first answer to a request stays: storing another under the same key and cap changes nothing.
        """
        with self.transaction():
            for request, response in answers:
                self.keep(run, request, response)

    def keep(self, run: str, request: Request, response: Response) -> None:
        """Write one such answer down. Inside a transaction."""
        self._remember(request)
        self._respond(run, request, response, None)

    def reserve(
        self,
        request: Request,
        price: Price,
        scope: Scope,
        model: str,
        endpoint: str = "",
        batch: Batch | None = None,
    ) -> Grant | Refusal:
        """Set the worst case aside and open an attempt, or say why not. Inside a transaction."""
        if self.find(request) is not None:
            return "stored"
        rivals = self._db.execute("SELECT session FROM attempts WHERE key = ? AND outcome IS NULL", (request.key,))
        if any(self._is_alive(session) for (session,) in rivals.fetchall()):
            return "busy"
        worst = worst_case(request, price)
        for rung, cap in ((None, scope.run_cap), (scope.rung, scope.rung_cap)):
            if cap is not None and self._sum(scope.run, rung) + worst > cap:
                return "broke"
        self._remember(request)
        answers = self._db.execute(
            "SELECT COUNT(*) FROM attempts WHERE key = ? AND raw IS NOT NULL AND status = 200", (request.key,)
        ).fetchone()[0]
        attempt = self._db.execute(
            "INSERT INTO attempts (key, session, run, rung, model, endpoint, max_tokens, reserved, started, batch)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                request.key,
                self._session,
                scope.run,
                scope.rung,
                model,
                endpoint,
                request.max_tokens,
                worst,
                time.time(),
                batch.id if batch else None,
            ),
        ).lastrowid
        self._add(scope.run, scope.rung, worst)
        return Grant(int(attempt or 0), worst, answers)

    def settle(
        self, grant: Grant, request: Request, scope: Scope, delivery: Delivery, outcome: Outcome, seconds: float
    ) -> None:
        """Close an attempt: its bytes, its charge, its response. Inside a transaction."""
        response = outcome.response
        self._db.execute(
            "UPDATE attempts SET charged = ?, outcome = ?, status = ?, message = ?, seconds = ?, prompt_tokens = ?,"
            " completion_tokens = ?, raw = ? WHERE id = ?",
            (
                outcome.charge, outcome.kind, delivery.status, outcome.message, seconds,
                response.prompt_tokens if response else 0, response.completion_tokens if response else 0,
                delivery.body or None, grant.attempt,
            ),
        )  # fmt: skip
        if outcome.charge is not None:
            self._add(scope.run, scope.rung, outcome.charge - grant.worst)
        if response is not None:
            self._respond(scope.run, request, response, grant.attempt)

    def _remember(self, request: Request) -> None:
        self._db.execute("INSERT OR IGNORE INTO requests VALUES (?, ?)", (request.key, request.identity()))

    def _respond(self, run: str, request: Request, r: Response, attempt: int | None) -> None:
        if r.finish == "refused":  # after a cut-off answer: twice its cap is more than the model takes; it stays
            known = self._db.execute("SELECT 1 FROM responses WHERE key = ?", (request.key,))
            if known.fetchone() is not None:
                return
        self._db.execute(
            "INSERT OR IGNORE INTO responses (key, max_tokens, run, text, finished, finish, reasoning, prompt_tokens,"
            " completion_tokens, micro_dollars, attempt, logprobs) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (request.key, r.max_tokens, run, r.text, r.finished, r.finish, r.reasoning, r.prompt_tokens,
             r.completion_tokens, r.micro_dollars, attempt, json.dumps(r.logprobs) if r.logprobs else ""),
        )  # fmt: skip

    # Batches. All but the last two inside a transaction.

    def open_batch(self, scope: Scope, endpoint: str, account: str, price: Price) -> Batch:
        """Write down that a batch is going to be made. ``account`` says which model, and with whose key."""
        batch = Batch(0, uuid.uuid4().hex, Scope(scope.run, scope.rung), price, None, time.time())
        row = self._db.execute(
            "INSERT INTO batches (intent, session, run, rung, endpoint, account, price, created)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                batch.intent, self._session, scope.run, scope.rung, endpoint, account, price.model_dump_json(),
                batch.created,
            ),
        ).lastrowid  # fmt: skip
        return batch._replace(id=int(row or 0))

    def name_batch(self, batch: Batch, remote: str) -> Batch:
        """The provider has taken it, under this name."""
        self._db.execute("UPDATE batches SET remote = ? WHERE id = ?", (remote, batch.id))
        return batch._replace(remote=remote)

    def end_batch(self, batch: Batch, how: str, stray: bytes = b"") -> None:
        """It has ended, and all its attempts are settled; ``stray`` are lines of its files that name none of them."""
        self._db.execute("UPDATE batches SET ended = ?, stray = ? WHERE id = ?", (how, stray or None, batch.id))

    def adopt_batches(self, endpoint: str, account: str) -> list[Batch]:
        """Batches of this account that have not ended and whose process has: they are this process's now."""
        rows = self._db.execute(
            "SELECT id, intent, run, rung, price, remote, created, session FROM batches"
            " WHERE ended IS NULL AND endpoint = ? AND account = ? ORDER BY id",
            (endpoint, account),
        ).fetchall()
        if not rows:
            return []
        self.begin_session()
        alive = {session: self._is_alive(session) for session in {row[-1] for row in rows} - {self._session}}
        found = [row for row in rows if not alive.get(row[-1])]
        for row in found:
            for table, key in (("batches", "id"), ("attempts", "batch")):
                self._db.execute(f"UPDATE {table} SET session = ? WHERE {key} = ?", (self._session, row[0]))  # noqa: S608
        return [
            Batch(number, intent, Scope(run, rung), Price.model_validate_json(price), remote, created)
            for number, intent, run, rung, price, remote, created, _ in found
        ]

    def in_batch(self, batch: Batch) -> dict[int, tuple[Grant, Request] | None]:
        """Its attempts by number; None where one is settled."""
        rows = self._db.execute(
            "SELECT id, reserved, max_tokens, identity, outcome FROM attempts JOIN requests USING (key)"
            " WHERE batch = ? ORDER BY id",
            (batch.id,),
        )
        return {
            attempt: (
                Grant(attempt, reserved, 0),
                Request.model_validate({**json.loads(identity), "max_tokens": max_tokens}),
            )
            if outcome is None
            else None
            for attempt, reserved, max_tokens, identity, outcome in rows
        }

    def waiting(self, run: str) -> list[Waiting]:
        """Batches of the run that have not ended."""
        rows = self._db.execute(
            "SELECT remote, COUNT(*), SUM(reserved) FROM batches JOIN attempts ON attempts.batch = batches.id"
            " WHERE batches.run = ? AND ended IS NULL AND outcome IS NULL GROUP BY batches.id ORDER BY batches.id",
            (run,),
        )
        return [Waiting(*row) for row in rows]

    # Money

    def spent(self, run: str, rung: str | None = None) -> int:
        """Micro-dollars the run (or one rung of it) has spent, attempts of unknown outcome at their worst."""
        where, values = ("run = ?", [run]) if rung is None else ("run = ? AND rung = ?", [run, rung])
        total = self._db.execute(
            f"SELECT COALESCE(SUM(COALESCE(charged, reserved)), 0) FROM attempts WHERE {where}",  # noqa: S608
            values,
        )
        return int(total.fetchone()[0])

    def _sum(self, run: str, rung: str | None) -> int:
        """:meth:`spent`, added up once and kept while no other process writes."""
        version = int(self._db.execute("PRAGMA data_version").fetchone()[0])
        if version != self._version:
            self._version = version
            self._sums.clear()
        if (run, rung) not in self._sums:
            self._sums[run, rung] = self.spent(run, rung)
        return self._sums[run, rung]

    def _add(self, run: str, rung: str, micro_dollars: int) -> None:
        for account in ((run, None), (run, rung)):
            if account in self._sums:
                self._sums[account] += micro_dollars

    # Sessions: which process an open attempt belongs to, and whether it still runs

    def begin_session(self) -> None:
        """Take a number for this process, before it reserves anything. The lock on the number's file lives as long as
        the process does, however that ends."""
        if self._session is None:
            inserted = self._db.execute("INSERT INTO sessions (pid, started) VALUES (?, ?)", (os.getpid(), time.time()))
            self._session = int(inserted.lastrowid or 0)
            self._lock = os.open(self._session_file(self._session), os.O_CREAT | os.O_RDWR)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def _session_file(self, session: int) -> Path:
        return self.path.with_name(f".{self.path.name}.session-{session}")

    def _is_alive(self, session: int) -> bool:
        if session == self._session:
            return True
        try:
            handle = os.open(self._session_file(session), os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
        self._session_file(session).unlink(missing_ok=True)
        return False

    def unsettled(self, run: str) -> list[Open]:
        """The run's attempts without an outcome, oldest first; those of dead processes stay charged at their worst.
        Those in batches are not among them: they can still be collected."""
        rows = self._db.execute(
            "SELECT id, model, reserved, session FROM attempts"
            " WHERE outcome IS NULL AND run = ? AND batch IS NULL ORDER BY id",
            (run,),
        ).fetchall()
        alive = {session: self._is_alive(session) for session in {row[3] for row in rows}}
        return [Open(attempt, model, reserved, alive[session]) for attempt, model, reserved, session in rows]

    # Reading for people

    def hit(self, scope: Scope, model: str, count: int) -> None:
        """Note that so many requests were answered from here. Inside a transaction."""
        self._db.execute(
            "INSERT INTO hits VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
            (*scope[:2], model, count),
        )

    def calls(self, run: str) -> int:
        """Responses the run has caused."""
        return int(self._db.execute("SELECT COUNT(*) FROM responses WHERE run = ?", (run,)).fetchone()[0])

    def accounts(self, run: str) -> list[Account]:
        """What the run did with each model on each rung, dearest first."""
        attempts = self._db.execute(
            "SELECT rung, model, outcome, COALESCE(charged, reserved), prompt_tokens, completion_tokens, seconds"
            " FROM attempts WHERE run = ?",
            (run,),
        )
        found: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
        for rung, model, *rest in attempts:
            found.setdefault((rung, model), []).append(tuple(rest))
        hits = {
            (rung, model): count
            for rung, model, count in self._db.execute("SELECT rung, model, count FROM hits WHERE run = ?", (run,))
        }
        accounts = []
        for rung, model in found.keys() | hits.keys():
            rows = found.get((rung, model), [])
            accounts.append(
                Account(
                    rung=rung,
                    model=model,
                    micro_dollars=sum(row[1] for row in rows),
                    outcomes=dict(Counter(row[0] or "open" for row in rows).most_common()),
                    prompt_tokens=sum(row[2] for row in rows),
                    completion_tokens=sum(row[3] for row in rows),
                    hits=hits.get((rung, model), 0),
                    seconds=tuple(sorted(row[4] for row in rows if row[4] is not None)),
                )
            )
        return sorted(accounts, key=lambda account: (-account.micro_dollars, account.rung, account.model))

    def export(self) -> Iterator[dict[str, Any]]:
        """Every attempt with its request and raw response, then every answer of weights in this process."""
        self._db.row_factory = sqlite3.Row
        try:
            for row in self._db.execute(
                "SELECT attempts.*, identity FROM attempts JOIN requests USING (key) ORDER BY id"
            ):
                raw = row["raw"]
                yield {
                    **{name: row[name] for name in row.keys() if name not in ("identity", "raw", "session")},  # noqa: SIM118
                    "request": json.loads(row["identity"]),
                    "raw": None if raw is None else raw.decode(errors="replace"),
                }
            own = "SELECT responses.*, identity FROM responses JOIN requests USING (key) WHERE attempt IS NULL"
            for row in self._db.execute(own):
                kept = ("key", "run", "max_tokens", "finish", "prompt_tokens", "completion_tokens", "text")
                yield {**{name: row[name] for name in kept}, "request": json.loads(row["identity"])}
        finally:
            self._db.row_factory = None

    def close(self) -> None:
        self._db.close()
        if self._lock is not None:
            self._session_file(self._session or 0).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
