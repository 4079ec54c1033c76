"""The ledger: one SQLite file beside the runs. Only this folder contains SQL."""

from __future__ import annotations

from stepladder.ask.ledger.accounts import Accounts
from stepladder.ask.ledger.attempts import Attempts
from stepladder.ask.ledger.batches import Batches
from stepladder.ask.ledger.health import Health


class Ledger(Attempts, Batches, Accounts, Health):
    """Open ``path``, creating or migrating it. Use as a context manager.

    An instance may be used by one thread at a time. Any number of processes may have the same file open.
    """
