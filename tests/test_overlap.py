"""Twins are found whatever their wording, and nobody is one for a phrase that all share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepladder.mcq.overlap import TWIN_SIMILARITY, near_duplicates, problem_text
from stepladder.mcq.questionfile import read_problems

ROOT = Path(__file__).parent.parent
WORDS = [f"{a}{b}" for a in ("an", "bo", "cle", "du", "e", "fi") for b in ("ra", "ton", "li", "mek", "so", "v")]
END = "what is not stated is false based on the above answer the following question"


def text(dice: random.Random, words: int = 60) -> str:
    return " ".join([*dice.choices(WORDS, k=words), END])


def test_a_twin_is_found_among_texts_that_end_alike() -> None:
    dice = random.Random(3)
    left, right = ([text(dice) for _ in range(300)] for _ in range(2))
    words = right[7].split()
    words[10:16] = ["quite", "other", "words"]
    left[42] = " ".join(words).upper().replace(" ", ",  ")
    assert [pair[:2] for pair in near_duplicates(left, right, TWIN_SIMILARITY)] == [(42, 7)]


def test_chinese_is_compared_by_characters() -> None:
    left = ["小明比小红高，小红比小刚高，谁最高？", "今天天气很好，我们去公园散步吧。"] * 3
    right = ["已知：小明比小红高；小红比小刚高。问谁最高？", "书架上有五本书，红色的在最左边。"]
    found = near_duplicates(left, right, 0.1)
    assert {(pair.left % 2, pair.right) for pair in found} == {(0, 0)}


def test_the_same_text_is_wholly_similar_and_nothing_is_like_nothing() -> None:
    dice = random.Random(4)
    texts = [text(dice) for _ in range(20)]
    assert [pair.similarity for pair in near_duplicates(texts, [texts[3]], 0.5)] == [pytest.approx(1.0)]
    assert near_duplicates([], texts, 0.1) == near_duplicates(texts, [], 0.1) == []
    assert near_duplicates(["", "..."], ["", "!"], 0.0) == []


@given(st.lists(st.text("abc 一二", max_size=30), max_size=6), st.lists(st.text("abc 一二", max_size=30), max_size=6))
def test_similarity_is_symmetric_and_a_share(left: list[str], right: list[str]) -> None:
    found = {pair[:2]: pair.similarity for pair in near_duplicates(left, right, 0.01)}
    back = {(pair.right, pair.left): pair.similarity for pair in near_duplicates(right, left, 0.01)}
    assert all(0 <= similarity <= 1 + 1e-9 for similarity in found.values())
    for places in found.keys() & back.keys():
        assert found[places] == pytest.approx(back[places])


def test_texts_may_come_one_by_one() -> None:
    dice = random.Random(5)
    left, right = ([text(dice) for _ in range(50)] for _ in range(2))
    left[3] = right[8]
    assert near_duplicates(iter(left), iter(right), 0.05) == near_duplicates(left, right, 0.05)
    unread = iter(left)
    assert near_duplicates(unread, [], 0.05) == []
    assert next(unread) == left[0]


def test_the_demo_has_no_twins() -> None:
    examples = ROOT / "examples" / "closedworld"
    train, test = (
        [problem_text(p.questions) for p in read_problems(examples / f"{split}.jsonl", "en", labelled=True)]
        for split in ("train", "test")
    )
    assert near_duplicates(train, test, TWIN_SIMILARITY) == []


def test_the_twins_of_the_contest_are_found_and_nothing_else(contest: Path) -> None:
    train = read_problems(contest / "train.jsonl", "zh", labelled=True)
    test = read_problems(contest / "test_unlabelled.jsonl", "zh", labelled=False)
    found = near_duplicates(
        [problem_text(p.questions) for p in train], [problem_text(p.questions) for p in test], TWIN_SIMILARITY
    )
    names = {(train[pair.left].id[-3:], test[pair.right].id[-3:]) for pair in found}
    assert names == {("063", "333"), ("399", "375"), ("154", "479"), ("363", "491"), ("063", "246")}
