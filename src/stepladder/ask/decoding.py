"""Batched decoding on a preallocated cache, with shared prefixes. Imports torch; only ask/local.py imports this.

Columns of the cache are laid out ``[common | neighbours' | own | completion]``, each segment padded on the left; what a
row may see is a mask over columns, and positions count visible columns, so padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from stepladder.ask.request import Request
from stepladder.prefixes import share_prefixes
from stepladder.workspace import digest

ATTENTION = "stepladder_grouped"
COMPACT = 0.85  # share of rows still at work below which the others are dropped: dropping copies the cache
HIDDEN = -1e30  # finite: a fully hidden padding row must not become NaN


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
        cache, visible = _Block(model, 1, 0), torch.zeros(1, 0, dtype=torch.bool, device=device)
        levels = share_prefixes(prompts)
        for level in levels:
            ids, real = _pad(level.segments, device)
            parents = torch.tensor(level.parents, device=device)
            room = cap if level is levels[-1] else 0
            cache = cache.spread(parents, ids.shape[1] + room)
            visible = torch.cat([visible[parents], real], 1)
            if ids.shape[1]:  # a level may be empty: nothing in common
                logits = _forward(model, ids, cache, visible)
        visible = torch.nn.functional.pad(visible, (0, cap), value=True)

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
            alive = [at for at, i in enumerate(slots) if not finished[i]]
            if not alive or step == cap - 1:
                break
            if len(alive) <= COMPACT * len(slots):
                index = torch.tensor(alive, device=device)
                cache.keep(index)
                visible = visible[index]
                slots, tokens = [slots[at] for at in alive], [tokens[at] for at in alive]
            ids = torch.tensor(tokens, device=device).unsqueeze(1)
            logits = _forward(model, ids, cache, visible[:, : cache.length + 1])
    return list(zip(out, finished, strict=True))


def _pad(segments: Sequence[tuple[int, ...]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and which of them are real, both of shape (segments, longest)."""
    width = max(map(len, segments))
    ids = torch.tensor([[0] * (width - len(segment)) + list(segment) for segment in segments], dtype=torch.long)
    marks = [[False] * (width - len(segment)) + [True] * len(segment) for segment in segments]
    real = torch.tensor(marks, dtype=torch.bool)
    return ids.to(device), real.to(device)


def _forward(model: PreTrainedModel, ids: torch.Tensor, cache: _Block, visible: torch.Tensor) -> torch.Tensor:
    """Run ``ids`` (rows, new) behind the cached columns; logits of the last column, shape (rows, vocabulary).

    ``visible`` (rows, cached + new) says which columns hold a token.
    """
    start, new = cache.length, ids.shape[1]
    columns = torch.arange(start + new, device=ids.device)
    causal = columns[None, :] <= columns[start:, None]
    mask = torch.zeros(ids.shape[0], 1, new, start + new, dtype=model.dtype, device=ids.device)
    mask.masked_fill_(~(causal[None, None] & visible[:, None, None, :]), HIDDEN)
    positions = (visible.cumsum(1) - 1).clamp(min=0)[:, start:]
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: torch.Tensor = output.logits
    return logits[:, -1].float()


def _generator(request: Request) -> torch.Generator:
    seed = int(digest(request.identity())[:15], 16)
    return torch.Generator().manual_seed(seed)


def _choose(logits: torch.Tensor, how: Sequence[tuple[float, torch.Generator]]) -> list[int]:
    """The next token of every row."""
    greedy: list[int] = logits.argmax(-1).tolist()
    for at, (temperature, generator) in enumerate(how):
        if temperature > 0:
            chances = torch.softmax(logits[at].cpu() / temperature, -1)
            greedy[at] = int(torch.multinomial(chances, 1, generator=generator))
    return greedy


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer in a block of fixed width; reading is a view of the filled columns."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows, self.width, self.length = rows, width, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = (self.rows, key_states.shape[1], self.width, key_states.shape[3])
        self.keys = key_states.new_empty(shape)
        self.values = value_states.new_empty(shape)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


class _Block(Cache):
    """The cache of a batch: one block per layer."""

    def __init__(self, model: PreTrainedModel, rows: int, width: int) -> None:
        self.model = model
        self.blocks = [_Layer(rows, width) for _ in range(model.config.num_hidden_layers)]
        super().__init__(layers=list(self.blocks))

    @property
    def length(self) -> int:
        """Columns filled so far."""
        return self.blocks[0].length

    def spread(self, parents: torch.Tensor, room: int) -> _Block:
        """A new cache whose row i begins with a copy of row ``parents[i]``, with room for more columns."""
        new = _Block(self.model, len(parents), self.length + room)
        if self.length:
            for mine, theirs in zip(new.blocks, self.blocks, strict=True):
                mine.update(theirs.keys[parents, :, : self.length], theirs.values[parents, :, : self.length])
        return new

    def keep(self, rows: torch.Tensor) -> None:
        """Drop the rows that are finished."""
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
    """Grouped-query attention that, token by token, reads the cache in place instead of repeating its heads.

    Shapes: query (rows, heads, new, size), key and value (rows, key heads, columns, size), mask (rows, 1, new,
    columns); returns (rows, new, heads, size).
    """
    rows, heads, new, size = query.shape
    kv = key.shape[1]
    if new > 1:  # a prompt: many queries share the cost of repeating the heads
        keys, values = (states.repeat_interleave(heads // kv, 1) for states in (key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attention_mask, scale=scaling)
        return mixed.transpose(1, 2), None
    grouped = query.reshape(rows, kv, heads // kv, size)
    scores = torch.matmul(grouped, key.transpose(2, 3)) * scaling + attention_mask
    mixed = torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), value)
    return mixed.reshape(rows, 1, heads, size), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
