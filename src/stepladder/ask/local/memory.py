"""The memory that a batch of the embedded engine takes beside the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_SCORES = 2**26
"""Attention scores computed at once."""
SCORE_BYTES = 12
"""Of an attention score: as it is computed, with the mask added, and as a weight; float32 each."""
BATCH_SHARE = 0.8
"""Of the free memory, for a batch; the rest is for gaps between tensors, and for others."""


def rows_that_fit(
    config: PretrainedConfig, free_bytes: float, prompt_tokens: int, max_tokens: int, bytes_each: int
) -> int:
    """Requests that a batch may have, at least 1.

    Args:
        config: of a model like Llama and Qwen2.
        free_bytes: memory that is free, beside the weights.
        prompt_tokens: of the longest prompt in the batch.
        max_tokens: most tokens of an answer.
        bytes_each: of a key, a value and an activation: 2 in bfloat16, 4 in float32.
    """
    heads, hidden = config.num_attention_heads, config.hidden_size
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    cache = (prompt_tokens + max_tokens) * 2 * config.num_hidden_layers * kv_heads * head_dim
    # While the prompt is read: a layer's input, its norm and output; queries and attention's output; gate, up, product;
    # and the mask.
    reading = prompt_tokens * (3 * hidden + 2 * heads * head_dim + 3 * intermediate + prompt_tokens)
    logits = config.vocab_size * (bytes_each + 8)  # also in float32, and as probabilities
    row = (cache + reading) * bytes_each + logits
    scores = heads * prompt_tokens**2 * SCORE_BYTES
    budget = BATCH_SHARE * free_bytes
    return max(1, int(budget / (row + scores)), int((budget - MAX_SCORES * SCORE_BYTES) / row))
