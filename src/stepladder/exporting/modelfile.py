"""The Modelfile that Ollama makes a model from (docs.ollama.com/modelfile)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepladder.config import Predict
from stepladder.models import template
from stepladder.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "Modelfile"
QUOTES = '"""'
PROMPT = "THE-PROMPT"
"""Stands for the prompt while the chat template is rendered."""


def text(file: str, tokenizer: PreTrainedTokenizerBase, predict: Predict, max_length: int, licence: str | None) -> str:
    """The Modelfile of a GGUF file beside it: greedy answers to one message, as the model was validated.

    Args:
        file: the name of the GGUF file.
        tokenizer: of the weights.
        predict: ``[predict]``.
        max_length: of a prompt and its answer together, tokens.
        licence: name of the weights' licence, if it is known.
    """
    before, after = _around(tokenizer)
    lines = [f"FROM ./{file}"]
    if QUOTES not in before + after:  # it would end the text; Ollama then takes the file's own template
        lines.append(f"TEMPLATE {QUOTES}{_literal(before)}{{{{ .Prompt }}}}{_literal(after)}{QUOTES}")
    parameters: dict[str, object] = {
        "temperature": f"{predict.temperature:g}",
        "num_ctx": max_length,
        "num_predict": predict.max_tokens,
    }
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    if licence is not None:
        lines.append(f"LICENSE {licence}")
    return "\n".join(lines) + "\n"


def _around(tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    """What the chat template puts before and after the prompt; without the token that every text begins with, where the
    tokenizer, and so Ollama, adds it."""
    prompt = template.prompt_text(tokenizer, [Message(role="user", content=PROMPT)])
    before, _, after = prompt.partition(PROMPT)
    adds_first = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return (before.removeprefix(str(tokenizer.bos_token)) if adds_first else before), after


def _literal(part: str) -> str:
    """Text for Go's templates, in which braces have a meaning."""
    return part.replace("{{", '{{ "{{" }}')
