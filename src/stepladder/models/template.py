"""Check that the chat template stays the same from training to serving, token for token.

The fingerprint is the rendered tokens of fixed conversations. It is written with the training set, and every later
stage that handles tokens compares its tokenizer with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stepladder.errors import TemplateError
from stepladder.isolation.templates import TemplateFault, Templates
from stepladder.models.files import read_json
from stepladder.records import Message
from stepladder.text import USUAL_CONTROL_TOKENS, without_control_tokens
from stepladder.workspace import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "chat template"
FINGERPRINT_FILE = "template.json"
CONTEXT_TOKENS = 4
"""Number of tokens that an error shows before and after the first one that differs."""
CONVERSATIONS = (
    (
        Message(role="system", content="Closed world. 封闭世界。"),
        Message(role="user", content="1 + 1 = ?\nA. 1\nB. 2"),
        Message(role="assistant", content="1 + 1 = 2.\nAnswer: B"),
    ),
    # Things that templates and tokenizers treat differently: no system prompt, tags, digits, spaces, rare characters.
    (
        Message(role="user", content="<think>2024</think>  <answer>\n\n\t①ﬁ🧑‍🚀 naïve "),
        Message(role="assistant", content="<think>\n\n</think>\n\n12,345 又 67.\n答案是：A"),
    ),
)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """:func:`prompts_tokens` of one conversation."""
    return prompts_tokens(tokenizer, [messages])[0]


def prompts_tokens(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Token ids of each conversation's messages and of the beginning of the assistant's turn. A last message from the
    assistant is left open, to be continued."""
    openings = [chat[-1].content if chat[-1].role == "assistant" else None for chat in conversations]
    prompts = [chat if opening is None else chat[:-1] for chat, opening in zip(conversations, openings, strict=True)]
    tokens = _render(tokenizer, prompts, add_generation_prompt=True)
    for number, opening in enumerate(openings):
        if opening is not None:
            text = without_control_tokens(control_tokens(tokenizer), opening)
            tokens[number] += tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def conversation_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the completion of a conversation that ends with the assistant. The completion ends
    with the token that closes the turn.

    Raises:
        TemplateError: the template renders the prompt differently when an answer follows, so that training and serving
            would differ.
    """
    prompt = prompt_tokens(tokenizer, messages[:-1])
    (conversation,) = _render(tokenizer, [messages], add_generation_prompt=False)
    if conversation[: len(prompt)] != prompt:
        raise TemplateError("the chat template renders a prompt differently before and after its answer")
    completion = conversation[len(prompt) :]
    # ChatML templates add a newline after the closing token, but generation stops at the token.
    return prompt, completion[: _turn_length(tokenizer, completion)] or [*completion, tokenizer.eos_token_id]


def _turn_length(tokenizer: PreTrainedTokenizerBase, completion: Sequence[int]) -> int:
    """Length of a completion up to the token that closes the turn, 0 if there is none. That token is the tokenizer's
    end of text or, as some tokenizers close a turn with another token, the last special token."""
    if tokenizer.eos_token_id in completion:
        return completion.index(tokenizer.eos_token_id) + 1
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return max((index + 1 for index, token in enumerate(completion) if token in special), default=0)


def closing_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that closes the assistant's turn, at which generation stops."""
    return conversation_tokens(tokenizer, CONVERSATIONS[0])[1][-1]


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """What a conversation and the beginning of the assistant's turn are, as text."""
    return _texts(tokenizer, [messages], add_generation_prompt=True)[0]


def _render(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool
) -> list[list[int]]:
    """Token ids of conversations, as ``apply_chat_template`` of transformers gives them."""
    texts = _texts(tokenizer, conversations, add_generation_prompt=add_generation_prompt)
    return cast("list[list[int]]", tokenizer(texts, add_special_tokens=False)["input_ids"])


def _texts(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool
) -> list[str]:
    """Conversations as text. The template is rendered in a process of its own, and what looks like a control token in a
    message is text."""
    given = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    values = [
        {"messages": [message.model_dump() for message in as_text(tokenizer, messages)]}
        | given
        | tokenizer.special_tokens_map
        for messages in conversations
    ]
    try:
        return _templates(tokenizer.get_chat_template()).render_all(NAME, values)
    except TemplateFault as fault:
        raise TemplateError(
            f"{tokenizer.name_or_path}: the chat template cannot be rendered ({fault}); use another model or mend it"
        ) from None


@cache
def _templates(source: str) -> Templates:
    return Templates({NAME: source}, chat=True)


