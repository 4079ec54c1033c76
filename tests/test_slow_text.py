"""Text that makes a regular expression slow: everything that reads a stranger's text takes linear time."""

from __future__ import annotations

import contextlib
import time
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import QUESTION

from stepladder.mcq.answer import lenient, strict, up_to_letter, with_final_line
from stepladder.mcq.chains import most_different
from stepladder.mcq.cleaning import clean
from stepladder.mcq.formats import _BBH_OPTION, _LETTERED, _LOGIQA_OPTION
from stepladder.mcq.language import is_written_in
from stepladder.mcq.reorder import may_move
from stepladder.mcq.repair import repair
from stepladder.mcq.shuffle import fixed
from stepladder.mcq.variant import Unfit, facts, only_asks, read
from stepladder.records import Sample
from stepladder.text import nfkc, printable

LENGTH = 20_000
"""Characters."""
SECONDS = 1.0
"""Of processor time that reading them may take; it takes a few hundredths."""
FRAGMENTS = (
    " ", "\n", "\t", "\u3000", "\r", "*", "#", "-", "`", "```", "**", "(", ")", "[", "{", "\\", "\\n", '"',
    "%*", "%", ".", ",", "。", "，", "、", "：", ":", "<", "<|", "<answer>", "</think>",
    "<reflection>", "<output>", "Assistant:", "A", "B.", "(A)",
    "A 和", "answer", "answer is", "The answer is", "Answer:", "答案", "答案是", "正确", "正确答案", "的",
    "以上", "以上的", "都", "所有", "选", "选A。", "选项", "选项 A", "因此", "根据", "根据题", "based on",
    "given x", "therefore,", "so ", "all of the ", "none", "both A", "\\boxed{", "\\text{A", "问题", "问题：",
    "推理：", "程序：", "Question", "Reasoning:", "opt(", "opt(0) :- ", "p :- q. ", "̖́", "̖ͅ", "\ufdfa",
    "第一", "最后", "前面的", "1", "x", "\u200b", "\x1b[", "\U0001f600",
)  # fmt: skip


def may_reorder(text: str) -> None:
    verdict = {"answer": "A", "verdict": "accepted", "text": f"{text}\nAnswer: A"}
    base = {"question_id": "q#0", "rung": "r", "model": "m", "sample_index": 0, "permutation": (0, 1), "key": "k"}
    may_move(QUESTION, Sample.model_validate(base | verdict))


def variant(text: str) -> None:
    for draft in (text, f"Question: x\nA. 1\n{text}\nB. 2\nReasoning: y\nAnswer: A\nProgram: {text}"):
        with contextlib.suppress(Unfit):
            read(draft, QUESTION, "new")


READERS: dict[str, Callable[[str], object]] = {
    "strict": lambda text: strict(text, ("one", "two")),
    "strict, as option": lambda text: strict(f"Answer: A {text}", (text, "two")),
    "lenient": lambda text: lenient(text, ("one", "two")),
    "with_final_line": lambda text: with_final_line(f"{text}\nAnswer: A", ("one", "two"), "en"),
    "up_to_letter": lambda text: up_to_letter(text, ("one", "two"), "zh"),
    "clean": lambda text: clean(f"{text}\nAnswer: A", ("one", "two"), "en"),
    "may_reorder": may_reorder,
    "fixed": lambda text: fixed(QUESTION.model_copy(update={"question": text, "options": (text, "two")})),
    "repair": lambda text: repair(text or "x", (text or "x", "two"), "A"),
    "variant": variant,
    "facts": facts,
    "only_asks": lambda text: only_asks("p :- q.", text, 2),
    "language": lambda text: is_written_in(text, "en"),
    "chains": lambda text: most_different([text, text[1:]], 2),
    "formats": lambda text: [pattern.findall(text) for pattern in (_LETTERED, _BBH_OPTION, _LOGIQA_OPTION)],
    "printable": printable,
}


def seconds(reader: Callable[[str], object], text: str) -> float:
    start = time.process_time()
    reader(text)
    return time.process_time() - start


@pytest.mark.parametrize("name", READERS)
def test_a_fragment_repeated(name: str) -> None:
    for fragment in FRAGMENTS:
        text = fragment * (LENGTH // len(fragment))
        for whole in (text, f"The answer is{text}x"):
            assert seconds(READERS[name], whole) < SECONDS, fragment


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(READERS)),
    parts=st.lists(st.tuples(st.sampled_from(FRAGMENTS), st.integers(1, 400)), min_size=1, max_size=4),
)
def test_fragments_mixed(name: str, parts: list[tuple[str, int]]) -> None:
    block = "".join(fragment * count for fragment, count in parts)
    text = (block * (LENGTH // len(block) + 1))[:LENGTH]
    assert seconds(READERS[name], text) < SECONDS


def test_normalised_text_is_as_before_but_for_endless_runs() -> None:
    for text in ("ＡＢ：（１）", "e\u0301" * 40, "ﬁ 中文 ½", "a" + "\u0301\u0316" * 15):
        assert nfkc(text) == unicodedata.normalize("NFKC", text)
    assert nfkc("a" + "\u0316" * 31).count("\u034f") == 1


def test_what_a_terminal_would_act_upon_is_spelled_out() -> None:
    assert printable("\x1b]52;c;aGk=\x07 \u202eabc\x9b1m\r\n\tok 中文") == (
        r"\x1b]52;c;aGk=\x07 \u202eabc\x9b1m\r" + "\n\tok 中文"
    )
