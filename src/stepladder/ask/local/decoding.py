"""Batched decoding with shared prefixes on a preallocated cache. Imports torch, so ask/local/engine.py imports it late.

An answer does not depend on the other rows of its batch, bit for bit on a CPU (docs/determinism.md).
A token's keys and values are in the column of its position, whatever the other rows hold and however its prompt was
split into shared segments. Attention sums over the columns from the first one on, so further columns, which add zeros,
do not change the result. Padding is written into a column that is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LogitsProcessor,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from stepladder.ask.local.memory import MAX_SCORES
from stepladder.ask.loops import goes_in_circles
from stepladder.ask.request import Request
from stepladder.models.prefixes import share_prefixes
from stepladder.models.products import IndependentRows
from stepladder.workspace import digest

ATTENTION = "stepladder_grouped"
COMPACT_SHARE = 0.85
"""Finished rows are dropped, which copies the cache, when at most this share of the rows is unfinished."""
MASKED_SCORE = -1e30
"""Finite, so that a padding row in which everything is masked does not become NaN."""
COLUMN_MULTIPLE = 32
"""Attention reads a multiple of so many columns, over which kernels sum in the same order."""
MIN_TOKENS = 16
"""Tokens of a forward pass, padding included: matrix products of fewer use other kernels."""


@torch.inference_mode()
def decode(
    model: PreTrainedModel, requests: Sequence[Request], prompts: Sequence[tuple[int, ...]], ends: set[int]
) -> list[tuple[list[int], bool]]:
    """Decode a batch of requests with the same ``max_tokens``.

    Greedy at temperature 0, otherwise sampled with a generator seeded by the request's identity.

    Args:
        model: the model.
        requests: the requests.
        prompts: token ids of their prompts.
        ends: ids of the tokens that end an answer.

    Returns:
        For every request the token ids of its answer, without the closing token, and whether it was finished: not cut
        at its cap, or because it went in circles.
    """
    device = model.device
    cap = requests[0].max_tokens
    with _GroupedAttention(model), IndependentRows():
        cache, logits = _read(model, prompts, cap)
        completions: list[list[int]] = [[] for _ in requests]
        finished, ended = [False] * len(requests), [False] * len(requests)
        request_of_row = list(range(len(requests)))
        generators = [_generator(request, device) for request in requests]
        for step in range(cap):
            tokens = _choose(logits, [(requests[i], generators[i]) for i in request_of_row])
            for i, token in zip(request_of_row, tokens, strict=True):
                if ended[i]:
                    continue
                if token in ends:
                    finished[i] = ended[i] = True
                else:
                    completions[i].append(token)
                    ended[i] = goes_in_circles(completions[i])
            unfinished = [row for row, i in enumerate(request_of_row) if not ended[i]]
            if not unfinished or step == cap - 1:
                break
            if len(unfinished) <= COMPACT_SHARE * len(request_of_row):
                cache.keep(torch.tensor(unfinished, device=device))
                request_of_row = [request_of_row[row] for row in unfinished]
                tokens = [tokens[row] for row in unfinished]
            logits = _forward(model, cache, [(token,) for token in tokens])
    return list(zip(completions, finished, strict=True))


@torch.inference_mode()
def next_token_logits(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Logits of the token after each prompt, float32, shape (prompts, vocabulary)."""
    with _GroupedAttention(model), IndependentRows():
        return _read(model, prompts, 0)[1]


def _read(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], room: int) -> tuple[_Block, torch.Tensor]:
    """Read prompts, each shared prefix once. Returns a cache with a row for each prompt and room for so many more
    tokens, and the logits of their last tokens, shape (prompts, vocabulary)."""
    cache = _Block(model, torch.zeros(1, dtype=torch.long, device=model.device), 0)
    levels = share_prefixes(prompts)
    for level in levels:
        width = max(map(len, level.segments))
        more = room if level is levels[-1] else 0
        cache = cache.spread(torch.tensor(level.parents, device=model.device), width + more)
        if width:  # the first level is empty where the prompts have nothing in common
            logits = _forward(model, cache, level.segments)
    return cache, logits


