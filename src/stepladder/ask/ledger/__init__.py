"""The ledger: every model call ever made, what it cost and what came back."""

from stepladder.ask.ledger.connection import CHUNK
from stepladder.ask.ledger.entries import Account, Batch, Grant, Open, Refusal, Scope, Waiting
from stepladder.ask.ledger.store import Ledger

__all__ = ["CHUNK", "Account", "Batch", "Grant", "Ledger", "Open", "Refusal", "Scope", "Waiting"]
