"""The KL divergence between two models' next-token distributions on the same conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepladder import models
from stepladder.config import Dtype
from stepladder.documents import Distance
from stepladder.models.layerwise import Layerwise
from stepladder.records import Example
from stepladder.training.sequences import TokenRow, tokenise

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MAX_COMPARED_TOKENS = 1024
"""Limit on compared completion tokens; with a vocabulary of 150,000 their distributions take 0.6 GB."""


def rows_of(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> list[TokenRow]:
    """The first conversations, tokenised: at least one, and at most :data:`MAX_COMPARED_TOKENS` completion tokens."""
    rows: list[TokenRow] = []
    remaining = MAX_COMPARED_TOKENS
    for row in tokenise(tokenizer, examples, max_length):
        remaining -= len(row.ids) - row.prompt_length
        if rows and remaining < 0:
            break
        rows.append(row)
    return rows


def next_token_log_probabilities(
    folder: Path, rows: Sequence[TokenRow], dtype: Dtype = "auto", adapter: Path | None = None
) -> torch.Tensor:
    """Log-probabilities over the vocabulary at every completion token of the rows, shape (tokens, vocabulary),
    float32 on the CPU.

    Args:
        folder: the model's, whose weights are in memory one layer at a time (models/layerwise.py).
        rows: the conversations.
        dtype: number format to compute in.
        adapter: folder of a LoRA adapter on the model.
    """
    models.require()
    import torch

    model = Layerwise(folder, dtype, adapter)
    hidden = model.hidden_states([row.ids for row in rows])
    scored = [row.scored for row in rows]
    log_probabilities = torch.empty(sum(map(len, scored)), model.model.config.get_text_config().vocab_size)
    start = 0
    for part in model.log_probabilities(hidden, scored):
        log_probabilities[start : start + len(part)] = part
        start += len(part)
    return log_probabilities


def compare(first: torch.Tensor, second: torch.Tensor) -> Distance:
    """The distance between two results of :func:`next_token_log_probabilities` on the same rows."""
    import torch

    divergences, same = [], 0
    for first_rows, second_rows in zip(torch.split(first, 64), torch.split(second, 64), strict=True):
        divergences.append((first_rows.exp() * (first_rows - second_rows)).sum(-1))
        same += int((first_rows.argmax(-1) == second_rows.argmax(-1)).sum())
    kl = torch.cat(divergences)
    return Distance(tokens=len(kl), kl=float(kl.mean()), same=same / len(kl), largest=float(kl.max()))
