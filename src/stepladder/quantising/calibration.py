"""General text to calibrate GPTQ on beside the student's own chains, in the amounts the user chose.

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
"""Names that dialogue collections give the speakers."""
READ = 20_000
"""Rows of a source that are drawn from: the first so many, since a hub's collection may have millions."""


def general(tokenizer: PreTrainedTokenizerBase, wanted: General, draw: random.Random) -> list[list[int]]:
    """Token ids of ``wanted.samples`` rows of a source, each cut to ``wanted.max_length``.

    Raises:
        InputError: naming the row that holds no text, or a source that has too few rows.
        UserError: the source cannot be had.
    """
    rows = list(itertools.islice(_rows(wanted), READ))
    if len(rows) < wanted.samples:
        raise InputError(wanted.source, f"has {len(rows)} rows, but [[quantise.general]] samples = {wanted.samples}")
    chosen = sorted(draw.sample(range(len(rows)), wanted.samples))
    return [_tokens(tokenizer, wanted, *rows[index])[: wanted.max_length] for index in chosen]


def _rows(wanted: General) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a JSONL file, or of the training split of a hub's dataset."""
    if Path(wanted.source).is_file():
        yield from records.parse_lines(Path(wanted.source))
        return
    if wanted.source.endswith((".jsonl", ".json")):
        raise InputError(wanted.source, "no such file; check 'source' in [[quantise.general]]")
    models.require("datasets")
    import datasets

    try:
        found = datasets.load_dataset(wanted.source, split="train", streaming=True)
        yield from enumerate(found, start=1)
    except Exception as error:  # noqa: BLE001  (the library raises anything, from connection errors to its own)
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"dataset {wanted.source!r} cannot be had ({reason}); give a JSONL file as 'source'") from None


def _tokens(tokenizer: PreTrainedTokenizerBase, wanted: General, number: int, row: Any) -> list[int]:
    """One row as tokens: a conversation in the template, plain text as it is."""
    if isinstance(row, dict):
        if isinstance(row.get("text"), str) and row["text"].strip():
            ids: list[int] = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            return ids
        if chat := _chat(row):
            prompt, completion = template.conversation_tokens(tokenizer, chat)
            return prompt + completion
    known = "text; messages; conversations; instruction and output; prompt and completion"
    raise InputError(wanted.source, f"holds no text that is understood; known fields: {known}", line=number)


def _chat(row: dict[str, Any]) -> list[Message]:
    """A conversation up to its last answer; nothing where there is none."""
    turns: list[tuple[Any, Any]] = []
    if isinstance(turned := row.get("messages", row.get("conversations")), list):
        for turn in turned:
            if isinstance(turn, dict):
                turns.append((turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))))
    elif "output" in row:
        instruction = "\n".join(str(row[key]) for key in ("instruction", "input") if row.get(key))
        turns = [("user", instruction), ("assistant", row["output"])]
    elif "completion" in row:
        turns = [("user", row.get("prompt")), ("assistant", row["completion"])]
    chat = [
        Message(role=name, content=said)
        for role, said in turns
        if (name := ROLES.get(str(role), role)) in ("system", "user", "assistant") and isinstance(said, str) and said
    ]
    while chat and chat[-1].role != "assistant":
        chat.pop()
    return chat if any(message.role == "user" for message in chat) else []
