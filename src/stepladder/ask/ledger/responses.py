"""Requests and their responses."""

from __future__ import annotations

import json
from collections.abc import Iterable

from stepladder.ask.ledger.connection import CHUNK, Connection
from stepladder.ask.request import Request, Response, TokenLogprob


class Responses(Connection):
    """Looks responses up, and stores those that cost nothing."""

    def find(self, request: Request) -> Response | None:
        """The stored response that serves the request, or None. A finished one is preferred, then the one with the
        largest cap."""
        return self.find_all([request]).get(request.key)

    def find_all(self, requests: Iterable[Request]) -> dict[str, Response]:
        """The stored responses that serve the requests, by key."""
        by_key = {request.key: request for request in requests}
        keys = list(by_key)
        responses: dict[str, Response] = {}
        for start in range(0, len(keys), CHUNK):
            chunk = keys[start : start + CHUNK]
            marks = ",".join("?" * len(chunk))
            rows = self._db.execute(
                "SELECT key, text, finish, max_tokens, prompt_tokens, completion_tokens, reasoning, micro_dollars,"  # noqa: S608
                f" logprobs FROM responses WHERE key IN ({marks}) ORDER BY finish != 'length', max_tokens",
                chunk,
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
                if response.serves(by_key[key]):
                    responses[key] = response
        return responses

    def store(self, run: str, answers: Iterable[tuple[Request, Response]]) -> None:
        """Commit a group of responses that cost nothing; when this returns they are on the disk.

        The first response to a request stays: storing another under the same key and cap changes nothing.
        """
        with self.transaction():
            for request, response in answers:
                self.keep(run, request, response)

    def keep(self, run: str, request: Request, response: Response) -> None:
        """Store one response that cost nothing. Call inside a transaction."""
        self._insert_request(request)
        self._insert_response(run, request, response, None)

    def _insert_request(self, request: Request) -> None:
        self._db.execute("INSERT OR IGNORE INTO requests VALUES (?, ?)", (request.key, request.identity()))

    def _insert_response(self, run: str, request: Request, r: Response, attempt: int | None) -> None:
        if r.finish == "refused":
            # After a truncated answer, twice its cap was more than the model accepts: the truncated answer stays.
            stored = self._db.execute("SELECT 1 FROM responses WHERE key = ?", (request.key,))
            if stored.fetchone() is not None:
                return
        self._db.execute(
            "INSERT OR IGNORE INTO responses (key, max_tokens, run, text, finished, finish, reasoning, prompt_tokens,"
            " completion_tokens, micro_dollars, attempt, logprobs) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (request.key, r.max_tokens, run, r.text, r.finished, r.finish, r.reasoning, r.prompt_tokens,
             r.completion_tokens, r.micro_dollars, attempt, json.dumps(r.logprobs) if r.logprobs else ""),
        )  # fmt: skip
