"""A batch of answers of the embedded engine on fake tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepladder.ask.request import Request
from stepladder.records import Message
from stepladder.rehearsal.tracking import Bytes, LiveMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

END = 1
"""The token that ends an answer."""


def rehearse_answers(model: PreTrainedModel, rows: int, prompt: int, answer: int) -> dict[str, Bytes]:
    """The peak of a batch: prompts are read and a token is chosen; the cache has room for whole answers at once.

    Args:
        model: on the meta device, in the number format to compute in.
        rows: requests in the batch.
        prompt: tokens of each prompt; they share none.
        answer: tokens that an answer may have.
    """
    from stepladder.ask.local import decoding

    memory = LiveMemory(model.config.vocab_size, next_token=END)
    memory.fake_weights(model)
    model.train(False)
    requests = [
        Request(model="fake", messages=(Message(role="user", content=str(row)),), max_tokens=answer)
        for row in range(rows)
    ]
    prompts = [(2 + row, *([0] * (prompt - 1))) for row in range(rows)]
    with memory:
        memory.hold(list(model.parameters()), "weights")
        memory.forget_peaks()
        memory.phase = "answers"
        decoding.decode(model, requests, prompts, {END})
    return dict(memory.peaks)
