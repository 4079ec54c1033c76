"""Split token sequences by common prefixes, so that each prefix is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Level(NamedTuple):
    """One level of a tree of token segments; ``parents[i]`` is the index of the segment before segment ``i`` in the
    level above, and 0 in the first level."""

    segments: list[tuple[int, ...]]
    parents: list[int]


def share_prefixes(prompts: Sequence[tuple[int, ...]]) -> list[Level]:
    """Split prompts into three levels: the prefix of all, the prefix of each group, and the rest of each prompt.

    Prompt ``i`` is segment ``i`` of the last level after its parents. Its rest has at least one token, to continue
    from. A group is of prompts that share at least a quarter of their tokens after the prefix of all: the text of a
    problem, not just the first words of a sentence.
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
    # Rests are padded to one length. A prompt alone in its group moves into its prefix what exceeds the longest rest of
    # the others, so that it does not widen the whole block.
    grouped = [(i, length) for group, length in zip(groups, shared, strict=True) if len(group) > 1 for i in group]
    longest_rest = max((len(prompts[i]) - length for i, length in grouped), default=1)
    shared = [
        length if len(group) > 1 else max(common, length + 1 - longest_rest)
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
    """Length of the common prefix of two sequences."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
