"""Token sequences for training: examples as token rows, rows packed by common prefix, and the order of packs.

Questions about one problem begin with the same tokens, and all chains of a question share its prompt. A pack holds the
common prefix once, followed by the rest of every row as branches that do not attend to each other. Positions and
attention are those of the separate rows, so that loss and gradients are the same with fewer tokens (a third fewer on
the demo's questions, three to a problem).
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
    """A tokenised example: the token ids of a conversation, the first ``prompt_length`` of which carry no loss."""

    ids: list[int]
    prompt_length: int

    @property
    def scored(self) -> range:
        """Positions whose next tokens carry loss."""
        return range(self.prompt_length - 1, len(self.ids) - 1)


class Pack(NamedTuple):
    """Rows with a common prefix. All lists have one entry per token: the prefix first, then the rest of each row."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    branches: list[int]
    """0 in the prefix, and 1, 2, ... in the branches. A branch attends to the prefix and to itself."""


def tokenise(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> list[TokenRow]:
    """Tokenise the examples of at most ``max_length`` tokens. Longer ones are left out: a truncated chain would teach
    truncated answers."""
    rows = []
    for example in examples:
        prompt, completion = template.conversation_tokens(tokenizer, example.messages)
        if len(prompt) + len(completion) <= max_length:
            rows.append(TokenRow(prompt + completion, len(prompt)))
    return rows


def pack(rows: Sequence[TokenRow], max_length: int) -> list[Pack]:
    """Pack rows where their common prefix saves tokens, into packs of at most ``max_length`` tokens (a single row may
    be longer)."""
    groups: list[list[TokenRow]] = []
    for row in sorted(rows):
        if groups:
            group, joined = groups[-1], [*groups[-1], row]
            shared = _common_length(joined)
            saves = len(group) * shared > (len(group) - 1) * _common_length(group)
            if saves and shared + sum(len(r.ids) - shared for r in joined) <= max_length:
                groups[-1] = joined
                continue
        groups.append([row])
    return [_packed(group) for group in groups]


def singly(rows: Sequence[TokenRow]) -> list[Pack]:
    """A pack for every row."""
    return [_packed([row]) for row in rows]


def _common_length(group: Sequence[TokenRow]) -> int:
    """Length of the common prefix of a group of sorted rows. It ends before the last token of every prompt, which
    predicts the first token that carries loss, and that differs from row to row."""
    common = common_prefix(group[0].ids, group[-1].ids)  # the first and last of sorted rows differ most
    return min(common, *(row.prompt_length - 1 for row in group))


def _packed(group: list[TokenRow]) -> Pack:
    start = _common_length(group) if len(group) > 1 else 0
    result = Pack(group[0].ids[:start], [IGNORED] * start, list(range(start)), [0] * start)
    for branch, row in enumerate(group, start=1):
        scored = row.ids[max(row.prompt_length, start) :]
        result.input_ids.extend(row.ids[start:])
        result.labels.extend([IGNORED] * (len(row.ids) - start - len(scored)) + scored)
        result.position_ids.extend(range(start, len(row.ids)))
        result.branches.extend([branch] * (len(row.ids) - start))
    return result


def blank() -> Pack:
    """A pack without loss, for a device that has none left while others compute their last batch."""
    return Pack([0, 0], [IGNORED, IGNORED], [0, 1], [0, 0])


class LengthGroupedSampler:
    """A sampler whose batches hold packs of similar length, in random order.

    The Trainer's own strategy sorts the whole epoch by length if there are only a few hundred examples. The student
    then sees one kind of question after another, and forgets the first before the last (docs/experiments.md). Here only
    the packs of eight random batches are sorted, and the batches are shuffled again. Every epoch has another order.

    Args:
        lengths: tokens of each pack.
        batch_size: packs in a batch.
        seed: seed of the order.
        devices: number of devices that share the batches. An epoch ends with as many :func:`blank` packs, whose index
            is ``len(lengths)``, as are needed to give every device the same number.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, devices: int = 1) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        self.blanks = -len(lengths) % (batch_size * devices) if devices > 1 else 0

    def __len__(self) -> int:
        return len(self.lengths) + self.blanks

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, with its number: by the data loader, and by trl.py where that does not."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed}/{self.epoch}")
        order = draw.sample(range(len(self.lengths)), len(self.lengths))
        window, size = 8 * self.batch_size, self.batch_size
        batches = []
        for start in range(0, len(order), window):
            alike = sorted(order[start : start + window], key=lambda i: self.lengths[i])
            batches += [alike[start : start + size] for start in range(0, len(alike), size)]
        *full, last = sorted(batches, key=len, reverse=True)  # a short batch must be last, or it would shift the others
        draw.shuffle(full)
        yield from (i for batch in (*full, last) for i in batch)
        yield from [len(self.lengths)] * self.blanks