def _forward(model: PreTrainedModel, cache: _Block, segments: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Append a segment of tokens to each row of the cache. Returns the logits of their last tokens, shape (rows,
    vocabulary)."""
    min_width = -(-MIN_TOKENS // len(segments))
    width = max(min_width, *map(len, segments))
    ids = torch.tensor([[0] * (width - len(segment)) + list(segment) for segment in segments]).to(model.device)
    counts = torch.tensor([len(segment) for segment in segments], device=model.device)
    offsets = torch.arange(width, device=model.device) - (width - counts)[:, None]  # below 0 for padding, on the left
    positions, mask = cache.columns.place(offsets, counts, model.dtype)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=min_width,
    )
    logits: torch.Tensor = output.logits
    return logits[:, -1].float()


def _generator(request: Request, device: torch.device) -> torch.Generator:
    seed = int(digest(request.identity())[:15], 16)
    return torch.Generator(device).manual_seed(seed)


def _choose(logits: torch.Tensor, sampling: Sequence[tuple[Request, torch.Generator]]) -> list[int]:
    """The next token of every row, by its request's sampling settings and its generator. Only tokens leave the device,
    not logits."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, (request, generator) in enumerate(sampling):
        if request.temperature > 0:
            scores = logits[row : row + 1] / request.temperature
            for limit in _limits(request):
                scores = limit(torch.empty(1, 0, dtype=torch.long, device=scores.device), scores)
            tokens[row] = int(torch.multinomial(torch.softmax(scores[0], -1), 1, generator=generator))
    return tokens


def _limits(request: Request) -> list[LogitsProcessor]:
    """What limits the tokens that are drawn from, in the order in which vLLM and transformers apply it."""
    limits: list[LogitsProcessor] = []
    if request.top_k is not None:
        limits.append(TopKLogitsWarper(request.top_k))
    if request.top_p is not None and request.top_p < 1:
        limits.append(TopPLogitsWarper(request.top_p))
    return limits


class _Columns:
    """Which columns of its cache every row has filled.

    Args:
        lengths: tokens in each row, shape (rows,).
        width: columns to allocate, rounded up; one more is added for padding.
    """

    def __init__(self, lengths: torch.Tensor, width: int) -> None:
        self.lengths, self.width = lengths, -(-width // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        self.window = 0
        """Number of columns that attention reads."""
        self.current = torch.zeros(len(lengths), 0, dtype=torch.long)
        """Columns of the tokens of the current forward pass, shape (rows, width)."""

    def place(
        self, offsets: torch.Tensor, counts: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Assign columns to the tokens of a forward pass. Returns their positions, shape (rows, width), and the
        attention mask, shape (rows, 1, width, window).

        Args:
            offsets: index of each token among the new ones of its row, below 0 for padding, shape (rows, width).
            counts: number of new tokens in each row, shape (rows,).
            dtype: of the mask.
        """
        positions = (self.lengths[:, None] + offsets).clamp(min=0)
        self.current = torch.where(offsets < 0, self.width, positions)
        self.lengths = self.lengths + counts
        self.window = -(-int(self.lengths.max()) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        masked = torch.arange(self.window, device=offsets.device) > positions[:, None, :, None]
        mask = torch.zeros(masked.shape, dtype=dtype, device=offsets.device)
        return positions, mask.masked_fill_(masked, MASKED_SCORE)


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer in a block of fixed width, read as a view of its first columns."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, columns: _Columns) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.columns = columns

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros: masked columns have weight 0, but 0 times NaN, which fresh memory may hold, is NaN.
        shape = (len(self.columns.lengths), key_states.shape[1], self.columns.width + 1, key_states.shape[3])
        self.keys = key_states.new_zeros(shape)
        self.values = value_states.new_zeros(shape)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = torch.arange(len(key_states), device=key_states.device)[:, None]
        self.keys[rows, :, self.columns.current] = key_states.transpose(1, 2)
        self.values[rows, :, self.columns.current] = value_states.transpose(1, 2)
        window = self.columns.window
        return self.keys[:, :, :window], self.values[:, :, :window]

    def take(self, source: _Layer, rows: torch.Tensor, window: int) -> None:
        """Begin row i with the first ``window`` columns of row ``rows[i]`` of a layer, which is empty afterwards."""
        self.lazy_initialization(source.keys, source.values)
        self.keys[:, :, :window] = source.keys[rows, :, :window]
        self.values[:, :, :window] = source.values[rows, :, :window]
        del source.keys, source.values

    def get_seq_length(self) -> int:
        return self.columns.window

    def get_max_length(self) -> int:
        return self.columns.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns.window, 0


class _Block(Cache):
    """The key-value cache of a batch: one block per layer, all filled to the same columns.

    No layer refers to it, so that its memory is free as soon as nobody uses it.
    """

    def __init__(self, model: PreTrainedModel, lengths: torch.Tensor, width: int) -> None:
        self.model, self.columns = model, _Columns(lengths, width)
        self.blocks = [_Layer(self.columns) for _ in range(model.config.num_hidden_layers)]
        super().__init__(layers=list(self.blocks))

    def spread(self, parents: torch.Tensor, room: int) -> _Block:
        """A cache whose row i begins with row ``parents[i]`` of this one, and has ``room`` for more tokens. It takes
        this one's place layer by layer, so that there are never two whole ones."""
        lengths, window = self.columns.lengths, self.columns.window
        wider = _Block(self.model, lengths[parents], int(lengths.max()) + room)
        wider.columns.window = window
        if window:
            for target, source in zip(wider.blocks, self.blocks, strict=True):
                target.take(source, parents, window)
        return wider

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows."""
        self.columns.lengths = self.columns.lengths[rows]
        for block in self.blocks:
            block.keys, block.values = block.keys[rows], block.values[rows]


class _GroupedAttention:
    """Context manager in which the model attends with :func:`_attend`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.previous = model, model.config._attn_implementation

    def __enter__(self) -> None:
        self.model.config._attn_implementation = ATTENTION

    def __exit__(self, *_: object) -> None:
        self.model.config._attn_implementation = self.previous


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

    Shapes: query (rows, heads, width, size), key and value (rows, key heads, columns, size), mask (rows, 1, width,
    columns); returns (rows, width, heads, size).
    """
    rows, heads, width, size = query.shape
    kv_heads, columns = key.shape[1:3]
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, width, size)
    output = torch.empty_like(grouped)
    chunk_width = max(1, MAX_SCORES // (rows * heads * columns))
    for start in range(0, width, chunk_width):
        chunk = slice(start, start + chunk_width)
        queries = grouped[:, :, :, chunk]
        scores = torch.matmul(queries.flatten(2, 3), key.transpose(2, 3)) * scaling
        masked = scores.reshape(*queries.shape[:4], columns) + attention_mask[:, :, None, chunk]
        weights = torch.softmax(masked, -1, dtype=torch.float32).to(query.dtype)
        output[:, :, :, chunk] = torch.matmul(weights.flatten(2, 3), value).reshape(queries.shape)
    return output.reshape(rows, heads, width, size).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
