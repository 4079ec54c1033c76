"""Which labels are wrong: on votes whose truth is known because they were drawn from it."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepladder import cli
from stepladder.mcq.labels import Votes, weigh

LETTERS = "ABCD"


class Drawn:
    """Questions with a known truth, labels of which some are wrong, and voters of known accuracy."""

    def __init__(
        self, questions: int, accuracy: dict[str, float], wrong: float, seed: int = 1, copies: int = 0
    ) -> None:
        dice = random.Random(1)
        self.truth = {f"q{n}": dice.choice(LETTERS) for n in range(questions)}
        self.labels = {q: self._other(dice, t) if dice.random() < wrong else t for q, t in self.truth.items()}
        self.votes = {
            q: {m: [t if dice.random() < a else self._other(dice, t)] for m, a in accuracy.items()}
            for q, t in self.truth.items()
        }
        for said in self.votes.values():  # voters that repeat the last one word for word
            for copy in range(copies):
                said[f"copy {copy}"] = said[[*accuracy][-1]]

    @staticmethod
    def _other(dice: random.Random, letter: str) -> str:
        return dice.choice([other for other in LETTERS if other != letter])

    @property
    def mislabelled(self) -> set[str]:
        return {q for q, t in self.truth.items() if self.labels[q] != t}


def hits(first: list[str], drawn: Drawn) -> float:
    """Share of the wrong labels among as many that come first."""
    return len(set(first[: len(drawn.mislabelled)]) & drawn.mislabelled) / len(drawn.mislabelled)


def counted(drawn: Drawn) -> list[str]:
    """Ranked by heads: votes for the strongest other letter less those for the label."""

    def margin(q: str) -> int:
        said = [given[0] for given in drawn.votes[q].values()]
        return max(said.count(letter) for letter in LETTERS if letter != drawn.labels[q]) - said.count(drawn.labels[q])

    return sorted(drawn.votes, key=margin, reverse=True)


def test_wrong_labels_come_first() -> None:
    drawn = Drawn(1000, {f"m{n}": 0.7 + 0.03 * n for n in range(8)}, wrong=0.05)
    found = weigh(drawn.votes, drawn.labels)
    assert hits([suspect.id for suspect in found.suspects], drawn) > 0.9
    for suspect in found.suspects[: len(drawn.mislabelled) // 2]:
        assert suspect.suggested == drawn.truth[suspect.id]
        assert suspect.score > 0


def test_it_finds_more_than_counting_heads() -> None:
    accuracy = {"good": 0.95, "also good": 0.9, "fair": 0.8, **{f"guess {n}": 0.35 for n in range(6)}}
    drawn = Drawn(1000, accuracy, wrong=0.05)
    ranked = [suspect.id for suspect in weigh(drawn.votes, drawn.labels).suspects]
    assert hits(ranked, drawn) > hits(counted(drawn), drawn) + 0.1


def test_accuracies_are_found_without_the_labels() -> None:
    accuracy = {"good": 0.95, "fair": 0.8, "poor": 0.5, "other": 0.75, "another": 0.85}
    drawn = Drawn(1500, accuracy, wrong=0.5)
    found = weigh(drawn.votes, drawn.labels).accuracy
    assert {model: pytest.approx(share, abs=0.05) for model, share in accuracy.items()} == found


def test_one_good_voter_outweighs_two_that_guess() -> None:
    drawn = Drawn(600, {"good": 0.97, "also good": 0.95, "guess": 0.3, "guess too": 0.3}, wrong=0.0)
    votes = {**drawn.votes, "asked": {"good": ["A"], "also good": ["A"], "guess": ["B"], "guess too": ["B"]}}
    found = weigh(votes, {**drawn.labels, "asked": "B"})
    assert found.suspects[0].id == "asked"
    assert found.suspects[0].suggested == "A"


def test_voters_that_copy_one_another_do_not_count_twice() -> None:
    accuracy = {f"m{n}": 0.75 for n in range(5)}
    drawn, copied = Drawn(500, accuracy, wrong=0.05), Drawn(500, accuracy, wrong=0.05, copies=20)
    alone, crowd = weigh(drawn.votes, drawn.labels), weigh(copied.votes, copied.labels)
    assert 3 < alone.independent < 5.5
    assert crowd.independent < alone.independent  # 25 voters, of which 21 are one


def test_repeated_samples_share_one_vote_and_unreadable_ones_have_none() -> None:
    votes: dict[str, Votes] = {
        "q": {"a": ["A", "A", "B", None], "b": [None, ""], "c": ["A"]},
        "none": {"a": [None]},
        "strange": {},
    }
    found = weigh(votes, {"q": "B", "none": "A", "strange": "A", "unknown": "A"})
    assert [(suspect.id, suspect.suggested) for suspect in found.suspects] == [("q", "A")]


def test_without_votes_there_is_nothing_to_say() -> None:
    assert weigh({}, {}).suspects == []
    assert weigh({"q": {"m": ["A"]}}, {"q": "A"}).suspects == []


Voted = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.lists(st.sampled_from([None, "A", "B", "C"]), max_size=3), max_size=3
)


@given(st.lists(st.tuples(Voted, st.sampled_from("ABC")), max_size=6))
def test_any_votes_give_a_ranking(rows: list[tuple[dict[str, list[str | None]], str]]) -> None:
    votes = {f"q{n}": said for n, (said, _) in enumerate(rows)}
    labels = {f"q{n}": label for n, (_, label) in enumerate(rows)}
    found = weigh(votes, labels)
    scores = [suspect.score for suspect in found.suspects]
    assert scores == sorted(scores, reverse=True)
    for suspect in found.suspects:
        assert suspect.label == labels[suspect.id] != suspect.suggested
        assert suspect.suggested in {letter for said in votes[suspect.id].values() for letter in said}
    assert all(0 < share < 1 for share in found.accuracy.values())


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["stepladder", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_writes_a_ranked_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = Drawn(60, {f"m{n}": 0.85 for n in range(6)}, wrong=0.1)
    file, out = tmp_path / "votes.jsonl", tmp_path / "out.jsonl"
    rows = ({"id": q, "gold": drawn.labels[q], "votes": said} for q, said in drawn.votes.items())
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(monkeypatch, "audit", "--votes", file, "--out", out) == 0
    assert "6 models on 60 questions" in capsys.readouterr().out
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert {tuple(row) for row in written} == {("id", "label", "suggested", "score")}
    assert {row["id"] for row in written[:3]} <= drawn.mislabelled
    before = out.read_bytes()
    assert run(monkeypatch, "audit", "--votes", file, "--out", out) == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], "votes.jsonl:1: is not an object"),
        ({"gold": "A", "votes": {}}, "votes.jsonl:1: field 'id'"),
        ({"id": "q", "gold": "AB", "votes": {}}, "votes.jsonl:1: field 'gold': 'AB' is not a letter"),
        ({"id": "q", "gold": "A", "votes": {"m": "A"}}, "votes.jsonl:1: field 'votes'"),
        (None, "holds no votes"),
    ],
)
def test_bad_votes_are_named(
    row: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "votes.jsonl"
    file.write_text("" if row is None else json.dumps(row) + "\n")
    assert run(monkeypatch, "audit", "--votes", file, "--out", tmp_path / "out.jsonl") == 2
    assert said in "".join(capsys.readouterr().err.split("\n"))
    assert not (tmp_path / "out.jsonl").exists()
