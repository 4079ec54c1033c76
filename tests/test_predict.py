"""``stepladder predict`` with a real, tiny model that knows nothing: whatever it says, every question gets a letter."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stepladder import models
from stepladder.answering import team
from stepladder.answering.standalone import read_settings, so_far, write_settings
from stepladder.answering.team import Team
from stepladder.answering.voting import Poll, count_stored, vote
from stepladder.ask.ledger import Ledger
from stepladder.ask.local.engine import Local
from stepladder.ask.request import Request, Response, TokenLogprob
from stepladder.closedworld.generate import generate, to_line
from stepladder.commands.predict import predict
from stepladder.config import Cluster, Config, Predict
from stepladder.errors import InputError, ModelError, UserError
from stepladder.mcq.questionfile import read_problems
from stepladder.records import Message, Prediction, Question


@pytest.fixture
def student(base: Path, tmp_path: Path) -> Path:
    """A finished model folder: weights, and how they are asked."""
    folder = tmp_path / "student"
    shutil.copytree(base, folder)
    table = {
        "name": "r", "language": "en", "seed": 5, "questions": {"train": "t"}, "member": [{"name": "a"}],
        "rung": [{"name": "w", "kind": "worked"}], "predict": {"max_tokens": 6},
    }  # fmt: skip
    write_settings(Config.model_validate(table), folder)
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(to_line(record) for record in generate(3, 3, "en", "test")), encoding="utf-8")
    return path


def run(
    student: Path, questions: Path, out: Path, asked: dict[str, Any] | None = None, cluster: Cluster | None = None
) -> str:
    screen = StringIO()
    console = Console(file=screen, width=200)
    predict(str(student), questions, out, console, predict_settings=asked, cluster=cluster)
    return screen.getvalue()


def test_every_question_gets_a_letter_and_it_is_said_where_it_comes_from(
    student: Path, questions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    said = run(student, questions, out)
    given = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    asked = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in given] == [row["id"] for row in asked]
    for row, problem in zip(given, asked, strict=True):
        for answer, question in zip(row["questions"], problem["questions"], strict=True):
            assert answer["answer"] in "ABCDEFG"[: len(question["options"])]
    assert "answered by the likeliest letter, since no answer could be read" in said


def test_the_same_again_from_the_ledger(student: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    run(student, questions, out)
    first = out.read_bytes()
    out.unlink()
    with Ledger(tmp_path / "answers.jsonl.ledger.sqlite") as ledger:
        calls = ledger.calls("predict")
    run(student, questions, out)
    assert out.read_bytes() == first
    with Ledger(tmp_path / "answers.jsonl.ledger.sqlite") as ledger:
        assert ledger.calls("predict") == calls > 0


def test_killed_in_the_middle_nothing_half_written_is_left(student: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    words = [sys.executable, "-m", "stepladder", "predict", str(student), str(questions), str(out)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as child:
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(2)
        child.kill()
    assert not out.exists()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(out.read_text(encoding="utf-8").splitlines()) == 3


def test_what_was_answered_before_anything_was_asked_is_nothing(student: Path, questions: Path, tmp_path: Path) -> None:
    """The time may be up before there is a ledger."""
    asked = [q for problem in read_problems(questions, "en", labelled=False) for q in problem.questions]
    found = so_far(tmp_path / "ledger.sqlite", student, asked, read_settings(student, "en"))
    assert [prediction.letter for prediction in found] == [None] * len(asked)
    assert not (tmp_path / "ledger.sqlite").exists()


def test_when_the_time_is_up_there_is_a_whole_answer_file(student: Path, questions: Path, tmp_path: Path) -> None:
    out, screen = tmp_path / "answers.jsonl", StringIO()
    words = [
        sys.executable,
        "-m",
        "stepladder",
        "predict",
        str(student),
        str(questions),
        str(out),
        "--minutes",
        "0.001",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, "Time is up." in done.stdout) == (0, True), done.stderr
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert {answer["answer"] for row in rows for answer in row["questions"]} == {"A"}
    assert len(rows) == 3
    # What was answered is kept, and with time enough the file is the one without a limit.
    predict(str(student), questions, out, Console(file=screen, width=200), minutes=10)
    limited = out.read_bytes()
    run(student, questions, tmp_path / "other.jsonl")
    assert limited == (tmp_path / "other.jsonl").read_bytes()
    # A command that fails leaves that file alone; one about other questions it replaces.
    with pytest.raises(ModelError):
        predict(str(tmp_path / "no-model"), questions, out, Console(file=screen), minutes=1)
    assert out.read_bytes() == limited
    for other in (limited.replace(b'"id": "', b'"id": "x'), b"[]\n", b"\xff"):
        out.write_bytes(other)
        with pytest.raises(ModelError):
            predict(str(tmp_path / "no-model"), questions, out, Console(file=screen), minutes=1)
        assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [row["id"] for row in rows]


def test_what_was_answered_before_the_time_was_up_counts() -> None:
    asked = questions_of(3)
    given = {}

    def answer(requests: Sequence[Request]) -> Mapping[str, Response]:
        for request in requests:
            given[request.key] = Response(text="Answer: B", max_tokens=9, prompt_tokens=1, completion_tokens=3)
        return given

    settings = Predict(votes=2, temperature=1)
    poll = Poll(asked, "m", "model", settings, 7)
    vote(poll._replace(questions=asked[:1]), answer)
    found = count_stored(poll, lambda requests: given)
    assert [one.answer is not None for one in found] == [True, False, False]
    assert [len(one.votes) for one in found] == [2, 0, 0]


def questions_of(count: int) -> list[Question]:
    return [
        Question(
            id=f"p{n}#0",
            problem_id=f"p{n}",
            problem=f"P{n}",
            question="?",
            options=("x", "y"),
            language="en",
            source="s",
        )
        for n in range(count)
    ]


def test_how_a_model_is_asked_travels_with_it(student: Path, tmp_path: Path) -> None:
    how = read_settings(student, None)
    assert (how.language, how.seed, how.predict.max_tokens, how.prompts) == ("en", 5, 6, None)
    (student / "prompts").mkdir()
    assert read_settings(student, "zh").prompts == student / "prompts"
    assert read_settings(student, "zh").language == "zh"
    assert read_settings(tmp_path, "zh").predict == Predict()
    with pytest.raises(InputError, match="give --language zh or en"):
        read_settings(tmp_path, None)
    (student / "stepladder.json").write_text('{"language": "en"}')
    with pytest.raises(InputError, match="field 'seed': Field required; copy it from the run's folder again"):
        read_settings(student, None)


def test_another_number_format_than_was_validated_is_said(student: Path, questions: Path, tmp_path: Path) -> None:
    here = models.dtype_name()
    other = {"float32": "bfloat16", "bfloat16": "float32"}[here]
    said = f"Computed in {other}; it was validated in {here}"
    assert said in run(student, questions, tmp_path / "out.jsonl", {"dtype": other})
    assert "Computed in" not in run(student, questions, tmp_path / "out.jsonl")


def test_bad_input_is_one_line(student: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        run(student, questions, tmp_path / "nowhere" / "out.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no problems"):
        run(student, tmp_path / "empty.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="--cluster starts vLLM servers on its nodes; add --engine vllm"):
        run(student, questions, tmp_path / "out.jsonl", cluster=Cluster(scheduler="slurm"))
    assert not (tmp_path / "out.jsonl").exists()


def test_the_likeliest_option_is_one_of_the_questions() -> None:
    question = questions_of(1)[0].model_copy(update={"options": ("x", "y", "z")})
    poll = Poll([question], "m", "model", Predict(), 7)

    def forced(**top: float) -> str | None:
        likely = {name.replace("_", " "): value for name, value in top.items()}
        place = TokenLogprob(token="", logprob=-1.0, top=likely)
        said = Response(text="I go on and on", max_tokens=1, prompt_tokens=1, completion_tokens=1, logprobs=(place,))
        (found,) = vote(poll, lambda requests: {request.key: said for request in requests})
        assert (found.answer, found.likely) == (None, {})
        return found.letter

    assert forced(D=-0.1, AB=-0.2, _B=-0.5, A=-0.9) == "B"
    assert forced(D=-0.1) is None
    assert forced() is None


def test_weights_in_this_process_tell_how_likely_the_next_token_is(base: Path) -> None:
    """Going on where an answer ends equals going on by itself: the token that greedy decoding took is the likeliest."""
    model = Local.load(base)
    messages = (Message(role="user", content="Count."),)
    (whole,) = model.answer([Request(model="m", messages=messages, max_tokens=3)])
    asked = Request(model="m", messages=messages, max_tokens=1, top_logprobs=5)
    (first,) = model.answer(*model.plan([asked]))
    (place,) = first.logprobs
    assert len(place.top) <= 5
    assert max(place.top.values()) == place.logprob <= 0
    assert whole.text.startswith(first.text.strip())
    begun = (*messages, Message(role="assistant", content="Answer:"))
    (after,) = model.answer([asked.model_copy(update={"messages": begun})])
    assert after.prompt_tokens > first.prompt_tokens


def prediction(letters: str) -> list[Prediction]:
    """One member's answers, a letter a question; ``-`` is one that could not be read."""
    return [
        Prediction(
            question_id=f"p{n}#0",
            member="m",
            votes=(None if letter == "-" else letter,),
            answer=None if letter == "-" else letter,
            texts=("",),
        )
        for n, letter in enumerate(letters)
    ]


