"""What people write: repaired where only one reading is possible, reported, and never dropped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepladder.mcq.repair import Note, clean, repair
from stepladder.mcq.shuffle import fixed, orders, shown, to_original, to_shown
from stepladder.mcq.verify import judge
from stepladder.records import LETTERS, Question
from stepladder.stages.questions import read_problems


def question(*options: str, text: str = "Which?", answer: str | None = "A") -> Question:
    return Question(
        id="p#0", problem_id="p", problem="P.", question=text, options=options, answer=answer, language="en", source="s"
    )


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  plain ", "plain"),
        ("first\\n2. second", "first\n2. second"),
        ("no \n\\n", "no"),
        ("one.\n\\nSo answer:", "one.\nSo answer:"),
        ("$a \\neq b$ and \\nu", "$a \\neq b$ and \\nu"),
        ("Question 1:**\nWho?", "Question 1:\nWho?"),
        ("**bold** stays", "**bold** stays"),
        ("2 ** 3 is a power", "2 ** 3 is a power"),
        ("A list:\n```", "A list:"),
        ("```\ncode\n```", "```\ncode\n```"),
        ("[a, b]`", "[a, b]"),
        ("`a` and `b`", "`a` and `b`"),
        ("", ""),
    ],
)
def test_debris_goes_and_all_else_stays(text: str, cleaned: str) -> None:
    notes: list[Note] = []
    assert clean(text, notes) == cleaned
    assert bool(notes) == (cleaned != text.strip())
    assert clean(cleaned, []) == cleaned


@pytest.mark.parametrize(
    ("options", "answer", "split", "moved"),
    [
        (("yes", "no\nC. unknown"), "B", ("yes", "no", "unknown"), "B"),
        (("yes", "no\nC. unknown"), "C", ("yes", "no", "unknown"), "C"),
        (("one\nB、two", "three"), "B", ("one", "two", "three"), "C"),
        (("one\nB、two", "three"), "A", ("one", "two", "three"), "A"),
        (("yes", "no\nD. maybe"), "A", ("yes", "no", "maybe"), "A"),
        (("x\nB. y\nC: z\nD）w",), "D", ("x", "y", "z", "w"), "D"),
        (("1. left\n2. right", "B"), "A", ("1. left\n2. right", "B"), "A"),
        (("steps:\nC. then\nA. first", "none"), "B", ("steps:\nC. then\nA. first", "none"), "B"),
        (("p", "q"), None, ("p", "q"), None),
    ],
)
def test_merged_options_are_split_and_the_label_follows_its_option(
    options: tuple[str, ...], answer: str | None, split: tuple[str, ...], moved: str | None
) -> None:
    found = repair("Which?", options, answer)
    assert (found.options, found.answer) == (split, moved)
    assert ("merged options" in [note.kind for note in found.notes]) == (split != options)


@pytest.mark.parametrize(
    ("stem", "options", "kinds"),
    [
        ("选择题 3：", ("a", "b"), ["empty question"]),
        ("Question 3:", ("a", "b"), ["empty question"]),
        ("选择题 3：谁？", ("a", "b", "a"), ["repeated option"]),
        ("Who?", ("a", "\ufffd"), ["broken text"]),
        ("Who?", ("a", " "), ["empty option"]),
    ],
)
def test_what_cannot_be_put_right_is_said(stem: str, options: tuple[str, ...], kinds: list[str]) -> None:
    found = repair(stem, options, "A")
    assert [note.kind for note in found.notes] == kinds
    assert len(found.options) == len(options)


OF_OTHERS = [
    "以上都不是", "以上都是", "以上皆非", "上述均不正确", "所有上述选项", "以上两个答案都对", "都不是", "两者都可以",
    "None of the above", "All of the above.", "none", "Both", "Neither of them", "all options are correct",
]  # fmt: skip
BY_LETTER = ["A和B", "选项A和B都正确", "A 和 C", "Both A and B", "Neither A nor B", "A and C", "Option B"]
PLAIN = [
    "Irina和Natasha",
    "所有哺乳动物都不吃肉",
    "above the door",
    "Nobody",
    "A large box",
    "vitamin B",
    "以前",
    "All dogs",
    "x",
]


@pytest.mark.parametrize("option", OF_OTHERS)
def test_an_option_that_speaks_of_the_others_keeps_its_place(option: str) -> None:
    assert fixed(question("one", "two", "three", option)).places == {3}


@pytest.mark.parametrize("option", BY_LETTER)
def test_options_named_by_letters_do_not_move(option: str) -> None:
    assert fixed(question("one", "two", "three", option)).places == {0, 1, 2, 3}
    assert fixed(question("A", "B", "C")).places == {0, 1, 2}
    assert fixed(question("one", "two", text="Why is option B wrong?")).places == {0, 1}


@pytest.mark.parametrize("option", PLAIN)
def test_ordinary_options_move_freely(option: str) -> None:
    assert not fixed(question("one", "two", "three", option)).places


@given(st.data(), st.integers(2, 8), st.integers(1, 30))
def test_shuffling_is_undone_and_fixed_options_stay(data: st.DataObject, size: int, count: int) -> None:
    places = data.draw(st.frozensets(st.integers(0, size - 1)))
    options = [f"option {at}" for at in range(size)]
    for order in orders(count, size, data.draw(st.integers()), places=places):
        assert sorted(order) == list(range(size))
        seen = shown(options, order)
        for at, letter in enumerate(LETTERS[:size]):
            assert to_shown(to_original(letter, order), order) == letter
            assert to_original(to_shown(letter, order), order) == letter
            assert seen[LETTERS.index(to_shown(letter, order))] == options[at]
        assert all(order[place] == place for place in places)


@given(st.permutations(["one", "two", "three", "以上都不是", "None of the above"]), st.integers())
def test_no_order_breaks_an_option_that_speaks_of_those_above(options: list[str], seed: int) -> None:
    asked = question(*options)
    for order in orders(5, len(options), seed, places=fixed(asked).places):
        for at, option in enumerate(options):
            if option in OF_OTHERS:
                assert order[at] == at
                assert set(order[:at]) == set(range(at))


def test_two_options_of_the_same_text_are_both_right() -> None:
    asked = question("b", "a", "b", answer="C")
    assert [judge(asked, (0, 1, 2), f"Answer: {letter}", finished=True).verdict for letter in "ABC"] == [
        "accepted",
        "wrong",
        "accepted",
    ]


def line(**changes: Any) -> dict[str, Any]:
    return {"question": "Who?", "options": ["Ann", "Bob"], "answer": "A"} | changes


def test_findings_say_where(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    rows = [
        {"id": "one", "problem": "P.\\n", "questions": [line(), line(options=["Ann", "Bob\nC. Cleo"], answer="C")]},
        {"id": "two", "problem": "Q.", "questions": [line(options=["Ann\nB. Bob"], answer="B")]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = read_problems(file, "en", labelled=True)
    assert [(about, note.kind) for about, note in one.notes] == [("one", "debris"), ("one#1", "merged options")]
    assert one.questions[1].options == ("Ann", "Bob", "Cleo")
    assert one.questions[1].answer == "C"
    assert two.questions[0].options == ("Ann", "Bob")


def test_the_contest_is_read_whole(contest: Path) -> None:
    kinds: Counter[str] = Counter()
    questions = 0
    for name, labelled in (("train", True), ("test_unlabelled", False)):
        for problem in read_problems(contest / f"{name}.jsonl", "zh", labelled=labelled):
            questions += len(problem.questions)
            kinds.update(note.kind for _, note in problem.notes)
    assert questions == 1094 + 1328
    assert kinds == {
        "debris": 122, "broken text": 1, "repeated option": 5, "merged options": 3, "empty question": 2,
    }  # fmt: skip
