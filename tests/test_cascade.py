"""What a rung accepts, which labels it doubts, and what a reviewer may do about them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import ApiServer

from stepladder import cli
from stepladder.answering.cascade import accepted_of
from stepladder.config import Rung
from stepladder.context import Context
from stepladder.errors import AskError
from stepladder.records import Question, Sample
from stepladder.stages import flow
from stepladder.stages.samples import Votes

TOML = """
name = "run"
language = "en"

[questions]
train = "train.jsonl"
validation = 0.05
REVIEWED

[models.one]
engine = "openai"
model = "test-model"
base_url = "URL"
api_key_env = "TEACHER_KEY"
price = { input = 1.0, output = 2.0 }

[models.two]
engine = "openai"
model = "other-model"
base_url = "URL"
api_key_env = "TEACHER_KEY"
price = { input = 1.0, output = 2.0 }

[[rung]]
name = "medium"
models = ["one", "two"]
RUNG

[[member]]
name = "a"
"""


def sample(answer: str | None, index: int = 0, model: str = "m", question: str = "q", label: str = "A") -> Sample:
    return Sample(
        question_id=question,
        rung="r",
        model=model,
        sample_index=index,
        permutation=(0, 1, 2),
        key=f"{model}{index}",
        text=f"Answer: {answer}",
        answer=answer,
        verdict="unparsed" if answer is None else "accepted" if answer == label else "wrong",
    )


def samples(letters: str) -> list[Sample]:
    return [sample(None if letter == "-" else letter, index) for index, letter in enumerate(letters)]


def rung(**more: Any) -> Rung:
    return Rung(name="r", models=("m",), orders=5, **more)


@pytest.mark.parametrize(
    ("letters", "all_", "majority", "trusted"),
    [
        ("AAA", "AAA", "AAA", "AAA"),
        ("AAB", "", "AA", "AA"),
        ("ABB", "", "", "BB"),
        ("A-", "", "A", "A"),
        ("AB", "", "", ""),
        ("AABB-", "", "", ""),
        ("--", "", "", ""),
        ("BBBA", "", "", "BBB"),
    ],
)
def test_what_counts_as_solved(letters: str, all_: str, majority: str, trusted: str) -> None:
    judged = samples(letters)
    rules = {
        "all": rung(),
        "majority": rung(accept="majority"),
        "trusted": rung(accept="majority", trust_majority=True),
    }
    found = {name: "".join(str(s.answer) for s in accepted_of(rule, judged)) for name, rule in rules.items()}
    assert found == {"all": all_, "majority": majority, "trusted": trusted}


def test_each_model_is_judged_on_its_own() -> None:
    judged = [sample("A", 0, "x"), sample("B", 1, "x"), sample("A", 0, "y"), sample("A", 1, "y")]
    assert {s.model for s in accepted_of(rung(), judged)} == {"y"}


def chains(*texts: str, model: str = "m", question: str = "q", label: str = "A") -> list[Sample]:
    """Right answers of one model, of different texts."""
    right = [sample("A", index, model, question, label) for index in range(len(texts))]
    return [one.model_copy(update={"text": text}) for one, text in zip(right, texts, strict=True)]


FAR = "First of all Bob is short, and whoever is short is not tall, so it cannot be him."
NEAR = "Ann is tall and Cleo is short, which is all that the text says about the two of them."


def test_of_the_right_chains_a_rung_keeps_the_most_different_of_each_question() -> None:
    judged = chains(NEAR, f"{NEAR} Yes.", FAR) + chains(NEAR, FAR, f"{FAR} No.", question="other")
    judged += chains(f"{FAR} So.", "Nobody else is left once all the others are ruled out by what is told.", model="n")
    mine = [judged[at] for at in (0, 1, 2, 6, 7)]
    other = judged[3:6]
    assert accepted_of(rung(), judged) == mine + other
    assert accepted_of(rung(keep=1), judged) == [mine[0], other[0]]
    assert accepted_of(rung(keep=2), judged) == [mine[0], mine[2], *other[:2]]
    assert accepted_of(rung(keep=9), judged) == [mine[0], mine[2], mine[4], *other[:2]]
    assert accepted_of(rung(keep=2), []) == []


def test_what_is_not_right_is_not_kept_however_different() -> None:
    wrong = sample("B", 7).model_copy(update={"text": "Something else altogether, which no other chain has said yet."})
    judged = [wrong, *chains(NEAR, FAR)]
    assert accepted_of(rung(keep=3), judged) == []
    assert accepted_of(rung(keep=3, accept="majority"), judged) == judged[1:]
    assert accepted_of(rung(keep=1, accept="majority"), judged) == judged[1:2]


def question(name: str, *, reviewed: bool = False) -> Question:
    return Question(
        id=name, problem_id=name, problem="P.", question="?", options=("x", "y", "z"), answer="A", language="en",
        source="s", reviewed=reviewed,
    )  # fmt: skip


def test_a_label_is_doubted_when_two_models_name_the_same_other_letter() -> None:
    said = {
        "both": ("B", "B"), "apart": ("B", "C"), "one": ("A", "B"), "right": ("A", "A"), "kept": ("B", "B"),
        "proved": ("B", "B"),
    }  # fmt: skip
    judged = [sample(letter, 0, f"m{n}", q) for q, letters in said.items() for n, letter in enumerate(letters)]
    judged.append(sample("A", 0, "worked", "proved"))
    votes = Votes()
    votes.add({name: question(name, reviewed=name == "kept") for name in said}, judged)
    (suspect,) = votes.suspects()
    assert suspect[:3] == ("both", "A", "B")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("api"), {"models": ["test-model", "other-model"]}) as server:
        yield server


class Project:
    """Thirty questions of two options; both models always say A, so in one order they are right or wrong together."""

    def __init__(self, folder: Path, api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._api, self._patch = folder, api, monkeypatch
        monkeypatch.chdir(folder)
        monkeypatch.setenv("TEACHER_KEY", "test-key")
        asked = {"question": "Who?", "options": ["Ann", "Bob"], "answer": "A"}
        rows = ({"id": f"p{n:02}", "problem": f"Problem {n}.", "questions": [asked]} for n in range(30))
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.write()

    def write(self, rung: str = "", reviewed: str = "", train: str = "") -> None:
        text = TOML.replace("URL", self._api.url).replace("RUNG", rung).replace("REVIEWED", reviewed) + train
        (self.folder / "run.toml").write_text(text)

    def run(self, *stages: str) -> int:
        for stage in stages:
            self._patch.setattr(sys, "argv", ["stepladder", stage, "run.toml"])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            if ended.value.code:
                return int(ended.value.code)
        return 0

    def rows(self, file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "runs/run" / file).read_text().splitlines()]


@pytest.fixture
def project(tmp_path: Path, api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path, api, monkeypatch)


def test_a_key_is_needed_only_for_what_is_still_to_be_asked(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert project.run("questions", "samples") == 0
    monkeypatch.delenv("TEACHER_KEY")
    context = Context.open(Path("run.toml"), Path("runs"))
    flow.check_keys(context)
    manifest = context.input("questions") / "manifest.json"
    written = manifest.read_bytes()
    manifest.unlink()  # questions come out the same again, and then samples are up to date
    flow.check_keys(context)
    manifest.write_bytes(written)
    project.write('accept = "majority"\nsamples = 3\ntemperature = 1.0')
    with pytest.raises(AskError, match="model 'one': environment variable TEACHER_KEY is not set, and samples"):
        flow.check_keys(Context.open(Path("run.toml"), Path("runs")))


def test_doubted_labels_train_nobody_until_somebody_has_looked(project: Project) -> None:
    assert project.run("questions", "samples") == 0
    rows = project.rows("samples/audit.jsonl")
    suspects = [row["id"] for row in rows]
    assert suspects
    assert all([chain["model"] for chain in row["against"]] == ["one", "two"] and not row["for"] for row in rows)
    accepted = {row["question_id"] for row in project.rows("samples/accepted.jsonl")}
    assert not accepted & set(suspects)
    assert accepted
    keep, relabel, drop = suspects[:3]
    decisions = [
        {"id": keep, "action": "keep"},
        {"id": relabel, "action": "relabel", "answer": "B"},
        {"id": drop, "action": "drop"},
    ]
    (project.folder / "reviewed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in decisions))
    project.write(reviewed='reviewed = "reviewed.jsonl"')
    assert project.run("questions", "samples") == 0
    doubted = {row["id"] for row in project.rows("samples/audit.jsonl")}
    assert doubted == set(suspects) - {keep, relabel, drop}
    assert {row["question_id"] for row in project.rows("samples/accepted.jsonl")} == accepted | {relabel}
    assert drop not in {row["id"] for row in project.rows("questions/train.jsonl")}
    audit = json.loads((project.folder / "runs/run/questions/audit.json").read_text())
    assert audit["reviewed"] == {"keep": 1, "relabel": 1, "drop": 1}


def test_the_majority_may_be_trusted_over_the_label(project: Project) -> None:
    project.write('accept = "majority"\nsamples = 3\ntemperature = 0.7\ntrust_majority = true')
    assert project.run("questions", "samples") == 0
    train = project.rows("questions/train.jsonl")
    accepted = project.rows("samples/accepted.jsonl")
    assert len(accepted) == 6 * len(train)  # three samples of two models, all the same
    assert {row["verdict"] for row in accepted} == {"accepted", "wrong"}
    assert project.rows("samples/audit.jsonl")


def test_what_a_rung_does_not_keep_is_there_to_be_read(project: Project) -> None:
    """Both models always say A, in the same words; unshuffled, that is the label of all questions."""
    project.write("shuffle = false\nkeep = 1")
    assert project.run("questions", "samples") == 0
    train = project.rows("questions/train.jsonl")
    accepted, rejected = project.rows("samples/accepted.jsonl"), project.rows("samples/rejected.jsonl")
    assert [row["question_id"] for row in accepted] == sorted(row["id"] for row in train)
    assert {row["model"] for row in accepted} == {"one"}
    assert {(row["model"], row["verdict"]) for row in rejected} == {("two", "accepted")}
    assert {tuple(row["permutation"]) for row in accepted + rejected} == {(0, 1)}
    summary = json.loads((project.folder / "runs/run/samples/summary.json").read_text())
    assert summary["rungs"][0]["solved"] == len(train)
    assert summary["unsolved"] == 0


@pytest.fixture
def curt_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A project whose models give no reasons."""
    script = {"models": ["test-model", "other-model"], "content": "Answer: A"}
    (tmp_path / "api").mkdir()
    (tmp_path / "project").mkdir()
    with ApiServer(tmp_path / "api", script) as server:
        yield Project(tmp_path / "project", server, monkeypatch)


