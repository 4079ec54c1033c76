"""One chat template from teacher to server: what the student saw in training is, token for token, what it is served.

The contract is one fingerprint, the rendered tokens of a fixed conversation, written with the trainset and compared
by every stage that touches tokens afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stepladder.errors import TemplateError
from stepladder.records import Message
from stepladder.workspace import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "template.json"
_SAMPLE = (
    Message(role="system", content="Closed world. 封闭世界。"),
    Message(role="user", content="1 + 1 = ?\nA. 1\nB. 2"),
    Message(role="assistant", content="1 + 1 = 2.\nAnswer: B"),
)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages with the assistant's turn opened, shape (tokens,)."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def conversation_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Prompt and completion ids of a conversation that ends with the assistant; the completion closes the turn.

    Raises:
        TemplateError: the template renders the prompt differently once the answer is there, so that what is trained
            would not be what is served.
    """
    prompt = prompt_tokens(tokenizer, messages[:-1])
    whole = _render(tokenizer, messages, add_generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        raise TemplateError("the chat template renders a prompt differently before and after its answer")
    eos = tokenizer.eos_token_id
    completion = whole[len(prompt) :]
    # ChatML templates put a newline behind the closing token; the student stops at the token and never writes it.
    return prompt, completion[: completion.index(eos) + 1] if eos in completion else [*completion, eos]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool
) -> list[int]:
    chat = [message.model_dump() for message in messages]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )
    return cast("list[int]", ids)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The contract: a hash over the rendered tokens of the fixed conversation, and the tokens themselves."""
    prompt, completion = conversation_tokens(tokenizer, _SAMPLE)
    return {"sha256": digest([prompt, completion]), "prompt": prompt, "completion": completion}


def write(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's fingerprint into a folder."""
    (folder / FILE).write_text(json.dumps(fingerprint(tokenizer)) + "\n", encoding="utf-8")


def check(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Compare a tokenizer with the fingerprint an earlier stage wrote.

    Raises:
        TemplateError: naming the first token that differs.
    """
    expected = json.loads((folder / FILE).read_text(encoding="utf-8"))
    actual = fingerprint(tokenizer)
    if actual["sha256"] == expected["sha256"]:
        return
    for part in ("prompt", "completion"):
        same(part, expected[part], actual[part], str(folder / FILE))


def same(part: str, expected: Sequence[int], actual: Sequence[int], where: str) -> None:
    """Compare two renderings of a conversation's part.

    Raises:
        TemplateError: naming the first token that differs.
    """
    if list(expected) == list(actual):
        return
    pairs = enumerate(zip(expected, actual, strict=False))
    at = next((i for i, (x, y) in pairs if x != y), min(len(expected), len(actual)))
    raise TemplateError(
        f"{where}: the chat template changed: {part} token {at} was {list(expected[at : at + 1])}, now "
        f"{list(actual[at : at + 1])}; use one tokenizer and template from trainset to server"
    )
