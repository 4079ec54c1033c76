"""Debris of recorded chains: each form with an example as a model wrote it, cut short; and flawed chains."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import questions_of, right_answers

from stepladder.mcq.answer import strict
from stepladder.mcq.cleaning import FLAWS, FORMS, Cleaned, clean

OPTIONS = ("是", "否")
REASON = "首先，根据第二条，王先生不在场。"
CLEAN = f"{REASON}\n答案是：B"
FORMS_SEEN = (
    ("role", f"Assistant: {REASON}\n因此答案是：B"),
    ("role", f"<|start_header_id|>assistant<|end_header_id|>\n\n{REASON}\n\n因此答案是：B"),
    ("role", f"docassistant\n{REASON}\n答案是：B"),
    ("role", f'="assistant"\n{REASON}\n答案是：B'),
    ("control token", f"{REASON}<|im_end|>\n答案是：B"),
    (
        "reflection",
        f"{REASON}\n<reflection>\n检查推理过程，没有错误。\n</reflection>\n\n<output>\n因此答案是：B\n</output>",
    ),
    ("reflection", f"{REASON}\n<reflection>检查推理过程，\n<output>因此答案是：B</output>"),
    ("tag", f"<thinking>\n{REASON}\n</thinking>\n\n<output>因此答案是：B. 否</output>"),
    ("tag", f"<Thinking>{REASON}</Thinking>\n答案是：B"),
    ("first word", f"answer\n{REASON}\n因此答案是：B"),
    ("first word", f"step {REASON}\n因此答案是：B"),
    ("first line", f".com\n{REASON}\n因此答案是：B"),
    ("first line", f"step-by-step-analysis:\n{REASON}\n因此答案是：B"),
    ("first line", f"是中国\n\n{REASON}\n因此答案是：B"),
    ("question", f"王先生在场吗？\nA. 是\nB. 否\n\n{REASON}\n因此答案是：B"),
    ("code fence", f"```\n{REASON}\n```\n因此答案是：B"),
    ("code fence", f"{REASON}\n```markdown\n因此答案是：B\n```"),
)
FLAWED = (
    ("begins within", "，王先生不在场，所以排除第一个选项。\n答案是：B"),
    ("answers first", f"答案是：B\n{REASON}\n答案是：B"),
    ("answers first", f"### 答案:\nB. 否\n### 解析:\n{REASON}\n答案是：B"),
    ("several questions", f"选择题 1：\n{REASON}\n选择题 2：\n{REASON}\n答案是：B"),
    ("two answers", f"{REASON}\n因此答案是：A\n等等，应该对调一下。\n因此答案是：B"),
    ("two answers", f"{REASON}\n因此答案是：A 和 B。\n如果只能选一个：\n答案是：B"),
    ("two answers", f"第一个问题的答案是A。\n{REASON}\n因此，第二个问题的答案是B。\n答案是：B"),
    ("no reasoning", "<output>\n因此答案是：B\n</output>"),
    ("no reasoning", "A. 是\nB. 否\n\n答案是：B"),
    ("no reasoning", "- **D.** 是。\n\n答案是：B"),
    ("second thoughts", f"{REASON}\n但是，题目给出的答案是“否”，我们需要重新检查。\n答案是：B"),
    ("second thoughts", f"{REASON}这个推理过程是正确的，没有错误。\n答案是：B"),
    ("repeats", "所以王先生不在场，我们再检查一遍，王先生到底在不在场，根据第二条他不在。" * 8 + "\n答案是：B"),
    ("answer lost", f"{REASON}\n<reflection>修正：正确答案应该是另一个。\n因此答案是：B"),
    ("debris throughout", "王先生在场吗？\nA. 是\nB. 否\n\n" * 4 + CLEAN),
)


@pytest.mark.parametrize(("form", "chain"), FORMS_SEEN)
def test_debris_is_removed(form: str, chain: str) -> None:
    cleaned = clean(chain, OPTIONS, "zh")
    assert (cleaned.text, cleaned.flaw) == (CLEAN, None)
    assert form in cleaned.forms


@pytest.mark.parametrize(("flaw", "chain"), FLAWED)
def test_a_flawed_chain_is_refused(flaw: str, chain: str) -> None:
    assert clean(chain, OPTIONS, "zh").flaw == flaw


def test_every_form_and_every_flaw_has_an_example() -> None:
    assert {form for form, _ in FORMS_SEEN} == {*FORMS}
    assert {flaw for flaw, _ in FLAWED} == {*FLAWS}


@pytest.mark.parametrize(
    "chain",
    [
        CLEAN,
        "NAND门的输出在两个输入都为真时为假。\n答案是：B",
        "Germans住在红房子里，所以挪威人住在蓝房子里。\n答案是：B",
        "1. 首先，Alan名列第一。\n2. 所以Kev名列第二。\n\n| 人 | 名次 |\n|---|---|\n| Alan | 1 |\n答案是：B",
        "A比B快，B比C快，所以A最快，若x < y则y > x。\n答案是：B",
    ],
)
def test_what_is_no_debris_stays(chain: str) -> None:
    assert clean(chain, OPTIONS, "zh") == Cleaned(chain)


def test_a_reflection_that_is_all_the_reasoning_stays() -> None:
    cleaned = clean(f"<reflection>{REASON}</reflection>\n<output>因此答案是：B</output>", OPTIONS, "zh")
    assert cleaned == Cleaned(CLEAN, ("tag",))


def test_the_answer_said_in_the_last_sentence_keeps_its_sentence() -> None:
    assert clean("王先生不在场，所以，答案是B。", OPTIONS, "zh").text == "王先生不在场，所以，答案是B。\n答案是：B"


@given(
    st.lists(
        st.sampled_from([*(chain for _, chain in (*FORMS_SEEN, *FLAWED)), "\n", " ", "<output>", "："]), max_size=4
    )
)
def test_cleaning_twice_changes_nothing(parts: list[str]) -> None:
    chain = "".join([*parts, f"\n{CLEAN}"])
    cleaned = clean(chain, OPTIONS, "zh")
    if cleaned.flaw is None:
        assert strict(cleaned.text, OPTIONS).letter == "B"
        assert clean(cleaned.text, OPTIONS, "zh").text == cleaned.text


def test_chains_of_the_contest_s_models(contest: Path) -> None:
    """What is left of 3,000 recorded right answers has no debris that a search can find."""
    flaws, kept = Counter[str | None](), []
    for answer in right_answers(contest, questions_of(contest), step=2):
        cleaned = clean(answer.text, answer.question.options, "zh")
        flaws[cleaned.flaw] += 1
        kept += [cleaned.text] if cleaned.flaw is None else []
    assert flaws[None] > 0.9 * flaws.total()
    for debris in ("ssistant", "<output>", "<thinking>", "reflection", "<|", "```"):
        assert sum(debris in text for text in kept) <= 0.002 * len(kept), debris
