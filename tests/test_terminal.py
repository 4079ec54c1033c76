"""Tables on a terminal and off it."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from stepladder.ask.ledger import Account
from stepladder.commands import ledger

OUTCOMES = {"answered": 12_345, "transient": 678, "rate_limited": 90, "malformed": 12, "lost": 3}


@pytest.mark.parametrize(("width", "is_terminal"), [(80, False), (80, True), (40, True), (200, False)])
def test_no_cell_of_the_ledger_is_cut(width: int, is_terminal: bool) -> None:
    screen = StringIO()
    console = Console(file=screen, width=width, force_terminal=is_terminal, color_system=None)
    account = Account(
        "a-rung", "a-model-of-a-name-of-some-length", 1_234_567_890, OUTCOMES, 10**9, 10**8, 7, {0.5: 1, 60.0: 1}
    )
    ledger.show([account, account], console)
    shown = screen.getvalue()
    assert "…" not in shown
    assert "..." not in shown
    words = [
        word for count, outcome in zip(OUTCOMES.values(), OUTCOMES, strict=True) for word in (f"{count:,}", outcome)
    ]
    for word in [*words, "1,234.5679", "1,000,000,000", "from ledger", "median s"]:
        assert word in shown
    if not is_terminal:
        assert "12,345 answered, 678 transient, 90 rate_limited, 12 malformed, 3 lost" in shown
        assert account.model in shown
