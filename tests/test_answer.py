"""From text to letter, and back through shuffled options."""

from __future__ import annotations

from pathlib import Path

import pytest
from completions import OPTIONS, TABLE
from hypothesis import given
from hypothesis import strategies as st

from stepladder.mcq.answer import ANSWER_LINE, lenient, majority, strict, with_final_line
from stepladder.mcq.prompts import ask_messages, worked_solution
from stepladder.mcq.questionfile import read_problems
from stepladder.mcq.shuffle import orders, shown, to_original, to_shown
from stepladder.mcq.verify import judge
from stepladder.records import LETTERS, Question, parse_lines


def question(**changes: object) -> Question:
    fields: dict[str, object] = {
        "id": "p#0", "problem_id": "p", "problem": "Ann is kind. Bob is loud.", "question": "Who is loud?",
        "options": ("Ann", "Bob", "Cid"), "answer": "B", "language": "en", "source": "test/one",
        "worked": "Bob is loud.\nBob",
    }  # fmt: skip
    return Question.model_validate(fields | changes)


@pytest.mark.parametrize(("text", "strict_letter", "lenient_letter"), TABLE)
def test_extraction(text: str, strict_letter: str | None, lenient_letter: str | None) -> None:
    assert strict(text, OPTIONS).letter == strict_letter
    assert lenient(text, OPTIONS).letter == lenient_letter


@pytest.mark.parametrize(("text", "letter", "_"), [row for row in TABLE if row[1]])
def test_a_readable_text_can_be_given_the_answer_line_that_is_asked_for(text: str, letter: str, _: str) -> None:
    for language, line in ANSWER_LINE.items():
        asked = with_final_line(text, OPTIONS, language)
        assert asked.split("\n")[-1] == line.format(letter)
        assert strict(asked, OPTIONS) == (letter, "last-line")
        assert with_final_line(asked, OPTIONS, language) == asked


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("Bob is loud.\nSo the answer is **B**.", "Bob is loud.\nAnswer: B"),
        ("<think>Bob.</think>\n<output>\nAnswer: B. Bob\n</output>\n", "<think>Bob.</think>\nAnswer: B"),
        ("    ### Hint\n  Bob is loud.\nAnswer: B", "### Hint\n  Bob is loud.\nAnswer: B"),
        ("Only Bob is loud. Answer: B", "Only Bob is loud. Answer: B\nAnswer: B"),
        ("<r>fine</r><output>Answer: B</output>", "<r>fine</r><output>Answer: B</output>\nAnswer: B"),
    ],
)
def test_nothing_but_the_answer_line_is_rewritten(text: str, asked: str) -> None:
    assert with_final_line(text, OPTIONS, "en") == asked


def test_extraction_from_recorded_completions_that_somebody_read(contest: Path) -> None:
    """``recorded_letters.jsonl`` says which letter each of these real completions ends on, read by a person."""
    options = {
        question.id: question.options
        for problem in read_problems(contest / "train.jsonl", "zh", labelled=True)
        for question in problem.questions
    }
    recorded = {
        (row["model"], row["id"]): row["responses"] for _, row in parse_lines(contest / "recorded_responses.jsonl")
    }
    table = [row for _, row in parse_lines(Path(__file__).with_name("recorded_letters.jsonl"))]
    assert len(table) > 100
    for row in table:
        text = recorded[row["model"], row["id"]][row["response"]]
        assert strict(text, options[row["id"]]).letter == row["letter"], (row, text[-300:])


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
