"""Batched decoding on a preallocated cache, with shared prefixes. Imports torch; only ask/local.py imports this.

A row's answer does not depend on its company, to the bit where the kernels allow it (docs/determinism.md). A token's
keys and values stand in the column of its position, whoever is beside it and however its prompt was split into shared
segments, and attention sums over columns from the first one on, so what is added behind them, all zeros, changes
nothing. Padding is written into a column that nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from stepladder.ask.request import Request
from stepladder.models.prefixes import share_prefixes
from stepladder.workspace import digest

ATTENTION = "stepladder_grouped"
COMPACT = 0.85  # share of rows still at work below which the others are dropped: dropping copies the cache
HIDDEN = -1e30  # finite: a fully hidden padding row must not become NaN
COLUMNS = 32  # attention reads whole multiples of so many columns, of which kernels make the same sums
TOKENS = 16  # computed at once at least, padding included: matrix products of fewer have kernels of their own
SCORES = 2**26  # attention scores that are held at once


@torch.inference_mode()
def decode(
    model: PreTrainedModel, requests: Sequence[Request], prompts: Sequence[tuple[int, ...]], ends: set[int]
) -> list[tuple[list[int], bool]]:
    """Completion ids of every request (the closing token left out) and whether it closed before its cap.

    Greedy at temperature 0, otherwise sampled with a generator seeded by the request's identity.
    """
    device = model.device
    cap = requests[0].max_tokens
    with _GroupedAttention(model):
        cache = _Block(model, torch.zeros(1, dtype=torch.long, device=device), 0)
        levels = share_prefixes(prompts)
        for level in levels:
            width = max(map(len, level.segments))
            room = width + (cap if level is levels[-1] else 0)
            cache = cache.spread(torch.tensor(level.parents, device=device), room)
            if width:  # a level may be empty: nothing in common
                logits = _forward(model, cache, level.segments)

        out: list[list[int]] = [[] for _ in requests]
        finished = [False] * len(requests)
        slots = list(range(len(requests)))  # which request each row of the cache belongs to
        draws = [_generator(request) for request in requests]
        for step in range(cap):
            tokens = _choose(logits, [(requests[i].temperature, draws[i]) for i in slots])
            for i, token in zip(slots, tokens, strict=True):
                finished[i] = finished[i] or token in ends
                if not finished[i]:
                    out[i].append(token)
            alive = [row for row, i in enumerate(slots) if not finished[i]]
            if not alive or step == cap - 1:
                break
            if len(alive) <= COMPACT * len(slots):
                cache.keep(torch.tensor(alive, device=device))
                slots, tokens = [slots[row] for row in alive], [tokens[row] for row in alive]
            logits = _forward(model, cache, [(token,) for token in tokens])
    return list(zip(out, finished, strict=True))


def _forward(model: PreTrainedModel, cache: _Block, segments: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Run a segment of tokens behind each row of the cache; logits of their last tokens, shape (rows, vocabulary)."""
    least = -(-TOKENS // len(segments))
    new = max(least, *map(len, segments))
    ids = torch.tensor([[0] * (new - len(segment)) + list(segment) for segment in segments]).to(model.device)
    counts = torch.tensor([len(segment) for segment in segments], device=model.device)
    offsets = torch.arange(new, device=model.device) - (new - counts)[:, None]  # padded on the left: below 0
    positions, mask = cache.place(offsets, counts, model.dtype)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=least,
    )
    logits: torch.Tensor = output.logits
    return logits[:, -1].float()


def _generator(request: Request) -> torch.Generator:
    seed = int(digest(request.identity())[:15], 16)
    return torch.Generator().manual_seed(seed)


def _choose(logits: torch.Tensor, how: Sequence[tuple[float, torch.Generator]]) -> list[int]:
    """The next token of every row."""
    greedy: list[int] = logits.argmax(-1).tolist()
    for row, (temperature, generator) in enumerate(how):
        if temperature > 0:
            chances = torch.softmax(logits[row].cpu() / temperature, -1)
            greedy[row] = int(torch.multinomial(chances, 1, generator=generator))
    return greedy


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer in a block of fixed width; reading is a view of its first columns."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, block: _Block) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block = block

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Hidden columns count for nothing, times what is in them: zeros, where memory as it comes may hold no numbers.
        shape = (len(self.block.lengths), key_states.shape[1], self.block.width + 1, key_states.shape[3])
        self.keys = key_states.new_zeros(shape)
        self.values = value_states.new_zeros(shape)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = torch.arange(len(key_states), device=key_states.device)[:, None]
        self.keys[rows, :, self.block.columns] = key_states.transpose(1, 2)
        self.values[rows, :, self.block.columns] = value_states.transpose(1, 2)
        return self.keys[:, :, : self.block.window], self.values[:, :, : self.block.window]

    def get_seq_length(self) -> int:
        return self.block.window

    def get_max_length(self) -> int:
        return self.block.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.block.window, 0