def test_members_of_a_package_answer_by_the_rule_that_was_chosen(base: Path, tmp_path: Path) -> None:
    """What was chosen and fitted on validation travels in a file, and comes out of it the same."""
    known = {"good": prediction("AAAAAB"), "fair": prediction("AAABBB"), "poor": prediction("AABBBB")}
    validation = team.validation_answers([q.model_copy(update={"answer": "A"}) for q in questions_of(6)], known)
    for name in known:
        shutil.copytree(base, tmp_path / "model" / name)
    members = {name: tmp_path / "model" / name for name in known}
    asked = {"good": prediction("AB-B"), "fair": prediction("BBA-"), "poor": prediction("BAA-")}
    for rule, letters in {"vote": "BBAB", "leader": "BBAB", "weighted": "ABAB"}.items():
        team.write(tmp_path, Team(members, rule, "good", validation))
        found = team.find(str(tmp_path))
        assert (found.members, found.rule, found.validation) == (members, rule, validation)
        assert "".join(str(one.answer) for one in found.join(asked)) == letters, rule
    silent = {name: prediction("-") for name in known}
    assert found.join(silent)[0].answer is None
    silent["good"] = [silent["good"][0].model_copy(update={"answer": "C"})]  # by the likeliest token
    assert found.join(silent)[0].answer == "C"


@pytest.mark.parametrize(
    "text", ["{}", "[1]", "{", '{"rule": "vote", "leader": "x", "members": ["a", "b"], "known": {}}']
)
def test_a_package_that_cannot_be_read_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text(text)
    with pytest.raises(InputError, match="make the package again with 'stepladder pack'"):
        team.find(str(tmp_path))
