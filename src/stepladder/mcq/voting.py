"""When a vote is decided: answers are worth asking for only while they can change who wins.

After Aggarwal et al. 2023, "Let's Sample Step by Step: Adaptive-Consistency" (arXiv:2305.11860), with the plainest of
stopping rules: two agreeing answers more than any other letter has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

LEAD = 2
"""Votes by which a letter must lead."""


def first_round(most: int) -> int:
    """Votes that are asked for at once: fewer decide nothing."""
    return min(LEAD, most)


def settled(votes: Sequence[str | None], most: int) -> bool:
    """Whether no more of at most ``most`` votes are to be asked for: a letter leads by :data:`LEAD`, or cannot be
    overtaken by those that are left. None, an answer that could not be read, is no vote."""
    left = most - len(votes)
    ranked = Counter(vote for vote in votes if vote is not None).most_common(2)
    first, second = [count for _, count in ranked] + [0] * (2 - len(ranked))
    return left <= 0 or first - second >= min(LEAD, left + 1)
