"""Requests and their responses."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from stepladder.ask.ledger.connection import CHUNK, Connection
from stepladder.ask.ledger.faults import damaged
from stepladder.ask.ledger.packing import packed_text, unpacked_text
from stepladder.ask.ledger.patience import Patience
from stepladder.ask.request import Request, Response, TokenLogprob, is_logprob


class Responses(Connection):
    """Looks responses up, and stores those that cost nothing."""

    def find(self, request: Request) -> Response | None:
        """The stored response that serves the request, or None. A finished one is preferred, then the one with the
        largest cap."""
        return self.find_all([request]).get(request.key)

    def find_all(self, requests: Iterable[Request]) -> dict[str, Response]:
        """The stored responses that serve the requests, by key.

        Raises:
            LedgerError: one of them was changed since it was stored.
        """
        by_key = {request.key: request for request in requests}
        keys = list(by_key)
        responses: dict[str, Response] = {}
        for start in range(0, len(keys), CHUNK):
            chunk = keys[start : start + CHUNK]
            marks = ",".join("?" * len(chunk))
            rows = self._db.execute(
                "SELECT key, text, finish, max_tokens, prompt_tokens, completion_tokens, reasoning, micro_dollars,"  # noqa: S608
                " logprobs, checksum FROM requests JOIN responses ON request = requests.id"
                f" WHERE key IN ({marks}) ORDER BY finish != 'length', max_tokens",
                chunk,
            )
            for *stored, checksum in rows:
                key, text, finish, max_tokens, prompt, completion, reasoning, micro_dollars, logprobs = stored
                try:
                    text, reasoning, logprobs = map(unpacked_text, (text, reasoning, logprobs))
                    whole = _checksum(
                        [key, text, finish, max_tokens, prompt, completion, reasoning, micro_dollars, logprobs]
                    )
                except (zlib.error, UnicodeDecodeError):
                    whole = ""
                if checksum and checksum != whole:  # older versions stored none
                    raise damaged(self.path, f"the answer to request {key} is not what was stored")
                response = Response.model_construct(
                    text=text,
                    finish=finish,
                    max_tokens=max_tokens,
                    prompt_tokens=prompt,
                    completion_tokens=completion,
                    reasoning=reasoning,
                    micro_dollars=micro_dollars,
                    logprobs=_stored_logprobs(logprobs) if logprobs else (),
                )
                if response.serves(by_key[key]):
                    responses[key] = response
        return responses

    def store(
        self, run: str, answers: Iterable[tuple[Request, Response]], note: Callable[[str], None] = lambda line: None
    ) -> None:
        """Commit a group of responses that cost nothing; when this returns they are on the disk. While the ledger
        cannot be written, it waits (``patience``) and tells ``note``.

        The first response to a request stays: storing another under the same key and cap changes nothing.
        """
        waiting, patience = list(answers), Patience(self.path, note)
        while True:
            try:
                with self.transaction():
                    for request, response in waiting:
                        self.keep(run, request, response)
            except sqlite3.Error as error:
                time.sleep(patience.pause(error, len(waiting)))
            else:
                return patience.end()

    def keep(self, run: str, request: Request, response: Response) -> None:
        """Store one response that cost nothing. Call inside a transaction."""
        self._insert_response(run, request, response, None)

    def _number_of(self, request: Request) -> int:
        """The request's number, under which it is stored if it is new. Call inside a transaction."""
        known = self._db.execute("SELECT id FROM requests WHERE key = ?", (request.key,)).fetchone()
        if known is not None:
            return int(known[0])
        row = (request.key, packed_text(request.identity()))
        return int(self._db.execute("INSERT INTO requests (key, identity) VALUES (?, ?)", row).lastrowid or 0)

    def _insert_response(self, run: str, request: Request, r: Response, attempt: int | None) -> None:
        number = self._number_of(request)
        if r.finish == "refused":
            # After a truncated answer, twice its cap was more than the model accepts: the truncated answer stays.
            stored = self._db.execute("SELECT 1 FROM responses WHERE request = ?", (number,))
            if stored.fetchone() is not None:
                return
        logprobs = json.dumps(r.logprobs) if r.logprobs else ""
        checksum = _checksum(
            [request.key, r.text, r.finish, r.max_tokens, r.prompt_tokens, r.completion_tokens, r.reasoning,
             r.micro_dollars, logprobs]
        )  # fmt: skip
        self._db.execute(
            "INSERT OR IGNORE INTO responses (request, max_tokens, run, text, finish, reasoning, prompt_tokens,"
            " completion_tokens, micro_dollars, attempt, logprobs, checksum)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (number, r.max_tokens, run, packed_text(r.text), r.finish, packed_text(r.reasoning),
             r.prompt_tokens, r.completion_tokens, r.micro_dollars, attempt, packed_text(logprobs), checksum),
        )  # fmt: skip


def _checksum(columns: list[Any]) -> str:
    """SHA-256 (hex) of what :meth:`Responses.find_all` reads of a response, in that order."""
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()


def _stored_logprobs(stored: str) -> tuple[TokenLogprob, ...]:
    """Log-probabilities as they were stored; none if one of them cannot be, which older versions did not look at."""
    tokens = tuple(TokenLogprob(*row) for row in json.loads(stored))
    possible = all(is_logprob(value) for token in tokens for value in (token.logprob, *token.top.values()))
    return tokens if possible else ()
