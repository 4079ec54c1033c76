"""From text to letter, and back through shuffled options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepladder.mcq.answer import lenient, majority, strict
from stepladder.mcq.prompts import ask_messages, worked_solution
from stepladder.mcq.shuffle import orders, shown, to_original, to_shown
from stepladder.mcq.verify import judge
from stepladder.records import LETTERS, Question


def question(**changes: object) -> Question:
    fields: dict[str, object] = {
        "id": "p#0", "problem_id": "p", "problem": "Ann is kind. Bob is loud.", "question": "Who is loud?",
        "options": ("Ann", "Bob", "Cid"), "answer": "B", "language": "en", "source": "test/one",
        "worked": "Bob is loud.\nBob",
    }  # fmt: skip
    return Question.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("text", "strict_letter", "lenient_letter"),
    [
        ("Bob is loud.\nAnswer: B", "B", "B"),
        ("鲍勃很吵。\n答案是：B", "B", "B"),
        ("Answer: B\n\n", "B", "B"),
        ("Answer: B.", None, "B"),
        ("**Answer: B**", None, "B"),
        ("The answer is B because Bob is loud.", None, "B"),
        ("因此答案是：C。", None, "C"),
        ("<output>因此答案是：A</output>", None, "A"),
        ("B", None, "B"),
        ("Option C fits.", None, "C"),
        ("Answer: A\nNo wait.\nAnswer: B", "B", "B"),
        ("Answer: B\nso I am done", None, "B"),
        ("Answer: D", None, None),
        ("Answer: b", None, "B"),
        ("Answer: Bob", None, None),
        ("", None, None),
        ("Because A is taller than B", None, None),
    ],
)
def test_extraction(text: str, strict_letter: str | None, lenient_letter: str | None) -> None:
    assert strict(text, 3).letter == strict_letter
    assert lenient(text, 3).letter == lenient_letter


@given(st.integers(2, 8), st.integers(1, 6), st.integers())
def test_every_order_can_be_undone(size: int, count: int, seed: int) -> None:
    letters = LETTERS[:size]
    for order in orders(count, size, seed):
        assert sorted(order) == list(range(size))
        assert [to_original(to_shown(letter, order), order) for letter in letters] == list(letters)
        assert shown(letters, order)[LETTERS.index(to_shown("A", order))] == "A"


def test_orders_are_distinct_while_there_are_any_left() -> None:
    assert len(set(orders(6, 3, "seed"))) == 6
    assert len(set(orders(2, 2, "seed"))) == 2
    assert len(orders(5, 2, "seed")) == 5


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_worked_solution_is_right_in_any_order(order: tuple[int, ...]) -> None:
    asked = question()
    text = worked_solution(asked, order)
    assert text is not None
    assert judge(asked, order, text, finished=True) == ("B", "accepted")
    prompt = ask_messages(asked, order)[-1].content
    assert f"{to_shown('B', order)}. Bob" in prompt.splitlines()


def test_a_worked_solution_is_judged_by_what_it_says_and_not_by_the_label() -> None:
    asked = question(worked="Ann is kind.\nAnn")
    text = worked_solution(asked, (0, 1, 2))
    assert text is not None
    assert judge(asked, (0, 1, 2), text, finished=True) == ("A", "wrong")


def test_a_worked_solution_that_ends_in_no_option_is_no_solution() -> None:
    assert worked_solution(question(worked="So it is Dan.\nDan"), (0, 1, 2)) is None
    assert worked_solution(question(worked=None), (0, 1, 2)) is None


def test_verdicts_say_why() -> None:
    asked = question()
    assert judge(asked, (1, 0, 2), "Answer: A", finished=True) == ("B", "accepted")
    assert judge(asked, (0, 1, 2), "Answer: A", finished=True) == ("A", "wrong")
    assert judge(asked, (0, 1, 2), "Hm.", finished=True) == (None, "unparsed")
    assert judge(asked, (0, 1, 2), "Hm", finished=False) == (None, "truncated")


def test_chinese_prompts_carry_the_chinese_answer_line() -> None:
    asked = question(
        language="zh", problem="小波很吵。", question="谁很吵？", options=("小安", "小波"), worked="小波吵闹。\n小波"
    )
    text = worked_solution(asked, (1, 0))
    assert text is not None
    assert text.splitlines()[-1] == "答案是：A"
    assert "封闭世界" in ask_messages(asked, (1, 0))[0].content


def test_majority() -> None:
    assert majority(("A", "B", "B")) == "B"
    assert majority(("B", "A")) == "B"
    assert majority((None, None, "C")) == "C"
    assert majority((None,)) is None
