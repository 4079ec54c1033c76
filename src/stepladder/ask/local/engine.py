"""The embedded engine: a transformers model in this process, batched.

Two things make it fast on a CPU. Requests about the same problem share the tokens of its text, so a batch computes
each shared prefix once and copies its keys and values to the rows that need it. And the key-value cache is one
preallocated block that attention reads in place, without growing, copying or repeating heads at every token.

An answer does not depend on the other requests in its batch: sampling is seeded by the request's identity, and
``decoding`` computes every row the same way.
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

BATCH_SIZE = 128
"""Requests in a batch. Every decoding step reads all weights once for the whole batch; the cache of 128 rows of 200
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
        """Load a Hugging Face model folder to compute in ``dtype``; 4-bit weights are unpacked.

        Raises:
            ModelError: the folder is not a model, or is damaged.
            TemplateError: the folder's tokenizer is not the one its weights were trained with.
        """
        tokenizer = models.load_tokenizer(folder)
        template.check_folder(tokenizer, folder)
        return cls(tokenizer, models.load(folder, dtype))

    def plan(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Split requests into batches that share prefixes and have prompts of similar length, so that there is little
        padding.

        Raises:
            AskError: a request asks for log-probabilities of more than one token, which only servers return.
        """
        if any(request.top_logprobs is not None and request.max_tokens > 1 for request in requests):
            raise AskError(
                "weights in this process return log-probabilities of one token only; for more, ask a server of them"
            )
        prompts = sorted(map(self._prompt, requests), key=lambda p: (p.request.max_tokens, p.tokens, p.request.key))
        batches: list[list[Request]] = []
        for _, with_cap in itertools.groupby(prompts, key=lambda prompt: prompt.request.max_tokens):
            same_cap = list(with_cap)
            parents = share_prefixes([prompt.tokens for prompt in same_cap])[-1].parents
            by_prefix: dict[int, list[Prompt]] = defaultdict(list)
            for prompt, parent in zip(same_cap, parents, strict=True):
                by_prefix[parent].append(prompt)
            groups = sorted(by_prefix.values(), key=lambda group: max(len(prompt.tokens) for prompt in group))
            ordered = [prompt.request for group in groups for prompt in group]
            batch_count = math.ceil(len(ordered) / BATCH_SIZE)
            size = math.ceil(len(ordered) / batch_count)  # equal sizes, no small batch at the end
            batches += [ordered[start : start + size] for start in range(0, len(ordered), size)]
        return batches

    def answer(self, group: Sequence[Request]) -> list[Response]:
        """One response per request, in order."""
        if any(request.top_logprobs is not None for request in group):
            return [self._next_token(request) for request in group]
        prompts = [self._prompt(request) for request in group]
        completions = self._decode(self._model, group, [prompt.tokens for prompt in prompts], self._ends)
        return [
            Response(
                text=cast("str", self._tokenizer.decode(ids, skip_special_tokens=True)).strip(),
                finish="stop" if finished else "length",
                max_tokens=prompt.request.max_tokens,
                prompt_tokens=len(prompt.tokens),
                completion_tokens=len(ids),
            )
            for prompt, (ids, finished) in zip(prompts, completions, strict=True)
        ]

    def _next_token(self, request: Request) -> Response:
        """The most likely next token, with the log-probabilities of the ``top_logprobs`` most likely ones."""
        import torch

        ids = self._prompt(request).tokens
        with torch.inference_mode():
            logits = self._model(torch.tensor([ids], device=self._model.device), logits_to_keep=1).logits[0, -1]
        top = torch.log_softmax(logits.float(), -1).topk(max(1, request.top_logprobs or 0))
        tokens = [str(self._tokenizer.decode([int(token_id)])) for token_id in top.indices]
        logprobs = dict(zip(tokens, map(float, top.values), strict=False))
        return Response(
            text=tokens[0],
            finish="length",
            max_tokens=1,
            prompt_tokens=len(ids),
            completion_tokens=1,
            logprobs=(TokenLogprob(token=tokens[0], logprob=float(top.values[0]), top=logprobs),),
        )

    def _prompt(self, request: Request) -> Prompt:
        """The request with its prompt's token ids."""
        return Prompt(request, tuple(template.prompt_tokens(self._tokenizer, request.messages)))