def as_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages without the tokenizer's control tokens (:func:`stepladder.text.without_control_tokens`)."""
    pattern = control_tokens(tokenizer)
    if not any(pattern.search(message.content) for message in messages):
        return tuple(messages)
    return tuple(
        message.model_copy(update={"content": without_control_tokens(pattern, message.content)}) for message in messages
    )


@lru_cache(maxsize=8)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What a tokenizer makes a control token of: tokens that it marks as special, and added ones that look like it, as
    some mark turns with tokens that are not special (DeepSeek's ``<｜User｜>``). Other added tokens, such as
    ``<think>``, are part of an answer's text."""
    added = tokenizer.added_tokens_decoder.values()
    marked = {token.content for token in added if token.special or USUAL_CONTROL_TOKENS.fullmatch(token.content)}
    written = {token.strip() for token in marked | set(tokenizer.all_special_tokens)} - {""}
    # Without any, a pattern that matches nowhere.
    return re.compile("|".join(map(re.escape, sorted(written, key=lambda token: (-len(token), token)))) or "(?!)")


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The rendered tokens of :data:`CONVERSATIONS`, and a hash of them."""
    rendered = [
        dict(zip(("prompt", "completion"), conversation_tokens(tokenizer, s), strict=True)) for s in CONVERSATIONS
    ]
    return {"sha256": digest(rendered), "conversations": rendered}


def write(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's fingerprint into a folder."""
    (folder / FINGERPRINT_FILE).write_text(json.dumps(fingerprint(tokenizer)) + "\n", encoding="utf-8")


def check(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Compare a tokenizer with the fingerprint that an earlier stage wrote into a folder.

    Raises:
        TemplateError: they differ; the message shows both token sequences around the first difference.
    """
    expected = read_json(folder / FINGERPRINT_FILE)
    actual = fingerprint(tokenizer)
    if actual["sha256"] == expected["sha256"]:
        return
    if "conversations" not in expected:
        raise TemplateError(
            f"{folder / FINGERPRINT_FILE} is from an earlier version of Stepladder; delete {folder} and run again"
        )
    for expected_parts, actual_parts in zip(expected["conversations"], actual["conversations"], strict=True):
        for part in ("prompt", "completion"):
            check_same(tokenizer, part, expected_parts[part], actual_parts[part], str(folder / FINGERPRINT_FILE))


def check_folder(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Check a model folder before use: its tokenizer against the fingerprint in it, and that generation stops at the
    token that closes a turn. A folder without a fingerprint was not trained by Stepladder, and is not checked.

    Raises:
        TemplateError: a check failed.
    """
    if not (folder / FINGERPRINT_FILE).exists():
        return
    check(tokenizer, folder)
    path = folder / "generation_config.json"
    stops = read_json(path).get("eos_token_id") if path.exists() else None
    stops = stops if isinstance(stops, list) else [tokenizer.eos_token_id if stops is None else stops]
    if (closes := closing_token(tokenizer)) not in stops:
        raise TemplateError(
            f"{path}: generation stops at token {', '.join(map(str, stops))}, but turns end with {closes} "
            f"{tokenizer.decode([closes])!r}; answers would run on: set eos_token_id to that number"
        )


def check_same(
    tokenizer: PreTrainedTokenizerBase, part: str, expected: Sequence[int], actual: Sequence[int], where: str
) -> None:
    """Compare the token ids of two renderings of the prompt or completion of a conversation.

    Args:
        part: "prompt" or "completion".
        where: what the renderings come from, for the message.

    Raises:
        TemplateError: they differ; the message shows both token sequences around the first difference.
    """
    if list(expected) == list(actual):
        return
    tokens = enumerate(zip(expected, actual, strict=False))
    first_difference = next((i for i, (x, y) in tokens if x != y), min(len(expected), len(actual)))

    def excerpt(ids: Sequence[int]) -> str:
        window = range(max(0, first_difference - CONTEXT_TOKENS), min(len(ids), first_difference + CONTEXT_TOKENS + 1))
        words = [f"{ids[i]} {_decoded(tokenizer, ids[i])!r}" for i in window]
        excerpted = [f"[{word}]" if i == first_difference else word for i, word in zip(window, words, strict=True)]
        return " | ".join(excerpted if first_difference < len(ids) else [*excerpted, "[end]"])

    raise TemplateError(
        f"{where}: the chat template changed: {part} token {first_difference} of {len(expected)} is not the same; use "
        f"one tokenizer and template from trainset to server\n  was: {excerpt(expected)}\n  now: {excerpt(actual)}"
    )


def _decoded(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token])) if token < len(tokenizer) else "?"
