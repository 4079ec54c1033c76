"""Asks weights in this process, in groups, at price 0. Requests that the ledger can answer are not computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from stepladder.ask.ledger import Ledger
from stepladder.ask.request import Request, Response


class Engine(Protocol):
    """Loaded weights."""

    def plan(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Split requests into groups that are answered and committed together."""

    def answer(self, group: Sequence[Request]) -> list[Response]:
        """One response per request, in order."""


ProgressReport = Callable[[int, int], None]
"""Called with (answered requests, all requests) whenever the first changes."""


def ask_embedded(
    requests: Sequence[Request],
    load: Callable[[], Engine],
    ledger: Ledger,
    run: str,
    report: ProgressReport = lambda answered, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Response]:
    """Answer every request and return the responses by request key.

    Each group is committed before it is used. ``load`` is only called when the ledger lacks an answer. Groups are
    planned over all requests, including those already answered, so that a run that was killed forms the same batches,
    and so the same rounding, as one that was not.
    """
    unique = {request.key: request for request in requests}
    responses = ledger.find_all(unique.values())
    report(len(responses), len(unique))
    if len(responses) == len(unique):
        return responses
    engine = load()
    for group in engine.plan(list(unique.values())):
        if all(request.key in responses for request in group):
            continue
        missing = [request for request in group if request.key not in responses]
        answers = engine.answer(missing)
        ledger.store(run, zip(missing, answers, strict=True), note)
        responses.update(zip((request.key for request in missing), answers, strict=True))
        report(len(responses), len(unique))
    return responses
