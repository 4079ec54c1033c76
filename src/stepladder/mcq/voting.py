"""When a vote is decided, so that no more answers need to be asked for.

After Aggarwal et al. 2023, "Let's Sample Step by Step: Adaptive-Consistency" (arXiv:2305.11860), with the simplest
stopping rule: one letter has two more votes than any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

MIN_LEAD = 2
"""Votes that a letter needs more than any other to be decided."""


def first_round(max_votes: int) -> int:
    """How many votes to ask for at once at the start; fewer cannot decide anything."""
    return min(MIN_LEAD, max_votes)


def is_decided(votes: Sequence[str | None], max_votes: int) -> bool:
    """Whether no more of the at most ``max_votes`` votes need to be asked for: a letter leads by :data:`MIN_LEAD` or
    can no longer be overtaken, or all are in. None, an answer that could not be read, counts for no letter."""
    remaining = max_votes - len(votes)
    ranked = Counter(vote for vote in votes if vote is not None).most_common(2)
    first, second = [count for _, count in ranked] + [0] * (2 - len(ranked))
    return remaining <= 0 or first - second >= min(MIN_LEAD, remaining + 1)