class _Block(Cache):
    """The cache of a batch: one block per layer, all filled to the same columns.

    Args:
        model: whose keys and values it holds.
        lengths: tokens that each row has.
        width: columns there is room for; behind them is one more, for padding.
    """

    def __init__(self, model: PreTrainedModel, lengths: torch.Tensor, width: int) -> None:
        self.model, self.lengths, self.width = model, lengths, -(-width // COLUMNS) * COLUMNS
        self.window = 0
        """Columns that are read."""
        self.columns = torch.zeros(len(lengths), 0, dtype=torch.long)
        """Where the tokens that are being computed go, shape (rows, new)."""
        self.blocks = [_Layer(self) for _ in range(model.config.num_hidden_layers)]
        super().__init__(layers=list(self.blocks))

    def place(
        self, offsets: torch.Tensor, counts: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make place for the tokens of a forward pass; their positions, and the mask to attend with.

        Args:
            at: which of its row's new tokens each one is, below 0 for padding, shape (rows, new).
            counts: new tokens of each row.
            dtype: of the mask.
        """
        positions = (self.lengths[:, None] + offsets).clamp(min=0)
        self.columns = torch.where(offsets < 0, self.width, positions)
        self.lengths = self.lengths + counts
        self.window = -(-int(self.lengths.max()) // COLUMNS) * COLUMNS
        hidden = torch.arange(self.window, device=offsets.device) > positions[:, None, :, None]
        return positions, torch.zeros(hidden.shape, dtype=dtype, device=offsets.device).masked_fill_(hidden, HIDDEN)

    def spread(self, parents: torch.Tensor, room: int) -> _Block:
        """A new cache whose row i begins with a copy of row ``parents[i]``, with room for more tokens."""
        new = _Block(self.model, self.lengths[parents], int(self.lengths.max()) + room)
        new.window = self.window
        if self.window:
            for mine, theirs in zip(new.blocks, self.blocks, strict=True):
                mine.lazy_initialization(theirs.keys, theirs.values)
                for copy, old in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                    copy[:, :, : self.window] = old[parents, :, : self.window]
        return new

    def keep(self, rows: torch.Tensor) -> None:
        """Drop the rows that are finished."""
        self.lengths = self.lengths[rows]
        for block in self.blocks:
            block.keys, block.values = block.keys[rows], block.values[rows]


class _GroupedAttention:
    """Within the block, the model attends with :func:`_attend`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.before = model, model.config._attn_implementation

    def __enter__(self) -> None:
        self.model.config._attn_implementation = ATTENTION

    def __exit__(self, *_: object) -> None:
        self.model.config._attn_implementation = self.before


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Grouped-query attention that reads the cache in place instead of repeating its heads.

    Shapes: query (rows, heads, new, size), key and value (rows, key heads, columns, size), mask (rows, 1, new,
    columns); returns (rows, new, heads, size).
    """
    rows, heads, new, size = query.shape
    kv, columns = key.shape[1:3]
    grouped = query.reshape(rows, kv, heads // kv, new, size)
    mixed = torch.empty_like(grouped)
    at_once = max(1, SCORES // (rows * heads * columns))
    for start in range(0, new, at_once):
        piece = slice(start, start + at_once)
        asking = grouped[:, :, :, piece]
        scores = torch.matmul(asking.flatten(2, 3), key.transpose(2, 3)) * scaling
        masked = scores.reshape(*asking.shape[:4], columns) + attention_mask[:, :, None, piece]
        weights = torch.softmax(masked, -1, dtype=torch.float32).to(query.dtype)
        mixed[:, :, :, piece] = torch.matmul(weights.flatten(2, 3), value).reshape(asking.shape)
    return mixed.reshape(rows, heads, new, size).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
