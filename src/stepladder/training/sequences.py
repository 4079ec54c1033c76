"""Which tokens a training step computes: examples as rows, rows packed by what they share, packs in a good order.

Questions about one problem begin with the same tokens, and several chains of one question share all of its prompt. A
pack holds that beginning once and the rest of every row behind it, as branches that do not see each other. Positions
and attention are those of the rows on their own, so loss and gradients are the same, for fewer tokens (a third fewer
on the demo's questions, three to a problem).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from stepladder.models import template
from stepladder.models.prefixes import common_prefix
from stepladder.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token without loss."""


class TokenRow(NamedTuple):
    """A tokenised example: ids of the whole conversation, and how many of them are the prompt's (no loss there)."""

    ids: list[int]
    prompt: int


class Pack(NamedTuple):
    """Rows with one beginning. All lists have one entry a token, the beginning first, then row after row."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    branches: list[int]
    """0 in the beginning, which every branch sees; in the branches 1, 2, ..., each of which sees itself."""


def tokenise(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> list[TokenRow]:
    """Rows of the examples that fit; one that does not is left out, since a cut chain teaches a cut answer."""
    rows = []
    for example in examples:
        prompt, completion = template.conversation_tokens(tokenizer, example.messages)
        if len(prompt) + len(completion) <= max_length:
            rows.append(TokenRow(prompt + completion, len(prompt)))
    return rows


def pack(rows: Sequence[TokenRow], max_length: int) -> list[Pack]:
    """Pack rows that save tokens together, into packs of at most ``max_length`` tokens (a row on its own may be
    longer)."""
    groups: list[list[TokenRow]] = []
    for row in sorted(rows):
        if groups:
            group, joined = groups[-1], [*groups[-1], row]
            shared = _beginning(joined)
            saves = len(group) * shared > (len(group) - 1) * _beginning(group)
            if saves and shared + sum(len(r.ids) - shared for r in joined) <= max_length:
                groups[-1] = joined
                continue
        groups.append([row])
    return [_packed(group) for group in groups]


def singly(rows: Sequence[TokenRow]) -> list[Pack]:
    """Every row by itself."""
    return [_packed([row]) for row in rows]


def _beginning(group: Sequence[TokenRow]) -> int:
    """Tokens that all rows of a group begin with. The last token of a prompt stays in its branch: what it predicts,
    the first token that carries loss, differs from row to row."""
    common = common_prefix(group[0].ids, group[-1].ids)  # sorted: the ends differ most
    return min(common, *(row.prompt - 1 for row in group))


def _packed(group: list[TokenRow]) -> Pack:
    start = _beginning(group) if len(group) > 1 else 0
    result = Pack(group[0].ids[:start], [IGNORED] * start, list(range(start)), [0] * start)
    for branch, row in enumerate(group, start=1):
        scored = row.ids[max(row.prompt, start) :]
        result.input_ids.extend(row.ids[start:])
        result.labels.extend([IGNORED] * (len(row.ids) - start - len(scored)) + scored)
        result.position_ids.extend(range(start, len(row.ids)))
        result.branches.extend([branch] * (len(row.ids) - start))
    return result


def blank() -> Pack:
    """A pack without loss, for a device that would have nothing to do while others compute their last batch."""
    return Pack([0, 0], [IGNORED, IGNORED], [0, 1], [0, 0])


class Batched:
    """A sampler whose batches hold packs of like length, in random order.

    Sorting a whole epoch by length, as the Trainer's own strategy does with a few hundred examples, feeds the student
    one kind of question after another; it forgets the first before the last (docs/experiments.md). Here only
    the packs of eight random batches are sorted, and their batches are shuffled again. Every epoch draws anew.

    Args:
        lengths: tokens of each pack.
        batch_size: packs a batch.
        seed: of the order.
        devices: among how many the batches are dealt out. So that each gets as many, an epoch ends with as many
            :func:`blank` packs, named by the index after the last, as are missing.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, devices: int = 1) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        self.blanks = -len(lengths) % (batch_size * devices) if devices > 1 else 0

    def __len__(self) -> int:
        return len(self.lengths) + self.blanks

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed}/{self.epoch}")
        order = draw.sample(range(len(self.lengths)), len(self.lengths))
        window, size = 8 * self.batch_size, self.batch_size
        batches = []
        for start in range(0, len(order), window):
            alike = sorted(order[start : start + window], key=lambda i: self.lengths[i])
            batches += [alike[start : start + size] for start in range(0, len(alike), size)]
        *full, last = sorted(batches, key=len, reverse=True)  # a short batch anywhere but last would shift the others
        draw.shuffle(full)
        yield from (i for batch in (*full, last) for i in batch)
        yield from [len(self.lengths)] * self.blanks
