"""General text to calibrate GPTQ on beside the student's own chains (``[[quantise.general]]``).

The winning entry mixed its training data with general Chinese, English and dialogue data.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepladder import models, records
from stepladder.config import General
from stepladder.errors import InputError, UserError
from stepladder.models import template
from stepladder.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""Names of speakers in dialogue datasets, as roles of a chat."""
MAX_ROWS_READ = 20_000
"""Rows are drawn from the first so many of a source, since a dataset on a hub may have millions."""


def general(tokenizer: PreTrainedTokenizerBase, corpus: General, draw: random.Random) -> list[list[int]]:
    """Token ids of ``corpus.samples`` rows of a corpus, each cut to ``corpus.max_length``.

    Raises:
        InputError: a row holds no text, or the corpus has too few.
        UserError: the dataset cannot be loaded.
    """
    rows = list(itertools.islice(_rows(corpus), MAX_ROWS_READ))
    if len(rows) < corpus.samples:
        raise InputError(corpus.source, f"has {len(rows)} rows, but [[quantise.general]] samples = {corpus.samples}")
    chosen = sorted(draw.sample(range(len(rows)), corpus.samples))
    return [_tokens(tokenizer, corpus, *rows[index])[: corpus.max_length] for index in chosen]


def _rows(corpus: General) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a JSONL file, or of the training split of a hub's dataset."""
    if Path(corpus.source).is_file():
        yield from records.parse_lines(Path(corpus.source))
        return
    if corpus.source.endswith((".jsonl", ".json")):
        raise InputError(corpus.source, "no such file; check 'source' in [[quantise.general]]")
    models.require("datasets")
    import datasets

    try:
        dataset = datasets.load_dataset(corpus.source, split="train", streaming=True)
        yield from enumerate(dataset, start=1)
    except Exception as error:  # noqa: BLE001  (the library raises anything, from connection errors to its own)
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"dataset {corpus.source!r} cannot be loaded ({reason}); give a JSONL file as 'source'"
        ) from None


def _tokens(tokenizer: PreTrainedTokenizerBase, corpus: General, number: int, row: Any) -> list[int]:
    """One row as token ids: a conversation in the chat template, plain text as it is."""
    if isinstance(row, dict):
        if isinstance(row.get("text"), str) and row["text"].strip():
            ids: list[int] = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            return ids
        if chat := _chat(row):
            prompt, completion = template.conversation_tokens(tokenizer, chat)
            return prompt + completion
    fields = "text; messages; conversations; instruction and output; prompt and completion"
    raise InputError(corpus.source, f"holds no text that is understood; known fields: {fields}", line=number)


def _chat(row: dict[str, Any]) -> list[Message]:
    """A row's conversation up to its last answer; empty where it has none."""
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
    return chat if any(message.role == "user" for message in chat) else []
