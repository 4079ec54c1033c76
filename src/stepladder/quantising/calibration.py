"""General text to calibrate GPTQ on beside the student's own chains (``[[quantise.general]]``).

The winning entry mixed its training data with general Chinese, English and dialogue data.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder.config import General
from stepladder.errors import InputError
from stepladder.models import fetching, template
from stepladder.quantising import data_rows
from stepladder.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""Names of speakers in dialogue datasets, as roles of a chat."""
FIELDS = "known fields: messages; conversations; instruction and output; prompt and completion; text"


def general(tokenizer: PreTrainedTokenizerBase, corpus: General, draw: random.Random) -> list[list[int]]:
    """Token ids of ``corpus.samples`` rows of a corpus, each cut to ``corpus.max_length``. Rows without text, of which
    dialogue datasets have some, are passed over.

    Raises:
        InputError: no row holds text, or too few do.
        UserError: the file cannot be downloaded.
    """
    path = Path(corpus.source) if corpus.file is None else fetching.find_data(corpus.source, corpus.file)
    # Read twice, so that no more than the chosen rows are in memory.
    usable = [place for place, (_, row) in enumerate(data_rows.rows(path)) if _content(row)]
    if not usable:
        raise InputError(path, f"holds no text that is understood in its first {data_rows.MAX_ROWS:,} rows; {FIELDS}")
    if len(usable) < corpus.samples:
        raise InputError(path, f"has {len(usable)} rows with text, but [[quantise.general]] samples = {corpus.samples}")
    chosen = {usable[index] for index in draw.sample(range(len(usable)), corpus.samples)}
    contents = (_content(row) for place, (_, row) in enumerate(data_rows.rows(path)) if place in chosen)
    return [_tokens(tokenizer, content)[: corpus.max_length] for content in contents]


def _content(row: Any) -> str | list[Message]:
    """What a row holds: a conversation, or else plain text; empty where it is neither."""
    if not isinstance(row, dict):
        return ""
    text = row.get("text")
    return _chat(row) or (text if isinstance(text, str) and text.strip() else "")


def _tokens(tokenizer: PreTrainedTokenizerBase, content: str | list[Message]) -> list[int]:
    """Token ids of a conversation in the chat template, or of plain text as it is."""
    if isinstance(content, str):
        ids: list[int] = tokenizer(content, add_special_tokens=False)["input_ids"]
        return ids
    prompt, completion = template.conversation_tokens(tokenizer, content)
    return prompt + completion


def _chat(row: dict[str, Any]) -> list[Message]:
    """A row's conversation from its first message of a user or system to its last answer; empty where it has none."""
    turns: list[tuple[Any, Any]] = []
    if isinstance(conversation := row.get("messages", row.get("conversations")), list):
        for turn in conversation:
            if isinstance(turn, dict):
                turns.append((turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))))
    elif "output" in row:
        instruction = "\n".join(str(row[key]) for key in ("instruction", "input") if row.get(key))
        turns = [("user", instruction), ("assistant", row["output"])]
    elif "completion" in row:
        turns = [("user", row.get("prompt")), ("assistant", row["completion"])]
    chat = [
        Message(role=name, content=text)
        for role, text in turns
        if (name := ROLES.get(str(role), role)) in ("system", "user", "assistant") and isinstance(text, str) and text
    ]
    while chat and chat[-1].role != "assistant":
        chat.pop()
    while chat and chat[0].role == "assistant":  # the rest of a conversation that was cut in two
        del chat[0]
    return chat if any(message.role == "user" for message in chat) else []
