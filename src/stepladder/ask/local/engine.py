"""The embedded engine: a transformers model in this process, batched.

Two things make it fast on a CPU. Requests about the same problem share the tokens of its text, so a batch computes
each shared prefix once and copies its keys and values to the rows that need it. And the key-value cache is one
preallocated block that attention reads in place, without growing, copying or repeating heads at every token.

Who shares a request's batch changes nothing in its answer: sampling is seeded by the request's own identity, and
``decoding`` computes every row alike.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from stepladder import models
from stepladder.ask.request import Request, Response, TokenLogprob
from stepladder.config import Dtype
from stepladder.errors import AskError
from stepladder.models import template
from stepladder.models.prefixes import share_prefixes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 128
"""Requests per batch. Every token step reads all weights once, so more rows share that; the cache of 128 rows of 200
tokens takes 1.2 GB for the bundled model."""


class Prompt(NamedTuple):
    """A request and its prompt's token ids."""

    request: Request
    tokens: tuple[int, ...]


class Local:
    """A loaded model, answering requests in batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        from stepladder.ask.local import decoding

        self._tokenizer, self._model = tokenizer, model
        self._decode = decoding.decode
        ends = model.generation_config.eos_token_id
        end_tokens = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._ends = end_tokens | {template.closing_token(tokenizer)}

    @classmethod
    def load(cls, folder: Path, dtype: Dtype = "auto") -> Local:
        """A Hugging Face folder, ready to compute in ``dtype``; 4-bit folders are unpacked.

        Raises:
            ModelError: its files are not a model, or are damaged.
            TemplateError: the folder's tokenizer is not the one its weights were trained with.
        """
        tokenizer = models.load_tokenizer(folder)
        template.check_folder(tokenizer, folder)
        return cls(tokenizer, models.load(folder, dtype))

    def plan(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Batches of requests that share problems and have prompts of like length, so that little is padding.

        Raises:
            AskError: a request wants log-probabilities of more than one token, which only servers give.
        """
        if any(request.top_logprobs is not None and request.max_tokens > 1 for request in requests):
            raise AskError("weights in this process give log-probabilities of one token only; serve them for more")
        rows = sorted(map(self._row, requests), key=lambda row: (row.request.max_tokens, row.tokens, row.request.key))
        batches: list[list[Request]] = []
        for _, with_cap in itertools.groupby(rows, key=lambda row: row.request.max_tokens):
            same_cap = list(with_cap)
            neighbours: dict[int, list[Prompt]] = defaultdict(list)
            for row, parent in zip(same_cap, share_prefixes([row.tokens for row in same_cap])[-1].parents, strict=True):
                neighbours[parent].append(row)
            groups = sorted(neighbours.values(), key=lambda group: max(len(row.tokens) for row in group))
            ordered = [row.request for group in groups for row in group]
            size = math.ceil(len(ordered) / math.ceil(len(ordered) / ROWS))  # no small batch at the end
            batches += [ordered[start : start + size] for start in range(0, len(ordered), size)]
        return batches

    def answer(self, group: Sequence[Request]) -> list[Response]:
        """One response per request, in order."""
        if any(request.top_logprobs is not None for request in group):
            return [self._weigh(request) for request in group]
        rows = [self._row(request) for request in group]
        completions = self._decode(self._model, group, [row.tokens for row in rows], self._ends)
        return [
            Response(
                text=cast("str", self._tokenizer.decode(ids, skip_special_tokens=True)).strip(),
                finish="stop" if finished else "length",
                max_tokens=row.request.max_tokens,
                prompt_tokens=len(row.tokens),
                completion_tokens=len(ids),
            )
            for row, (ids, finished) in zip(rows, completions, strict=True)
        ]

    def _weigh(self, request: Request) -> Response:
        """The likeliest next token and how likely it and others are."""
        import torch

        ids = self._row(request).tokens
        with torch.inference_mode():
            logits = self._model(torch.tensor([ids], device=self._model.device), logits_to_keep=1).logits[0, -1]
        top = torch.log_softmax(logits.float(), -1).topk(max(1, request.top_logprobs or 0))
        names = [str(self._tokenizer.decode([int(number)])) for number in top.indices]
        likely = dict(zip(names, map(float, top.values), strict=False))
        return Response(
            text=names[0],
            finish="length",
            max_tokens=1,
            prompt_tokens=len(ids),
            completion_tokens=1,
            logprobs=(TokenLogprob(token=names[0], logprob=float(top.values[0]), top=likely),),
        )

    def _row(self, request: Request) -> Prompt:
        """The request's prompt as tokens; a last message of the assistant's is gone on with."""
        messages = request.messages
        if messages[-1].role != "assistant":
            return Prompt(request, tuple(template.prompt_tokens(self._tokenizer, messages)))
        begun = self._tokenizer(messages[-1].content, add_special_tokens=False)["input_ids"]
        return Prompt(request, (*template.prompt_tokens(self._tokenizer, messages[:-1]), *begun))
