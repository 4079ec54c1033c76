"""A chat request and its identity."""

from __future__ import annotations

from stepladder.records import Message, Record
from stepladder.workspace import canonical, digest

KEY_VERSION = "v1"


class Request(Record):
    """One question to one model.

    ``model`` says who is asked in a way that outlives names: for own weights, the hash of their content.
    ``sample_index`` tells repeated samples of the same question apart; with temperature above 0 it seeds them.
    ``max_tokens`` caps the answer's length.
    """

    model: str
    messages: tuple[Message, ...]
    temperature: float = 0.0
    sample_index: int = 0
    max_tokens: int

    def identity(self) -> str:
        """Canonical JSON of everything that makes the answer; ``max_tokens`` is left out, so that a finished answer
        serves any cap."""
        return canonical(self.model_dump(mode="json", exclude={"max_tokens"}))

    @property
    def key(self) -> str:
        """The request's name in the ledger: a version, and the SHA-256 of its identity."""
        return f"{KEY_VERSION}:{digest(self.model_dump(mode='json', exclude={'max_tokens'}))}"


class Response(Record):
    """What came back, as the ledger holds it."""

    text: str
    finished: bool
    """False: cut off at ``max_tokens``."""
    max_tokens: int
    prompt_tokens: int
    completion_tokens: int
    micro_dollars: int = 0

    def serves(self, request: Request) -> bool:
        """Whether this answer can stand for the request: a finished one always, a cut one only up to its own cap."""
        return self.finished or request.max_tokens <= self.max_tokens
