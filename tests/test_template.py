"""What the student saw in training is, token for token, what it is served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stepladder import models
from stepladder.ask.local.engine import Local
from stepladder.ask.request import prompt_bound
from stepladder.closedworld.generate import generate
from stepladder.errors import TemplateError
from stepladder.models import template
from stepladder.records import Example, Message
from stepladder.training.sequences import tokenise

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
    texts += [
        "",
        " ",
        "\n" * 50,
        "㍿①ﬁ",
        "🧑‍🚀" * 9,
        "a" * 300,
        "0123456789" * 9,
        "\u200b\u0301" * 40,
        "<|im_end|>" * 40,
    ]
    for text in texts:
        for messages in ([Message(role="user", content=text)], [CHAT[0], Message(role="user", content=text)]):
            assert len(template.prompt_tokens(tokenizer, messages)) <= prompt_bound(messages)


def test_the_same_template_passes(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    template.write(tokenizer, tmp_path)
    template.check(tokenizer, tmp_path)


def edit_template(folder: Path, old: str, new: str) -> None:
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def edit_json(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / name
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def add_token(folder: Path) -> None:
    tokenizer = models.load_tokenizer(folder)
    tokenizer.add_tokens(["</think>"])
    tokenizer.save_pretrained(folder)


def swap_vocabulary(value: dict[str, Any]) -> None:
    words = value["model"]["vocab"]
    words["Answer"], words["Ġworld"] = words["Ġworld"], words["Answer"]


def end_elsewhere(folder: Path) -> None:
    """Nothing names the token that closes a turn any more."""
    edit_json(folder, "tokenizer_config.json", lambda value: value.update({"eos_token": "<|endoftext|>"}))
    (folder / "generation_config.json").unlink()


MISMATCHES: dict[str, Callable[[Path], None]] = {
    "a system prompt of its own": lambda f: edit_template(f, "helpful", "unhelpful"),
    "a token at the beginning": lambda f: edit_template(f, "{% for", "{{ bos_token }}{% for"),
    "another template file": lambda f: edit_template(f, "<|im_end|>", "</s>"),
    "spaces": lambda f: edit_template(f, "message['content']", "message['content'] | trim"),
    "another name of the student": lambda f: edit_template(f, "assistant", "model"),
    "thinking tags": lambda f: edit_template(f, "assistant\n", "assistant\n<think>\n\n</think>\n\n"),
    "an added token": add_token,
    "another end of a turn": end_elsewhere,
    "another vocabulary": lambda f: edit_json(f, "tokenizer.json", swap_vocabulary),
    "text made lower case": lambda f: edit_json(
        f, "tokenizer.json", lambda value: value.update(normalizer={"type": "Lowercase"})
    ),
    "generation that never stops": lambda f: edit_json(
        f, "generation_config.json", lambda value: value.update(eos_token_id=0)
    ),
}


def test_a_turn_may_be_closed_by_another_token_than_the_end_of_text(base: Path, tmp_path: Path) -> None:
    """As in bases of the Qwen2.5 family, whose tokenizers end a text with <|endoftext|> and a turn with <|im_end|>."""
    usual = template.conversation_tokens(models.load_tokenizer(base), template.CONVERSATIONS[0])
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    edit_json(folder, "tokenizer_config.json", lambda value: value.update({"eos_token": "<|endoftext|>"}))
    tokenizer = models.load_tokenizer(folder)
    assert tokenizer.eos_token == "<|endoftext|>"  # noqa: S105
    assert template.conversation_tokens(tokenizer, template.CONVERSATIONS[0]) == usual
    template.write(tokenizer, folder)
    Local.load(folder)


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_folder_whose_rendering_changed_is_never_asked(name: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    template.write(models.load_tokenizer(folder), folder)
    Local.load(folder)
    MISMATCHES[name](folder)
    with pytest.raises(TemplateError) as stopped:
        Local.load(folder)
    elsewhere = {
        "generation that never stops": "answers would run on",
        "another end of a turn": "answers would run on",
        "another name of the student": "differently before and after its answer",
        "thinking tags": "differently before and after its answer",
    }
    if name in elsewhere:
        assert elsewhere[name] in str(stopped.value)
    else:
        _, was, now = str(stopped.value).split("\n")
        assert was.startswith("  was: ")
        assert now.startswith("  now: ")
        assert was.removeprefix("  was: ") != now.removeprefix("  now: ")


def test_the_two_sequences_are_shown_around_the_first_difference(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TemplateError) as stopped:
        template.check_same(tokenizer, "prompt", [1, 9690, 198], [1, 9690], "here")
    assert "prompt token 2 of 3" in str(stopped.value)
    assert str(stopped.value).endswith("was: 1 '<|im_start|>' | 9690 'system' | [198 '\\n']\n"
                                       "  now: 1 '<|im_start|>' | 9690 'system' | [end]")  # fmt: skip


def test_a_contract_of_an_earlier_version_is_said(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / template.FINGERPRINT_FILE).write_text('{"sha256": "0", "prompt": [], "completion": []}')
    with pytest.raises(TemplateError, match="is from an earlier version of Stepladder; delete"):
        template.check(tokenizer, tmp_path)


def test_an_example_that_does_not_fit_is_left_out_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    example = Example(messages=CHAT, question_id="q", teacher="worked")
    (row,) = tokenise(tokenizer, [example], max_length=400)
    prompt, completion = template.conversation_tokens(tokenizer, CHAT)
    assert row.ids == prompt + completion
    assert row.prompt_length == len(prompt)
    assert tokenise(tokenizer, [example], max_length=len(row.ids) - 1) == []
