"""One chat template from teacher to server: what the student saw in training is, token for token, what it is served.

The contract is one fingerprint, the rendered tokens of fixed conversations, written with the trainset and compared
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
AROUND = 4
"""Tokens that an error shows on either side of the first one that differs."""
SAMPLES = (
    (
        Message(role="system", content="Closed world. 封闭世界。"),
        Message(role="user", content="1 + 1 = ?\nA. 1\nB. 2"),
        Message(role="assistant", content="1 + 1 = 2.\nAnswer: B"),
    ),
    # What templates and tokenizers treat in ways of their own: no system prompt, tags, digits, spaces, odd characters.
    (
        Message(role="user", content="<think>2024</think>  <answer>\n\n\t①ﬁ🧑‍🚀 naïve "),
        Message(role="assistant", content="<think>\n\n</think>\n\n12,345 又 67.\n答案是：A"),
    ),
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
    completion = whole[len(prompt) :]
    # ChatML templates put a newline behind the closing token; the student stops at the token and never writes it.
    return prompt, completion[: _end(tokenizer, completion)] or [*completion, tokenizer.eos_token_id]


def _end(tokenizer: PreTrainedTokenizerBase, completion: Sequence[int]) -> int:
    """How many tokens of a completion there are up to the one that closes the turn, 0 if none does: the tokenizer's end
    of text or else the last special one, for there are tokenizers whose end of text closes no turn."""
    if tokenizer.eos_token_id in completion:
        return completion.index(tokenizer.eos_token_id) + 1
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return max((index + 1 for index, token in enumerate(completion) if token in special), default=0)


def closing(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that closes the assistant's turn, at which generation stops."""
    return conversation_tokens(tokenizer, SAMPLES[0])[1][-1]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool
) -> list[int]:
    chat = [message.model_dump() for message in messages]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )
    return cast("list[int]", ids)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The contract: a hash over the rendered tokens of fixed conversations, and the tokens themselves."""
    rendered = [dict(zip(("prompt", "completion"), conversation_tokens(tokenizer, s), strict=True)) for s in SAMPLES]
    return {"sha256": digest(rendered), "conversations": rendered}


def write(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's fingerprint into a folder."""
    (folder / FILE).write_text(json.dumps(fingerprint(tokenizer)) + "\n", encoding="utf-8")


def check(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Compare a tokenizer with the fingerprint an earlier stage wrote.

    Raises:
        TemplateError: with the two token sequences around the first difference.
    """
    expected = json.loads((folder / FILE).read_text(encoding="utf-8"))
    actual = fingerprint(tokenizer)
    if actual["sha256"] == expected["sha256"]:
        return
    if "conversations" not in expected:
        raise TemplateError(f"{folder / FILE} is of an earlier version of Stepladder; delete {folder} and run again")
    for was, now in zip(expected["conversations"], actual["conversations"], strict=True):
        for part in ("prompt", "completion"):
            same(tokenizer, part, was[part], now[part], str(folder / FILE))


def check_folder(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Check a model folder before it is asked: its tokenizer against the fingerprint in it, and that generation stops
    at the token that closes a turn. A folder without a fingerprint was not trained here, and passes.

    Raises:
        TemplateError: they differ.
    """
    if not (folder / FILE).exists():
        return
    check(tokenizer, folder)
    path = folder / "generation_config.json"
    stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    stops = stops if isinstance(stops, list) else [tokenizer.eos_token_id if stops is None else stops]
    if (closes := closing(tokenizer)) not in stops:
        raise TemplateError(
            f"{path}: generation stops at token {', '.join(map(str, stops))}, but a turn is closed by {closes} "
            f"{tokenizer.decode([closes])!r}; answers would run on: write that number there"
        )


def same(
    tokenizer: PreTrainedTokenizerBase, part: str, expected: Sequence[int], actual: Sequence[int], where: str
) -> None:
    """Compare two renderings of a conversation's part.

    Raises:
        TemplateError: with the two token sequences around the first difference.
    """
    if list(expected) == list(actual):
        return
    pairs = enumerate(zip(expected, actual, strict=False))
    first_difference = next((i for i, (x, y) in pairs if x != y), min(len(expected), len(actual)))

    def shown(ids: Sequence[int]) -> str:
        near = range(max(0, first_difference - AROUND), min(len(ids), first_difference + AROUND + 1))
        words = [f"{ids[i]} {_decoded(tokenizer, ids[i])!r}" for i in near]
        marked = [f"[{word}]" if i == first_difference else word for i, word in zip(near, words, strict=True)]
        return " | ".join(marked if first_difference < len(ids) else [*marked, "[end]"])

    raise TemplateError(
        f"{where}: the chat template changed: {part} token {first_difference} of {len(expected)} is not the same; use "
        f"one tokenizer and template from trainset to server\n  was: {shown(expected)}\n  now: {shown(actual)}"
    )


def _decoded(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token])) if token < len(tokenizer) else "?"
