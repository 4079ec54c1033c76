"""What token sequences have in common, so that it is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Level(NamedTuple):
    """One generation of a family of prompts: token segments, and for each the segment before it (its parent's index in
    the level above; 0 for the first level, which has none)."""

    segments: list[tuple[int, ...]]
    parents: list[int]


def share_prefixes(prompts: Sequence[tuple[int, ...]]) -> list[Level]:
    """Split prompts into what all of them begin with, what neighbours begin with, and what is each one's own.

    Three levels; following the parents from segment ``i`` of the last level spells prompt ``i``. Every prompt keeps at
    least one token of its own to continue from. Neighbours are prompts that share a quarter of what is left behind the
    common beginning: the text of a problem, not the first words of its sentence.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    first, last = prompts[order[0]], prompts[order[-1]]
    common = min(common_prefix(first, last), min(map(len, prompts)) - 1)
    groups: list[list[int]] = []
    shared: list[int] = []
    for i in order:
        prompt = prompts[i]
        if groups:
            length = min(common_prefix(prompts[groups[-1][0]], prompt), shared[-1], len(prompt) - 1)
            if 4 * (length - common) >= len(prompt) - common:
                groups[-1].append(i)
                shared[-1] = length
                continue
        groups.append([i])
        shared.append(len(prompt) - 1)
    # A prompt without neighbours puts all but the length of the others' own parts into its prefix: own parts are padded
    # to one length, and a long one would make everybody's block wide.
    pairs = [(i, length) for group, length in zip(groups, shared, strict=True) if len(group) > 1 for i in group]
    own = max((len(prompts[i]) - length for i, length in pairs), default=1)
    shared = [
        length if len(group) > 1 else max(common, length + 1 - own)
        for group, length in zip(groups, shared, strict=True)
    ]
    group_of = {i: number for number, group in enumerate(groups) for i in group}
    return [
        Level([first[:common]], [0]),
        Level([prompts[group[0]][common:n] for group, n in zip(groups, shared, strict=True)], [0] * len(groups)),
        Level(
            [prompt[shared[group_of[i]] :] for i, prompt in enumerate(prompts)],
            [group_of[i] for i in range(len(prompts))],
        ),
    ]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