def test_a_right_answer_with_a_flawed_chain_does_not_solve_its_question(curt_project: Project) -> None:
    project = curt_project
    later = '\n\n[[rung]]\nname = "mine"\nchains = "mine.jsonl"\nclean = true'
    chain = "Ann is named first, so it is her.\nAnswer: A"
    rows = ({"id": f"p{number:02}#0", "chain": chain} for number in range(30))
    (project.folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    project.write("shuffle = false\nclean = true" + later)
    assert project.run("questions", "samples") == 0
    count = len(project.rows("questions/train.jsonl"))
    assert [row["rung"] for row in project.rows("samples/accepted.jsonl")] == ["mine"] * count
    medium, mine = json.loads((project.folder / "runs/run/samples/summary.json").read_text())["rungs"]
    assert (medium["solved"], medium["flawed"], medium["wrong"]) == (0, 2 * count, 0)
    assert (mine["asked"], mine["solved"]) == (count, count)
    project.write(
        'shuffle = false\nclean = true\naccept = "majority"\nsamples = 2\ntemperature = 0.7\nsamples_after_miss = true'
    )
    assert project.run("samples") == 0
    assert len(project.rows("samples/rejected.jsonl")) == 4 * count  # it counts as a miss: both models' second one too


TRAIN = """
[train]
base = "BASE"
lora_rank = 4
lora_alpha = 8
epochs = 4
learning_rate = 1e-2
patience = 1
"""


def test_patience_goes_by_the_ladder_s_chains_of_validation_questions(project: Project, base: Path) -> None:
    """Questions without worked solutions: before, patience did nothing, and nothing said so."""
    train = TRAIN.replace("BASE", str(base))
    project.write("shuffle = false", train=train.replace("patience = 1", ""))
    assert project.run("questions", "samples") == 0
    folder = project.folder / "runs/run/samples"
    without = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    project.write("shuffle = false", train=train)
    assert project.run("samples", "trainset", "adapter") == 0
    held_out = {row["id"] for row in project.rows("questions/validation.jsonl")}
    assert {row["question_id"] for row in project.rows("samples/validation_accepted.jsonl")} == held_out
    assert project.rows("samples/validation_rejected.jsonl") == []
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl") if path.name in without} == without
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["questions"] == summary["rungs"][0]["solved"] == len(project.rows("questions/train.jsonl"))
    assert not held_out & {row["question_id"] for row in project.rows("trainset/a/train.jsonl")}
    losses = [row["validation_loss"] for row in project.rows("adapter/a/log.jsonl") if "validation_loss" in row]
    best = losses.index(min(losses))
    assert len(losses) == min(4, best + 2), "it stops one epoch after the best"


def test_with_the_metric_accuracy_a_student_answers_validation_after_each_epoch(
    project: Project, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = TRAIN.replace("BASE", str(base)).replace("epochs = 4", 'epochs = 2\nmetric = "accuracy"')
    project.write("shuffle = false", train=f"{train}\n[predict]\nmax_tokens = 4\n")
    assert project.run("questions", "samples", "trainset", "adapter") == 0, capsys.readouterr().err
    log = project.rows("adapter/a/log.jsonl")
    measured = [row["validation_accuracy"] for row in log if "validation_accuracy" in row]
    assert len(measured) == 2
    count = len(project.rows("questions/validation.jsonl"))
    assert all((share * count).is_integer() for share in measured)


@pytest.mark.parametrize(
    ("rung", "said"),
    [
        ("orders = 2\nshuffle = false", "orders = 2 needs shuffle = true"),
        ("keep = 0", "key 'rung.0.keep': Input should be greater than or equal to 1 (got 0)"),
        ("samples = 3", "would ask the same again; set temperature"),
        ("trust_majority = true", 'trust_majority needs accept = "majority"'),
    ],
)
def test_settings_that_make_no_sense(
    project: Project, capsys: pytest.CaptureFixture[str], rung: str, said: str
) -> None:
    project.write(rung)
    assert project.run("questions") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "p99#0", "action": "keep"}, ":1: field 'id': 'p99#0' is not the id of a training question"),
        ({"id": "p01#0", "action": "mend"}, ":1: field 'action': 'mend' is not one of keep, relabel, drop"),
        (
            {"id": "p01#0", "action": "relabel"},
            ":1: field 'answer': None is not one of the letters A to B",
        ),
        ([], "reviewed.jsonl:1: field 'id': [] is not the id of a training question"),
    ],
)
def test_a_review_that_cannot_be_followed_is_named(
    project: Project, capsys: pytest.CaptureFixture[str], row: Any, said: str
) -> None:
    (project.folder / "reviewed.jsonl").write_text(json.dumps(row) + "\n")
    project.write(reviewed='reviewed = "reviewed.jsonl"')
    assert project.run("questions") == 2
    assert said in capsys.readouterr().err
