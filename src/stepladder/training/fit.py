"""How well a chain fits a student that has not learned it: how surprising its tokens are, and how high they rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stepladder import models
from stepladder.config import Dtype
from stepladder.models.layerwise import Layerwise
from stepladder.training.sequences import TokenRow

if TYPE_CHECKING:
    import torch

MAX_RANK = 100
"""A token of a lower rank counts as of this one: a few very rare words would decide otherwise."""
CHUNK_TOKENS = 100_000
"""Tokens whose hidden states are in memory together, 1 GB with a 32B student; weights are read once for each chunk."""


class Fit(NamedTuple):
    """What a student thinks of a chain, as means over its tokens."""

    surprisal: float
    """Negative log-likelihood, nats."""
    rank: float
    """Words that are at least as likely, 1 for the likeliest, at most :data:`MAX_RANK`."""

    @property
    def ratio(self) -> float:
        """Rank-surprisal ratio: low where a chain says something new in words that the student might have used (Yang
        and others 2026, arXiv 2601.14249)."""
        return self.rank / max(self.surprisal, 1e-6)


def fits(
    folder: Path, rows: Sequence[TokenRow], dtype: Dtype, report: Callable[[int, int], None] = lambda *_: None
) -> list[Fit]:
    """The fit of each row's completion to a model, whose weights are in memory one layer at a time.

    Args:
        folder: the model's.
        rows: the conversations.
        dtype: number format to compute in.
        report: is given the number of rows that are done, and of all.
    """
    if not rows:
        return []
    models.require()
    model, done = Layerwise(folder, dtype), list[Fit]()
    for chunk in _chunks(rows):
        report(len(done), len(rows))
        hidden = model.hidden_states([row.ids for row in chunk])
        scored = [row.scored for row in chunk]
        for row, log_probabilities in zip(chunk, model.log_probabilities(hidden, scored), strict=True):
            done.append(_fit(log_probabilities, row.ids[row.prompt_length :]))
    return done


def _chunks(rows: Sequence[TokenRow]) -> Iterator[list[TokenRow]]:
    chunk: list[TokenRow] = []
    tokens = 0
    for row in rows:
        if chunk and tokens + len(row.ids) > CHUNK_TOKENS:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(row)
        tokens += len(row.ids)
    if chunk:
        yield chunk


def _fit(log_probabilities: torch.Tensor, ids: Sequence[int]) -> Fit:
    import torch

    own = log_probabilities.gather(1, torch.tensor(ids, device=log_probabilities.device)[:, None])
    ranks = (log_probabilities >= own).sum(1).clamp(max=MAX_RANK)
    return Fit(surprisal=-float(own.mean()), rank=float(ranks.float().mean()))
