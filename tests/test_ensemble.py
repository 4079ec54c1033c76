"""One answer from several, by each rule, against answers counted by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import verdict
from rich.console import Console

from stepladder.commands.choose_rule import cross_validate, show, to_json
from stepladder.config import Config, Ensemble, Member, Model, Price, Questions, Rung, Variants, load
from stepladder.context import STAGES, Context, parts
from stepladder.documents import CrossValidation
from stepladder.ensembling.rules import RULES, Ballot, ballot
from stepladder.ensembling.selection import _beats, choose, folds, rules, select
from stepladder.errors import ConfigError, InputError, UserError
from stepladder.mcq.answerfile import submission
from stepladder.progress import Progress
from stepladder.records import Prediction, Question, Record, lines, read
from stepladder.reporting import words
from stepladder.reporting.content import FinalAnswer, Report, Run
from stepladder.stages import ensemble
from stepladder.stages.ensemble import combine
from stepladder.stages.predictions import eligible, leader
from stepladder.workspace import Workspace


def cast(*answers: str, letters: str = "ABCD") -> Ballot:
    """A ballot of members who answered so: ``"AB."`` is A, B and then nothing that could be read."""
    votes = [[(None if letter == "." else letter,) for letter in given] for given in answers]
    return ballot([f"m{n}" for n in range(len(answers))], votes, letters)


def decided(rule: str, known: Ballot, right: str, asked: Ballot) -> str:
    """What a rule answers after it was fitted on questions whose right letters are known."""
    letters = RULES[rule](known, np.array(["ABCD".index(letter) for letter in right]))(asked)
    return "".join("." if letter < 0 else "ABCD"[letter] for letter in letters)


LEADS = ("AAAA", "AAAB", "AABB"), "AAAA"
"""The first member leads."""


@pytest.mark.parametrize(
    ("votes", "single", "vote", "leader"),
    [
        ("ABB", "A", "B", "B"),  # the others agree: follow them
        ("ABC", "A", "A", "A"),  # they do not: the leader
        ("AAB", "A", "A", "A"),
        (".BC", ".", "B", "B"),  # a leader that cannot be read does not decide
        ("A..", "A", "A", "A"),  # others that agree on nothing decide nothing
        ("...", ".", ".", "."),
    ],
)
def test_rules(votes: str, single: str, vote: str, leader: str) -> None:
    known, right = LEADS
    given = [decided(rule, cast(*known), right, cast(*votes)) for rule in ("single", "vote", "leader")]
    assert given == [single, vote, leader]


def test_the_leader_may_stand_anywhere() -> None:
    known = cast("BBBB", "BBAB", "AAAA")
    assert decided("leader", known, "AAAA", cast("B", "C", "A")) == "A"
    assert decided("vote", known, "AAAA", cast("B", "C", "A")) == "A"
    assert decided("single", known, "AAAA", cast("B", "C", "A")) == "A"


def test_a_good_member_outweighs_two_that_guess() -> None:
    known = cast("AAAAAAAAAA", "AAAAABBBBB", "BBBBBAAAAA")
    assert decided("weighted", known, "A" * 10, cast("A", "B", "B")) == "A"
    assert decided("vote", known, "A" * 10, cast("A", "B", "B")) == "B"
    assert decided("selector", known, "A" * 10, cast("A", "B", "B")) == "A"
    # A member that is always wrong has no voice, rather than a negative one.
    assert decided("weighted", cast("AAAA", "BBBB"), "AAAA", cast("B", "A")) == "B"


def test_probabilities_are_averaged_where_there_are_some() -> None:
    sure, unsure = [("A", "A", "A", "A")], [("B", "B", "A", "A")]
    graded = ballot(["x", "y", "z"], [sure, unsure, unsure], "AB")
    assert graded.graded
    assert graded.answers[:, 0].tolist() == [0, 1, 1]
    known = cast("AAAA", "AAAB", "AABB")
    assert RULES["average"](known, np.zeros(4, dtype=np.int64))(graded).tolist() == [0]
    assert rules(graded) == tuple(RULES)
    assert "average" not in rules(cast("AB", "BA"))


def test_a_sure_member_outweighs_two_that_waver() -> None:
    """Probabilities go before what samples share, where there are any."""
    likely: list[list[dict[str, float]]] = [[{"A": 0.95, "B": 0.05}], [{"A": 0.4, "B": 0.6}], [{}]]
    graded = ballot(["x", "y", "z"], [[("A",)], [("B",)], [("B", "A", "B", "B")]], "AB", likely)
    assert graded.shares[:, 0].tolist() == [[0.95, 0.05], [0.4, 0.6], [0.25, 0.75]]
    known = cast("AAAA", "AAAB", "AABB")
    assert RULES["average"](known, np.zeros(4, dtype=np.int64))(graded).tolist() == [0]
    assert RULES["vote"](known, np.zeros(4, dtype=np.int64))(graded).tolist() == [1]


def test_the_selector_learns_whom_to_follow() -> None:
    """The third member is right where the second agrees with it, the first one elsewhere."""
    draw = np.random.default_rng(0)
    right = draw.integers(0, 4, 400)
    hard = draw.random(400) < 0.4
    wrong = (right + 1) % 4
    first = np.where(hard, wrong, right)
    third = np.where(hard, right, (right + 2) % 4)
    second = np.where(hard, third, (right + 3) % 4)
    answers = np.stack([first, second, third])
    made = Ballot(("a", "b", "c"), answers, (answers[:, :, None] == np.arange(4)).astype(float))
    known, asked = made.take(np.arange(200)), made.take(np.arange(200, 400))
    hits = {name: (RULES[name](known, right[:200])(asked) == right[200:]).mean() for name in ("single", "selector")}
    assert hits["single"] < 0.65
    assert hits["selector"] > 0.95


@pytest.mark.parametrize(("gained", "lost", "chosen"), [(1, 0, "single"), (5, 4, "single"), (9, 1, "vote")])
def test_an_ensemble_must_beat_its_best_member_by_more_than_luck(gained: int, lost: int, chosen: str) -> None:
    """The first member is always the best; the other two agree with each other against it on some questions."""
    own = "B" * gained + "A" * (lost + 60)
    others = "A" * gained + "B" * lost + "A" * 60
    members = [own, others[:-30] + "C" * 30, others[:-45] + "C" * 15 + "A" * 15 + "D" * 15]
    right = np.zeros(len(own), dtype=np.int64)
    choice = choose(cast(*members), right, np.arange(len(own)), seed=0)
    assert (choice == "single") == (chosen == "single")


def test_no_problem_is_on_both_sides_of_a_fold() -> None:
    groups = np.repeat(np.arange(23), 3)
    parts = folds(groups, 5, seed=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(69))
    for part in parts:
        assert not set(groups[part]) & set(np.delete(groups, part))
    assert max(map(len, parts)) - min(map(len, parts)) <= 3
    with pytest.raises(ValueError, match="two problems"):
        folds(np.zeros(4, dtype=np.int64), 5, seed=1)


def test_the_choice_is_scored_on_questions_that_it_has_not_seen() -> None:
    """Members that guess: no rule is better than guessing, whatever it was on the questions it was chosen on."""
    draw = np.random.default_rng(3)
    answers = draw.integers(0, 2, (6, 300))
    right = draw.integers(0, 2, 300)
    made = Ballot(tuple("abcdef"), answers, (answers[:, :, None] == np.arange(2)).astype(float))
    found = select(made, right, [f"p{n // 2}" for n in range(300)], seed=0)
    assert found.choice == "single"
    assert abs(found.chosen.accuracy - 0.5) < 0.08
    assert found.chosen.interval.low < 0.5 < found.chosen.interval.high
    assert found.oracle > 0.95
    assert all(value is not None and abs(value) < 0.25 for value in found.correlation.values())
    again = select(made, right, [f"p{n // 2}" for n in range(300)], seed=0)
    assert again == found


def row(question: str, member: str, answer: str | None) -> Prediction:
    return Prediction(question_id=question, member=member, votes=(answer,), answer=answer, texts=("t",))


def test_combined_predictions_keep_every_members_vote() -> None:
    given = {
        name: [row("p#0", name, letter), row("p#1", name, None)] for name, letter in zip("xyz", "ABB", strict=True)
    }
    given["y"][1] = given["y"][1].model_copy(update={"forced": "C"})
    first, second = combine(given, np.array([1, -1]), "y")
    assert (first.answer, first.votes, first.member) == ("B", ("A", "B", "B"), "ensemble")
    assert (second.answer, second.forced, second.votes) == (None, "C", (None, None, None))


def test_the_answer_file_has_the_contests_format_and_an_answer_for_every_question() -> None:
    questions = [
        Question(
            id=f"p{n // 2}#{n % 2}", problem_id=f"p{n // 2}", problem="", question="", options=("1", "2"),
            language="en", source="s",
        )
        for n in range(3)
    ]  # fmt: skip
    answers = [row(q.id, "ensemble", letter) for q, letter in zip(questions, ("B", None, None), strict=True)]
    answers[2] = answers[2].model_copy(update={"forced": "B"})
    assert submission(questions, answers).splitlines() == [
        '{"id": "p0", "questions": [{"answer": "B"}, {"answer": "A"}]}',
        '{"id": "p1", "questions": [{"answer": "B"}]}',
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
            questions=Questions(train=str(folder / "train.jsonl")),
            models={"m": api, "n": api},
            rung=(Rung(name="worked", kind="worked"),),
            variants=Variants(models=("m",), agree=1),
            member=members,
            ensemble=Ensemble.model_validate({"rule": rule}),
        )
        self.screen = StringIO()
        progress = Progress(Console(file=self.screen, width=200))
        self.context = Context(self.config, Workspace(folder / "runs", "tiny"), progress)
        self.run = self.context.workspace.folder
        put(self.run / "questions/validation.jsonl", QUESTIONS)
        for name in STAGES[:-2]:
            for part in parts(self.config, name):
                put(self.run / name / (part or "") / "manifest.json", {"fingerprint": "", "files": {}})
        for name, letters in (ANSWERS | answers).items():
            self.answers(name, letters)

    def answers(self, name: str, letters: str) -> None:
        given = [row(q.id, name, letter) for q, letter in zip(QUESTIONS, letters, strict=True)]
        put(self.run / "predictions" / name / "quantised.validation.jsonl", given)
        (self.run / "quantised" / name).mkdir(exist_ok=True, parents=True)
        verdict(quantised=letters.count("A") / len(letters)).write(self.run / "quantised" / name)

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
    fields = {"rule": "single", "leader": "a", "validation": None, "asked": "auto", "alone": True} | choice
    run = Run.model_construct(members=("a", "b", "c"), best_member="a")
    return words.ensemble(Report.model_construct(ensemble=FinalAnswer.model_validate(fields), run=run))


def test_the_report_says_who_has_no_vote_and_why() -> None:
    said = "The final answer is the answers of the best member, a, alone (rule “single”, chosen by cross-validation)."
    assert told(members=["a", "b", "c"]) == said
    assert told(members=["a", "b"]) == f"{said} The variants did not help c on validation, so it has no vote."
    assert told(members=["a"]) == f"{said} The variants did not help b, c on validation, so they have no vote."
    # It was asked for a vote, and there is one voter left.
    assert told(members=["a"], asked="vote").startswith(said)
    assert "set in the configuration" in told(members=["a", "b"], asked="single")


def test_the_report_says_what_any_rule_could_reach() -> None:
    pairs = (("a", "b", 0.25), ("a", "c", None))
    choice = FinalAnswer.model_construct(validation=CrossValidation.model_construct(oracle=0.5, correlation=pairs))
    assert words.diversity(Report.model_construct(ensemble=choice)) == (
        "At least one member is right on 50.0\u00a0% of the validation questions: the most that any rule could reach. "
        "Correlation of the members' errors (1: they err on the same questions): a and b 0.25."
    )


@pytest.mark.parametrize(
    ("won", "lost", "beats"), [(1, 0, False), (2, 0, False), (3, 0, True), (9, 7, False), (20, 9, True)]
)
def test_one_problem_won_is_luck(won: int, lost: int, beats: bool) -> None:
    gains = np.array([1.0] * won + [-1.0] * lost + [0.0] * 323)
    assert _beats(gains, np.arange(len(gains))) == beats


# stepladder choose-rule


def recorded(folder: Path, count: int = 60) -> Path:
    """Votes of a member that is always right, two that guess, and one that nobody can read."""
    draw = np.random.default_rng(0)
    path = folder / "votes.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            gold = "AB"[draw.integers(2)]
            votes = {"good": [gold] * 3, "mute": ["?"]} | {m: ["AB"[draw.integers(2)]] for m in ("x", "y")}
            file.write(json.dumps({"id": f"p{n // 2}#{n % 2}", "gold": gold, "votes": votes}) + "\n")
    return path


def test_recorded_votes_are_judged_like_a_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, questions = cross_validate(recorded(tmp_path), ["x", "good", "y", "mute"], seed=0)
    assert (questions, found.choice, found.leader, found.oracle) == (60, "single", "good", 1.0)
    assert found.rules["single"].accuracy == 1
    assert found.rules["vote"].accuracy < 1
    row = json.loads(to_json(found, questions))
    assert row["rules"]["single"]["accuracy"] == row["chosen"]["accuracy"] == 1
    assert row["correlation"][2] == ["x", "mute", None]
    screen = StringIO()
    show(found, questions, Console(file=screen, width=120))
    assert "60 questions. Use one model, good." in screen.getvalue()


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (["good"], "give at least two"),
        (["good", "god"], "'god': no votes of it in .*did you mean good"),
        (["x", "y", "x"], "'x' is named twice"),
    ],
)
def test_members_that_cannot_be_judged(tmp_path: Path, members: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        cross_validate(recorded(tmp_path), members, seed=0)


def test_questions_of_one_problem_cannot_be_held_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one problem only"):
        cross_validate(recorded(tmp_path, 2), ["x", "y"], seed=0)


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
            "member 'more' has control = 'plain', which must name a member that is trained without variants, and",
        ),
        ('control = "plain"', 'control = "more"', "'more' has control = 'more', which must name a member that"),
        ('control = "plain"', 'control = "gone"', "'more' has control = 'gone', which must name a member that"),
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
