"""Asking weights in this process: in groups, at price 0. What the ledger knows is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from stepladder.ask.ledger import Ledger
from stepladder.ask.request import Request, Response


class Engine(Protocol):
    """Loaded weights."""

    def plan(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Split requests into groups answered and committed together."""

    def answer(self, group: Sequence[Request]) -> list[Response]:
        """One response per request, in order."""


ProgressReport = Callable[[int, int], None]
"""Called with (answered, wanted) whenever that changes."""


def ask_embedded(
    requests: Sequence[Request],
    load: Callable[[], Engine],
    ledger: Ledger,
    run: str,
    report: ProgressReport = lambda answered, wanted: None,
) -> dict[str, Response]:
    """Answer every request and return the responses by request key.

    Each group is committed before anything reads it. ``load`` is only called when something is missing
    from the ledger. Groups are planned over all requests, the answered ones too, so that a run
    that was killed batches, and therefore rounds, exactly like one that was not.
    """
    unique = {request.key: request for request in requests}
    found = ledger.find_all(unique.values())
    report(len(found), len(unique))
    if len(found) == len(unique):
        return found
    engine = load()
    for group in engine.plan(list(unique.values())):
        if all(request.key in found for request in group):
            continue
        missing = [request for request in group if request.key not in found]
        answers = engine.answer(missing)
        ledger.store(run, zip(missing, answers, strict=True))
        found.update(zip((request.key for request in missing), answers, strict=True))
        report(len(found), len(unique))
    return found
