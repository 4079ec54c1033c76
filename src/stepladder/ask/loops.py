"""Answers that go in circles are ended: the last tokens are one passage over and over, which greedy decoding never
leaves."""

from __future__ import annotations

from collections.abc import Sequence

MIN_PASSAGE, MAX_PASSAGE, REPEATS = 8, 64, 5
"""Tokens of a passage, from and to, and how often it must stand at the end."""
FINISH_REASON = "repetition"
"""What vLLM calls the end of such an answer (since 0.17)."""
DETECTION = {"min_pattern_size": MIN_PASSAGE, "max_pattern_size": MAX_PASSAGE, "min_count": REPEATS}
"""The same for vLLM, under its key ``repetition_detection``."""


def goes_in_circles(ids: Sequence[int]) -> bool:
    """Whether these tokens end in a passage that stands there :data:`REPEATS` times."""
    sizes = range(MIN_PASSAGE, min(MAX_PASSAGE, len(ids) // REPEATS) + 1)
    return any(all(ids[-place] == ids[-place - size] for place in range(1, size * (REPEATS - 1) + 1)) for size in sizes)
