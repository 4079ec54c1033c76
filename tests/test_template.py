"""What the student saw in training is, token for token, what it is served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stepladder import models, template
from stepladder.ask.request import prompt_bound
from stepladder.closedworld import generate
from stepladder.errors import TemplateError
from stepladder.records import Example, Message
from stepladder.training.packing import tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = (
    Message(role="system", content="Be brief."),
    Message(role="user", content="Who?"),
    Message(role="assistant", content="Bob.\nAnswer: B"),
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return models.load_tokenizer(models.locate(models.BUNDLED))


def test_a_conversation_is_its_prompt_and_then_its_completion(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, completion = template.conversation_tokens(tokenizer, CHAT)
    assert prompt == template.prompt_tokens(tokenizer, CHAT[:-1])
    assert str(tokenizer.decode(prompt)).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(completion) == "Bob.\nAnswer: B<|im_end|>"
    assert completion[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_prompt_has_more_tokens_than_the_bound_without_a_tokenizer_says(
    tokenizer: PreTrainedTokenizerBase, language: str
) -> None:
    texts = [record["problem"] for record in generate(7, 24, language, "test")]
    texts += ["", " ", "\n" * 50, "㍿①ﬁ", "🧑‍🚀" * 9, "a" * 300, "0123456789" * 9, "\u200b\u0301" * 40]
    for text in texts:
        for messages in ([Message(role="user", content=text)], [CHAT[0], Message(role="user", content=text)]):
            assert len(template.prompt_tokens(tokenizer, messages)) <= prompt_bound(messages)


def test_the_same_template_passes(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    template.write(tokenizer, tmp_path)
    template.check(tokenizer, tmp_path)


def test_another_template_is_stopped_at_the_token_that_differs(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    template.write(tokenizer, tmp_path)
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")
    with pytest.raises(TemplateError, match=r"prompt token \d+ was"):
        template.check(tokenizer, tmp_path)


def test_an_example_that_does_not_fit_is_left_out_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    example = Example(messages=CHAT, question_id="q", teacher="worked")
    (row,) = tokenise(tokenizer, [example], max_length=400)
    prompt, completion = template.conversation_tokens(tokenizer, CHAT)
    assert row.ids == prompt + completion
    assert row.prompt == len(prompt)
    assert tokenise(tokenizer, [example], max_length=len(row.ids) - 1) == []
