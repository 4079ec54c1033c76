"""The ledger: every request to a model, every attempt and its cost, and every response."""

from stepladder.ask.ledger.connection import CHUNK
from stepladder.ask.ledger.entries import Account, Batch, Grant, Refusal, Scope, UnfinishedBatch, UnsettledAttempt
from stepladder.ask.ledger.store import Ledger

__all__ = [
    "CHUNK", "Account", "Batch", "Grant", "Ledger", "Refusal", "Scope", "UnfinishedBatch", "UnsettledAttempt",
]  # fmt: skip
