"""Votes that stop when they are decided, against every way a vote can go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import pytest

from stepladder.answering.voting import Poll, vote
from stepladder.ask.request import Request, Response, TokenLogprob
from stepladder.config import Predict
from stepladder.mcq.answer import ANSWER_LINE, majority
from stepladder.mcq.voting import first_round, is_decided
from stepladder.records import LETTERS, Message, Prediction, Question


@pytest.mark.parametrize(
    ("votes", "most", "decided"),
    [
        ("AA", 5, True),
        ("AB", 5, False),
        ("ABA", 5, False),
        ("ABAA", 5, True),
        ("ABAB", 5, False),
        ("ABABC", 5, True),  # all are asked
        ("ABA", 4, False),  # B can draw level
        ("ABC", 4, False),
        ("..", 5, False),  # nothing that could be read decides nothing
        (".A", 5, False),
        ("A", 1, True),
        ("A", 2, False),
        ("AB", 2, True),
        ("ABA", 3, True),
        ("", 3, False),
    ],
)
def test_when_a_vote_is_decided(votes: str, most: int, decided: bool) -> None:
    assert is_decided([None if letter == "." else letter for letter in votes], most) == decided


def test_nobody_who_cannot_be_overtaken_is_asked_about_again() -> None:
    """Where a vote stops because nothing that is left could change it, the full vote ends the same."""
    for votes in product("ABC", repeat=5):
        stopped = next(n for n in range(first_round(5), 6) if is_decided(votes[:n], 5))
        ahead = sorted((votes[:stopped].count(letter) for letter in "ABC"), reverse=True)
        if ahead[0] - ahead[1] > 5 - stopped:
            assert majority(votes[:stopped]) == majority(votes)


def questions(count: int) -> list[Question]:
    return [
        Question(
            id=f"p{n}#0", problem_id=f"p{n}", problem=f"Problem {n}.", question="?", options=("a", "b", "c", "d"),
            answer="A", language="en", source="s",
        )
        for n in range(count)
    ]  # fmt: skip


class Script:
    """Answers question ``n`` with the option whose original letter stands at the place of the vote in ``said[n]``."""

    def __init__(self, *said: str) -> None:
        self.said, self.rounds = said, list[int]()

    def __call__(self, requests: Sequence[Request]) -> Mapping[str, Response]:
        self.rounds.append(len(requests))
        return {request.key: self.answer(request) for request in requests}

    def answer(self, request: Request) -> Response:
        text = request.messages[-1].content
        number = next(n for n in range(len(self.said)) if f"Problem {n}." in text)
        option = "abcd"[LETTERS.index(self.said[number][request.sample_index])]
        shown = next(line[0] for line in text.split("\n") if line[1:].strip(" .:)") == option)
        line = ANSWER_LINE["en"].format(shown)
        return Response(text=line, max_tokens=9, prompt_tokens=1, completion_tokens=7)


def asked(script: Script, **settings: object) -> list[Prediction]:
    chosen = Predict.model_validate({"votes": 5, "temperature": 0.7} | settings)
    return vote(Poll(questions(len(script.said)), "m", "model", chosen, 1), script)


def test_adaptive_votes_are_spent_where_they_disagree() -> None:
    script = Script("AAAAA", "ABAAA", "ABCDA", "BABBA")
    found = asked(script, adaptive=True)
    assert ["".join(map(str, one.votes)) for one in found] == ["AA", "ABAA", "ABCDA", "BABB"]
    assert [one.answer for one in found] == ["A", "A", "A", "B"]
    assert script.rounds == [8, 3, 3, 1]
    assert found[0].tokens == (7, 7)
    fixed = Script(*script.said)
    assert [one.answer for one in asked(fixed)] == ["A", "A", "A", "B"]
    assert fixed.rounds == [20]


def test_adaptive_votes_are_the_first_of_the_fixed_ones() -> None:
    """So what one asked is in the ledger for the other."""
    adaptive, fixed = asked(Script("ABAAA"), adaptive=True)[0], asked(Script("ABAAA"))[0]
    assert fixed.votes[: len(adaptive.votes)] == adaptive.votes


def test_one_vote_is_one_vote() -> None:
    for adaptive in (False, True):
        script = Script("BAAAA")
        (found,) = asked(script, votes=1, temperature=0, adaptive=adaptive)
        assert (found.votes, script.rounds) == (("B",), [1])


class Sure(Script):
    """Finds the letter it named thrice as likely as the next one shown, and others among its likeliest tokens."""

    def answer(self, request: Request) -> Response:
        *before, last = request.messages
        if last.role != "assistant":
            return super().answer(request)
        assert last.content == "Answer:"  # up to where the letter stands
        named = super().answer(request.model_copy(update={"messages": tuple(before)})).text[-1]
        other = "ABCD"[("ABCD".index(named) + 1) % 4]
        top = {f" {named}": -0.5, f" {other}": -0.5 - math.log(3), " the": -1.0, "E": -1.1}
        place = TokenLogprob(token=f" {named}", logprob=-0.5, top=top)
        return Response(text=named, max_tokens=1, prompt_tokens=1, completion_tokens=1, logprobs=(place,))


def test_probabilities_are_those_of_the_letters_where_they_stand() -> None:
    """One request of one token for each answer that could be read; letters are those of the original order."""
    script = Sure("B", "D")
    one, other = asked(script, votes=1, temperature=0, probabilities=True)
    assert one.likely == pytest.approx({"B": 0.75, "C": 0.25})
    assert other.likely == pytest.approx({"D": 0.75, "A": 0.25})
    assert script.rounds == [2, 2]
    (mixed,) = asked(Sure("AAAAA"), probabilities=True)  # in every order another letter stands next to it
    assert mixed.likely["A"] == pytest.approx(0.75)
    assert sum(mixed.likely.values()) == pytest.approx(1)
    assert len(mixed.likely) > 2
    assert asked(Sure("ABAAA"))[0].likely == {}


class Endless(Sure):
    """Never comes to an end, unless the answer line is begun for it."""

    def answer(self, request: Request) -> Response:
        if request.messages[-1].role == "assistant":
            begun, _, _ = request.messages[-1].content.rpartition("\n")
            assert begun == "And so on"
            messages = (*request.messages[:-1], Message(role="assistant", content="Answer:"))
            return super().answer(request.model_copy(update={"messages": messages}))
        return Response(text="And so on", finish="length", max_tokens=9, prompt_tokens=1, completion_tokens=9)


def test_a_model_that_names_no_letter_is_made_to() -> None:
    """By one request of one token, on the first of its answers."""
    script = Endless("B", "D")
    one, other = asked(script, votes=1, temperature=0)
    assert [(found.answer, found.forced, found.letter, found.likely) for found in (one, other)] == [
        (None, "B", "B", {}),
        (None, "D", "D", {}),
    ]
    assert script.rounds == [2, 2]
    script = Endless("ABCDA")
    (found,) = asked(script)
    assert (found.votes, found.forced, script.rounds) == ((None,) * 5, "A", [5, 1])


def test_real_votes_cost_less_for_the_same_accuracy(contest: Path) -> None:
    """Recorded votes of a Qwen2.5-32B in 4 bits (the bounds are those that docs/experiments.md reports)."""
    from stepladder.mcq.votefile import read_votes

    said, labels = read_votes(contest / "recorded_votes.jsonl")
    name = "models_merge_lr_deepseek_quant_lora_0.7_Qwen2.5-32B-Instruct"
    full = {q: tuple(votes[name]) for q, votes in said.items() if len(votes.get(name, ())) == 5}
    stops = {q: next(n for n in range(2, 6) if is_decided(votes[:n], 5)) for q, votes in full.items()}
    right = [majority(votes) == labels[q] for q, votes in full.items()]
    early = [majority(votes[: stops[q]]) == labels[q] for q, votes in full.items()]
    assert sum(stops.values()) <= 0.45 * 5 * len(full)
    assert abs(sum(early) - sum(right)) <= 3
