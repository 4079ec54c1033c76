"""The embedded engine: a transformers model in this process, batched.

Two things make it fast on a CPU. Requests about the same problem share the tokens of its text, so a batch computes
each shared prefix once and copies its keys and values to the rows that need it. And the key-value cache is one
preallocated block that attention reads in place, without growing, copying or repeating heads at every token.

Sampling is seeded by each request's own identity, so a row's answer does not depend on who shares its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stepladder import models, template
from stepladder.ask.request import Request, Response

if TYPE_CHECKING:
    import torch

ROWS = 96
"""Requests per batch: more rows multiply bigger matrices, until the cache no longer fits the processor's."""


class Row(NamedTuple):
    """A request and its prompt's token ids."""

    request: Request
    tokens: tuple[int, ...]


class Local:
    """A model folder, loaded, answering requests in batches.

    Args:
        folder: a Hugging Face folder; 4-bit folders are unpacked on loading.
    """

    def __init__(self, folder: Path) -> None:
        torch = models.import_torch()
        from stepladder.ask import decoding

        self._tokenizer = models.load_tokenizer(folder)
        self._model = models.load(folder).eval()
        self._decode = decoding.decode
        self._torch = torch
        ends = self._model.generation_config.eos_token_id
        self._ends = {self._tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def plan(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Batches of requests whose prompts begin alike, so that neighbours share a prefix."""
        rows = sorted(map(self._row, requests), key=lambda row: (row.request.max_tokens, row.tokens, row.request.key))
        batches: list[list[Request]] = []
        for row in rows:
            last = batches[-1] if batches else None
            if last is None or len(last) == ROWS or last[0].max_tokens != row.request.max_tokens:
                batches.append(last := [])
            last.append(row.request)
        return batches

    def answer(self, group: Sequence[Request]) -> list[Response]:
        """One response per request, in order."""
        rows = [self._row(request) for request in group]
        with self._torch.inference_mode():
            completions = self._decode(self._model, rows, self._ends)
        return [
            Response(
                text=self._tokenizer.decode(ids, skip_special_tokens=True).strip(),
                finished=finished,
                max_tokens=row.request.max_tokens,
                prompt_tokens=len(row.tokens),
                completion_tokens=len(ids),
            )
            for row, (ids, finished) in zip(rows, completions, strict=True)
        ]

    def _row(self, request: Request) -> Row:
        return Row(request, tuple(template.prompt_tokens(self._tokenizer, request.messages)))


class Group(NamedTuple):
    """Rows of a batch that begin with the same ``prefix`` tokens."""

    prefix: int
    rows: list[int]


def share_prefixes(prompts: Sequence[tuple[int, ...]]) -> list[Group]:
    """Group prompts that share at least half of their tokens; every row keeps one token of its own to continue from.

    A row without a partner gives all but the length of the others' own parts to its prefix, which keeps the padded
    block of own parts small.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    runs: list[Group] = []
    for i in order:
        if runs:
            length = min(_common(prompts[runs[-1].rows[0]], prompts[i]), runs[-1].prefix, len(prompts[i]) - 1)
            if 2 * length >= len(prompts[i]):
                runs[-1].rows.append(i)
                runs[-1] = Group(length, runs[-1].rows)
                continue
        runs.append(Group(len(prompts[i]) - 1, [i]))
    own = max((len(prompts[i]) - run.prefix for run in runs if len(run.rows) > 1 for i in run.rows), default=1)
    return [run if len(run.rows) > 1 else Group(max(1, len(prompts[run.rows[0]]) - own), run.rows) for run in runs]


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
