"""One answer from several, by each rule, against answers counted by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stepladder.config import Config, Ensemble, Member, Model, Price, Questions, Rung, Variants, load
from stepladder.errors import ConfigError
from stepladder.progress import Progress
from stepladder.records import Prediction, Question, Record, lines, read
from stepladder.reporting import words
from stepladder.stages import ensemble, flow
from stepladder.stages.ensemble import choose, combine, decide, submission
from stepladder.stages.predictions import eligible, leader
from stepladder.workspace import Workspace


@pytest.mark.parametrize(
    ("votes", "single", "vote", "leader"),
    [
        (("A", "B", "B"), "A", "B", "B"),  # the others agree: follow them
        (("A", "B", "C"), "A", "A", "A"),  # they do not: the leader
        (("A", "A", "B"), "A", "A", "A"),
        ((None, "B", "C"), None, "B", "B"),  # a leader that cannot be read does not decide
        (("A", None, None), "A", "A", "A"),  # others that agree on nothing decide nothing
        ((None, None, None), None, None, None),
        (("A",), "A", "A", "A"),
    ],
)
def test_rules(votes: tuple[str | None, ...], single: str | None, vote: str | None, leader: str | None) -> None:
    assert [decide(rule, 0, votes) for rule in ("single", "vote", "leader")] == [single, vote, leader]


@pytest.mark.parametrize(
    ("gained", "lost", "chosen"), [(1, 0, "single"), (5, 0, "single"), (6, 0, "vote"), (9, 3, "single")]
)
def test_an_ensemble_must_beat_its_best_member_by_more_than_luck(gained: int, lost: int, chosen: str) -> None:
    single = [False] * gained + [True] * (lost + 20)
    vote = [True] * gained + [False] * lost + [True] * 20
    assert choose({"single": single, "vote": vote, "leader": single}) == chosen


def test_the_leader_may_stand_anywhere() -> None:
    assert decide("leader", 2, ("B", "C", "A")) == "A"
    assert decide("vote", 2, ("B", "C", "A")) == "A"


def row(question: str, member: str, answer: str | None) -> Prediction:
    return Prediction(question_id=question, member=member, votes=(answer,), answer=answer, texts=("t",))


def test_combined_predictions_keep_every_members_vote() -> None:
    given = {"x": [row("p#0", "x", "A")], "y": [row("p#0", "y", "B")], "z": [row("p#0", "z", "B")]}
    (combined,) = combine("leader", "x", given)
    assert combined.answer == "B"
    assert combined.votes == ("A", "B", "B")
    assert combined.member == "ensemble"


def test_the_answer_file_has_the_contests_format_and_an_answer_for_every_question() -> None:
    questions = [
        Question(
            id=f"p{n // 2}#{n % 2}", problem_id=f"p{n // 2}", problem="", question="", options=("1", "2"),
            language="en", source="s",
        )
        for n in range(3)
    ]  # fmt: skip
    answers = [row(q.id, "ensemble", letter) for q, letter in zip(questions, ("B", None, "A"), strict=True)]
    assert submission(questions, answers).splitlines() == [
        '{"id": "p0", "questions": [{"answer": "B"}, {"answer": "A"}]}',
        '{"id": "p1", "questions": [{"answer": "A"}]}',
    ]


# The gate: who learned from variants must do as well as who did not


QUESTIONS = [
    Question(
        id=f"p{n}#0", problem_id=f"p{n}", problem="", question="", options=("1", "2", "3"), answer="A", language="en",
        source="s",
    )
    for n in range(4)
]  # fmt: skip
ANSWERS = {"plain": "AABB", "more": "ABBB", "other": "AACC"}
"""What each member answers; A is right."""


def put(path: Path, content: dict[str, Any] | Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) if isinstance(content, dict) else "".join(lines(content)), encoding="utf-8")


class Finished:
    """A run of some members, up to the ensemble."""

    def __init__(self, folder: Path, *members: Member, rule: str = "auto", **answers: str) -> None:
        (folder / "train.jsonl").write_text("")
        price = Price.model_validate({"input": 0, "output": 0})
        api = Model(engine="openai", base_url=("http://127.0.0.1:9/v1",), price=price)
        self.config = Config(
            name="tiny",
            language="en",
            questions=Questions(train=folder / "train.jsonl"),
            models={"m": api, "n": api},
            rung=(Rung(name="worked", kind="worked"),),
            variants=Variants(models=("m",), agree=1),
            member=members,
            ensemble=Ensemble.model_validate({"rule": rule}),
        )
        self.screen = StringIO()
        progress = Progress(Console(file=self.screen, width=200))
        self.context = flow.Context(self.config, Workspace(folder / "runs", "tiny"), progress)
        self.run = self.context.workspace.folder
        put(self.run / "questions/validation.jsonl", QUESTIONS)
        for name in flow.NAMES[:-2]:
            for part in flow.stage(name).parts(self.config):
                put(self.run / name / (part or "") / "manifest.json", {"fingerprint": "", "files": {}})
        for name, letters in (ANSWERS | answers).items():
            self.answers(name, letters)

    def answers(self, name: str, letters: str) -> None:
        given = [row(q.id, name, letter) for q, letter in zip(QUESTIONS, letters, strict=True)]
        put(self.run / "predictions" / name / "quantised.validation.jsonl", given)
        put(self.run / "quantised" / name / "verdict.json", {"quantised": letters.count("A") / len(letters)})

    def build(self) -> dict[str, Any]:
        """The choice that was made; the answers are in ``out``."""
        out = self.context.workspace.runs / "out"
        out.mkdir(exist_ok=True)
        ensemble.build(self.context, None, out)
        choice: dict[str, Any] = json.loads((out / "choice.json").read_text(encoding="utf-8"))
        return choice

    def votes(self) -> list[tuple[str | None, ...]]:
        return [one.votes for one in read(self.context.workspace.runs / "out/validation.jsonl", Prediction)]

    def said(self) -> str:
        return " ".join(self.screen.getvalue().split())


PLAIN, OTHER = Member(name="plain"), Member(name="other")
MORE = Member(name="more", variants=True, control="plain")


@pytest.mark.parametrize(
    ("letters", "stays"), [("AABB", True), ("CAAB", True), ("AAAB", True), ("ABBB", False), ("BBBB", False)]
)
def test_a_member_with_variants_stays_if_it_does_as_well_as_its_control(
    tmp_path: Path, letters: str, stays: bool
) -> None:
    finished = Finished(tmp_path, PLAIN, MORE, OTHER, more=letters)
    names = ["plain", "more", "other"] if stays else ["plain", "other"]
    assert eligible(finished.context) == names
    assert finished.build()["members"] == names
    assert {len(votes) for votes in finished.votes()} == {len(names)}
    assert ("without more: the variants did not help on validation" in finished.said()) == (not stays)
    assert leader(finished.context) == ("more" if letters.count("A") > 2 else "plain")


def test_a_member_that_was_refused_decides_nothing(tmp_path: Path) -> None:
    """With both the vote would be B on two questions."""
    also = MORE.model_copy(update={"name": "also"})
    finished = Finished(tmp_path, PLAIN, MORE, also, rule="vote", plain="AAAC", more="ABBB", also="BABB")
    choice = finished.build()
    assert (choice["members"], choice["rule"], choice["leader"]) == (["plain"], "single", "plain")
    assert finished.votes() == [("A",), ("A",), ("A",), ("C",)]
    assert "without more, also: the variants did not help" in finished.said()


def test_variants_without_a_control_are_not_measured(tmp_path: Path) -> None:
    alone = MORE.model_copy(update={"control": None})
    finished = Finished(tmp_path, PLAIN, alone, more="BBBB")
    assert finished.build()["members"] == ["plain", "more"]


def test_the_ensemble_is_made_again_where_a_member_comes_or_goes(tmp_path: Path) -> None:
    finished = Finished(tmp_path, PLAIN, MORE)
    before = ensemble.artifact(finished.context, None).fingerprint
    finished.answers("more", "ABBC")
    assert ensemble.artifact(finished.context, None).fingerprint == before
    finished.answers("more", "AABB")
    assert ensemble.artifact(finished.context, None).fingerprint != before


def told(**choice: Any) -> str:
    validation = {"single": 0.5, "vote": 0.5, "leader": 0.5}
    chosen = {"rule": "single", "leader": "a", "asked": "auto", "alone": True, "validation": validation} | choice
    return words.ensemble({"ensemble": chosen, "run": {"members": ["a", "b", "c"], "best_member": "a"}})


def test_the_report_says_who_has_no_vote_and_why() -> None:
    scores = "single 50.0\u00a0%, vote 50.0\u00a0%, leader 50.0\u00a0%"
    said = (
        f"The final answer is the answers of the best member, a, alone (rule “single”, chosen on validation: {scores})."
    )
    assert told(members=["a", "b", "c"]) == said
    assert told(members=["a", "b"]) == f"{said} The variants did not help c on validation, so it has no vote."
    assert told(members=["a"]) == f"{said} The variants did not help b, c on validation, so they have no vote."
    # It was asked for a vote, and there is one voter left.
    assert told(members=["a"], asked="vote").startswith(said)
    assert "set in the configuration" in told(members=["a", "b"], asked="single")


TOML = """
name = "run"
language = "en"

[questions]
train = "train.jsonl"

[models.m]

[models.n]

[models.o]

[[rung]]
name = "worked"
kind = "worked"

[variants]
models = ["m"]

[[member]]
name = "plain"

[[member]]
name = "more"
variants = true
control = "plain"
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", None),
        ('control = "plain"', "", None),
        (
            "variants = true\n",
            "",
            "member 'more' has control = 'plain', which must name a member without variants, and",
        ),
        ('control = "plain"', 'control = "more"', "'more' has control = 'more', which must name a member without"),
        ('control = "plain"', 'control = "gone"', "'more' has control = 'gone', which must name a member without"),
        ('[variants]\nmodels = ["m"]', "", "member 'more' has variants = true, but there is no table [variants]"),
    ],
)
def test_a_control_is_a_member_without_variants(tmp_path: Path, old: str, new: str, said: str | None) -> None:
    assert old in TOML
    path = tmp_path / "run.toml"
    path.write_text(TOML.replace(old, new))
    if said is None:
        assert load(path).member[1].variants
        return
    with pytest.raises(ConfigError) as error:
        load(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
