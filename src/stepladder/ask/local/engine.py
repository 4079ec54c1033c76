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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

from stepladder import models
from stepladder.ask.local.memory import rows_that_fit
from stepladder.ask.request import Request, Response, TokenLogprob
from stepladder.config import Dtype
from stepladder.errors import AskError
from stepladder.models import template
from stepladder.models.free_memory import free_where_computed
from stepladder.models.prefixes import share_prefixes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 128
"""Most requests in a batch; fewer where memory does not hold as many. Every decoding step reads all weights once for
the whole batch; the cache of 128 rows of 200 tokens takes 1.2 GB for the bundled model."""
REFUSALS = ("out of memory", "can't allocate memory", "not enough memory")
"""What PyTorch's allocators say, in lower case, where they get no memory."""


T = TypeVar("T")


class Prompt(NamedTuple):
    """A request and its prompt's token ids."""

    request: Request
    tokens: tuple[int, ...]


class Local:
    """A loaded model, answering requests in batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        from stepladder.ask.local import decoding

        self._tokenizer, self._model = tokenizer, model
        self._max_rows = BATCH_SIZE
        """Fewer once memory was refused for a batch."""
        self._decode, self._next_token_logits = decoding.decode, decoding.next_token_logits
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
        padding; as many requests in a batch as the free memory holds (ask/local/memory.py).

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
            longest = max(len(prompt.tokens) for prompt in same_cap)
            batch_count = math.ceil(len(ordered) / self._rows_that_fit(longest, ordered[0].max_tokens))
            size = math.ceil(len(ordered) / batch_count)  # equal sizes, no small batch at the end
            batches += [ordered[start : start + size] for start in range(0, len(ordered), size)]
        return batches

    def answer(self, group: Sequence[Request]) -> list[Response]:
        """One response per request, in order. A batch that memory is refused for is halved, as are those after it.

        Raises:
            AskError: memory does not hold a single request.
        """
        prompts = [self._prompt(request) for request in group]
        if any(request.top_logprobs is not None for request in group):
            return self._computed(self._next_tokens, prompts)
        completions = self._computed(self._complete, prompts)
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

    def _rows_that_fit(self, prompt_tokens: int, max_tokens: int) -> int:
        """Requests that the free memory holds at once, from 1 to :data:`BATCH_SIZE`."""
        if (free_bytes := free_where_computed()) is None:
            return BATCH_SIZE
        bytes_each = self._model.dtype.itemsize
        fitting = rows_that_fit(self._model.config, free_bytes, prompt_tokens, max_tokens, bytes_each)
        return min(BATCH_SIZE, fitting)

    def _computed(self, compute: Callable[[Sequence[Prompt]], list[T]], prompts: Sequence[Prompt]) -> list[T]:
        """What ``compute`` gives for every prompt, in batches for which there is memory."""
        if len(prompts) <= self._max_rows:
            try:
                return compute(prompts)
            except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
                if not isinstance(error, MemoryError) and not any(said in str(error).lower() for said in REFUSALS):
                    raise
            # Not in the handler: while it runs, the error's traceback keeps the batch's tensors.
            self._max_rows = len(prompts) // 2
            if self._max_rows == 0:
                raise AskError(
                    f"a prompt of {len(prompts[0].tokens):,} tokens and its answer (max_tokens = "
                    f"{prompts[0].request.max_tokens}) do not fit the free memory, alone in a batch; end other "
                    "programs, lower max_tokens, or answer by vLLM"
                )
            _give_back_memory()
        half = math.ceil(len(prompts) / 2)
        return [*self._computed(compute, prompts[:half]), *self._computed(compute, prompts[half:])]

    def _complete(self, prompts: Sequence[Prompt]) -> list[tuple[list[int], bool]]:
        """For every prompt the token ids of its answer, and whether it ended before its cap."""
        requests, tokens = [prompt.request for prompt in prompts], [prompt.tokens for prompt in prompts]
        return self._decode(self._model, requests, tokens, self._ends)

    def _next_tokens(self, prompts: Sequence[Prompt]) -> list[Response]:
        """The most likely next tokens, with the log-probabilities of the ``top_logprobs`` most likely ones."""
        logits = self._next_token_logits(self._model, [prompt.tokens for prompt in prompts])
        counts = [max(1, prompt.request.top_logprobs or 0) for prompt in prompts]
        likeliest, ids = logits.log_softmax(-1).topk(max(counts))
        responses = []
        for prompt, count, logprobs, token_ids in zip(prompts, counts, likeliest.tolist(), ids.tolist(), strict=True):
            tokens = [str(self._tokenizer.decode([token_id])) for token_id in token_ids[:count]]
            top = dict(zip(tokens, logprobs, strict=False))
            responses.append(
                Response(
                    text=tokens[0],
                    finish="length",
                    max_tokens=1,
                    prompt_tokens=len(prompt.tokens),
                    completion_tokens=1,
                    logprobs=(TokenLogprob(token=tokens[0], logprob=logprobs[0], top=top),),
                )
            )
        return responses

    def _prompt(self, request: Request) -> Prompt:
        """The request with its prompt's token ids."""
        return Prompt(request, tuple(template.prompt_tokens(self._tokenizer, request.messages)))


def _give_back_memory() -> None:
    """Give what a refused batch held back to a card."""
    import torch

    if models.has_cuda():
        torch.cuda.empty_cache()
