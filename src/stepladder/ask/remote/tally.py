"""What a call of the engine or of the batch API did, and the errors that say what it did not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stepladder.ask.ledger import Scope
from stepladder.errors import AskError, BudgetError


@dataclass
class Tally:
    """What a call of :func:`ask_all` did."""

    stored: int = 0
    """Requests whose answer was in the ledger."""
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    """Last message of every request that got no answer."""
    micro_dollars: int = 0
    """Settled or still reserved by the attempts made."""


def over_budget(name: str, scope: Scope, tally: Tally, rest: int, worst: int) -> BudgetError:
    """How far the money went, and what the ``rest`` requests would cost, ``worst`` micro-dollars at most."""
    caps = {"run": scope.run_cap, f"rung {scope.rung}": scope.rung_cap}
    limits = " and ".join(f"${cap / 1e6:.4f} for the {what}" for what, cap in caps.items() if cap is not None)
    usual = ""
    if tally.answered:
        usual = f", about ${tally.micro_dollars / tally.answered * rest / 1e6:.4f} going by those before"
    return BudgetError(
        f"model {name!r}: the cap is reached ({limits}); {tally.stored + tally.answered} requests are answered and "
        f"kept, {rest} are not and would cost at most ${worst / 1e6:.4f}{usual}; raise the cap and run again"
    )


def no_answers(name: str, failed: Sequence[str]) -> AskError:
    """Some requests came to nothing."""
    return AskError(
        f"model {name!r}: {len(failed)} requests got no answer (the last: {failed[-1]}); all others are kept, run "
        "again to ask for these"
    )
