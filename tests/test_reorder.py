"""Chains in other orders of the options: letters move along where they are sure, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import QUESTION
from recorded import questions_of, right_answers

from stepladder.mcq.answer import strict
from stepladder.mcq.cleaning import clean
from stepladder.mcq.reorder import in_order, in_orders, may_move
from stepladder.mcq.shuffle import shown, to_original
from stepladder.records import Question, Sample

ASKED = QUESTION.model_copy(
    update={
        "problem": "有三个盒子，只有一个盒子里有钥匙。",
        "question": "钥匙在哪里？",
        "options": ("红色盒子", "蓝色盒子", "绿色盒子"),
        "answer": "B",
        "language": "zh",
    }
)
MOVED: tuple[tuple[str, str], ...] = (  # as it is, and with the options turned by one: A becomes B, B C, C A
    ("钥匙不在红色盒子里，所以在蓝色盒子里。", "钥匙不在红色盒子里，所以在蓝色盒子里。"),
    ("选项A不对，选项 C 也不对。", "选项B不对，选项 A 也不对。"),
    ("A选项错误，所以选项（B）正确。", "B选项错误，所以选项（C）正确。"),
    ("A. 红色盒子：没有。\nB. 蓝色盒子：有。", "B. 红色盒子：没有。\nC. 蓝色盒子：有。"),
    ("- **A.** 红色盒子，没有\n- **C.** 绿色盒子，没有", "- **B.** 红色盒子，没有\n- **A.** 绿色盒子，没有"),
    ("Option A is empty, and so is option C.", "Option B is empty, and so is option A."),
)
STAYS = (
    "所以B正确。",
    "选项A和B都不对。",
    "A. 绿色盒子：没有。",
    "温度是30度（C），所以不是红色盒子。",
    "第二个选项正确。",
    "The second option is right.",
    "选项2正确。",
    "设变量A为钥匙。选项A不对。",
)


def sample(text: str, question: Question = ASKED) -> Sample:
    return Sample(
        question_id=question.id, rung="r", model="m", sample_index=0, permutation=tuple(range(len(question.options))),
        key="k", text=f"{text}\n答案是：{question.answer}", answer=question.answer, verdict="accepted",
    )  # fmt: skip


@pytest.mark.parametrize(("chain", "moved"), MOVED)
def test_letters_move_with_their_options(chain: str, moved: str) -> None:
    turned = in_order(ASKED, sample(chain), (2, 0, 1))
    assert turned is not None
    assert turned.text == f"{moved}\n答案是：C"
    assert in_order(ASKED, turned, (0, 1, 2)) == sample(chain)


@pytest.mark.parametrize("chain", STAYS)
def test_a_chain_that_refers_to_options_in_other_ways_stays(chain: str) -> None:
    assert in_order(ASKED, sample(chain), (2, 0, 1)) is None
    assert in_orders(ASKED, sample(chain), 3) == [sample(chain)]


def test_a_letter_that_may_be_a_name_stays() -> None:
    named = ASKED.model_copy(update={"problem": "A、B、C三人各有一个盒子。"})
    assert not may_move(named, sample("选项A不对。", named))
    assert may_move(named, sample("红色盒子是空的。", named))


def test_every_order_shows_the_answer_at_another_letter() -> None:
    chains = in_orders(ASKED, sample("钥匙在蓝色盒子里。"), 6)
    assert len({chain.permutation for chain in chains}) == 6
    assert sorted(chain.text[-1] for chain in chains[:3]) == ["A", "B", "C"]
    assert chains[0].permutation == (0, 1, 2)
    assert in_orders(ASKED, sample("钥匙在蓝色盒子里。"), 99)[:6] == chains
    fixed = ASKED.model_copy(update={"options": ("红色盒子", "蓝色盒子", "以上都不是")})
    assert {chain.permutation for chain in in_orders(fixed, sample("钥匙在蓝色盒子里。", fixed), 6)} == {
        (0, 1, 2),
        (1, 0, 2),
    }


@given(st.lists(st.sampled_from([*(chain for chain, _ in MOVED), *STAYS, "A", "\n", "。", "选项"]), max_size=5))
def test_an_order_and_back_is_the_same_chain(parts: list[str]) -> None:
    chain = sample("我们来看。\n" + "".join(parts) + "。")
    for order in ((2, 0, 1), (1, 0, 2)):
        if (moved := in_order(ASKED, chain, order)) is not None:
            letter = strict(moved.text, shown(ASKED.options, order)).letter
            assert letter is not None
            assert to_original(letter, order) == ASKED.answer
            back = in_order(ASKED, moved, (0, 1, 2))
            assert back is not None
            assert back.text == chain.text


def test_most_chains_of_the_contest_s_models_bear_every_order(contest: Path) -> None:
    seen = moved = 0
    for answer in right_answers(contest, questions_of(contest), step=4):
        cleaned = clean(answer.text, answer.question.options, "zh")
        if cleaned.flaw is None:
            chain = sample("", answer.question).model_copy(update={"text": cleaned.text})
            seen, moved = seen + 1, moved + may_move(answer.question, chain)
    assert moved > 0.8 * seen
