"""What a call of the engine or of the batch API did, and the errors for what it left undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stepladder.ask.ledger import Scope
from stepladder.ask.outcome import FINAL, Outcome
from stepladder.ask.remote.listener import Note
from stepladder.errors import AskError, BudgetError


@dataclass
class Tally:
    """Requests by what became of them, and what they cost."""

    stored: int = 0
    """Requests that the ledger answered."""
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    """The last error message of every request that got no answer."""
    micro_dollars: int = 0
    """Charged to, or still reserved for, the attempts of this call."""
    answered_micro_dollars: int = 0
    """The part of it that the answered requests cost, without attempts that failed or could not be read."""
    unbelieved: int = 0
    """Answers whose reported usage is missing or impossible, charged at the worst case."""

    def flag(self, name: str, outcome: Outcome, note: Note) -> None:
        """Count an answer whose usage is not believed, and say so of the first one."""
        if outcome.kind in FINAL and outcome.charge is None:
            self.unbelieved += 1
            if self.unbelieved == 1:
                note(f"model {name!r}: an answer is {outcome.message} (more of them are not mentioned)")


def budget_error(name: str, scope: Scope, tally: Tally, unanswered: int, worst: int) -> BudgetError:
    """The error of a reached cap. ``unanswered`` is how many requests are left, ``worst`` the most that they would
    cost, in micro-dollars."""
    caps = {"run": scope.run_cap, f"rung {scope.rung}": scope.rung_cap}
    limits = " and ".join(f"${cap / 1e6:.4f} for the {account}" for account, cap in caps.items() if cap is not None)
    estimate = ""
    if tally.answered:
        dollars = tally.answered_micro_dollars / tally.answered * unanswered / 1e6
        estimate = f", about ${dollars:.4f} at what an answer cost so far"
    return BudgetError(
        f"model {name!r}: the cap is reached ({limits}); {tally.stored + tally.answered} requests are answered and "
        f"kept, {unanswered} are not and would cost at most ${worst / 1e6:.4f}{estimate}; raise the cap and run again"
    )


def unanswered_error(name: str, failed: Sequence[str]) -> AskError:
    """The error of a call in which some requests got no answer."""
    return AskError(
        f"model {name!r}: {len(failed)} requests got no answer (last error: {failed[-1]}); the other answers are kept; "
        "run again to ask for the missing ones"
    )
