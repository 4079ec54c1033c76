"""New questions, from the prompt of a writer to the files of the stage, with writers and judges behind real HTTP.

    python tests/test_variants.py --log LOG.jsonl

is their server: who is asked says what its name promises, and works it out from the prompt alone.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
from api_provider import Order, Provider
from api_script import Script
from api_server import ApiServer, serve
from replay_server import Recordings, Replay

from stepladder import cli
from stepladder.ask.ledger import Ledger
from stepladder.closedworld.untrusted import prove_rules
from stepladder.config import load
from stepladder.errors import ConfigError
from stepladder.mcq.answer import ANSWER_LINE
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.reviews import evidence_of
from stepladder.mcq.shuffle import orders
from stepladder.mcq.variant import Unfit, facts, is_repeated, only_asks, read
from stepladder.records import LETTERS, Question, Sample, parse_lines
from stepladder.records import read as read_records
from stepladder.reporting import costs
from stepladder.stages.questions import validation_ids
from stepladder.stages.variants import _program
from stepladder.viewing.index import Index

WORLDS = Path(__file__).parent.parent / "examples" / "closedworld" / "train.jsonl"
SLOW = 0.02
"""Seconds that an answer takes, so that a run can be killed meanwhile."""

# The world: four people and their ages. Who is asked works the answer out from the prompt.

NAMES = ("Ann", "Bob", "Cleo", "Dan")
RANKS = ("oldest", "second oldest", "second youngest", "youngest")


def problem(number: int) -> str:
    told = (f"{name} is {20 + (7 * number + 5 * at) % 17} years old." for at, name in enumerate(NAMES))
    return f"Family {number}. {' '.join(told)}"


def of_rank(text: str, rank: str) -> str:
    """Who has a rank in the last problem of a text."""
    found = re.findall(r"(\w+) is (\d+) years old", text)[-len(NAMES) :]
    return str(sorted(found, key=lambda pair: -int(pair[1]))[RANKS.index(rank)][0])


def number_of(prompt: str) -> int:
    """The number of the problem that a prompt is about."""
    return int(re.findall(r"(?:Family|Case) (\d+)\.", prompt)[-1])


def written(stem: str, options: tuple[str, ...], reasoning: str) -> str:
    """A new question in the form asked for."""
    lettered = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False))
    return f"Question: {stem}\n{lettered}Reasoning: {reasoning}"


UNFIT: tuple[tuple[str, str], ...] = (
    ("I cannot think of one.", "no question and reasoning in the requested form"),
    ("Question: Who is the youngest?\nReasoning: Ann is.\nAnswer: A", "options are not lettered"),
    (written("Who?", ("Ann", "Bob", "ann."), "Ann.\nAnswer: A"), "two options are the same"),
    (written("Who?", ("Ann", "Bob", "All of the above"), "Ann.\nAnswer: A"), "options speak of each other"),
    (written("Who?", ("Ann", "Bob"), "It is Ann, I should say."), "no answer line at the end"),
    (written("Who?", ("Ann", "Bob"), "It is Cleo.\nAnswer: C"), "no answer line at the end"),
    (written("And who is the oldest?", NAMES[::-1], "Ann.\nAnswer: D"), "repeats a question"),
    (written("Who is how old?", NAMES, "Let me see. " * 300 + "\nAnswer: A"), "cut off"),
)
"""What the writer writes about the last problems, and why it cannot be asked."""
MODES = ("right", "right", "right", "wrong", "rambling", "mute", "deceived", "right")
"""How the second judge answers what he writes about the others. Of the last two the writer is wrong himself."""
FALSE = 6
CASES = len(MODES) + len(UNFIT)
"""The number of the first problem that is about Sam, Ann and Mia and has a program."""


def writer(prompt: str) -> str:
    number = number_of(prompt)
    if number >= CASES:
        return prover(number)
    if number >= len(MODES):
        return UNFIT[number - len(MODES)][0]
    at = NAMES.index(of_rank(prompt, "youngest")) + (number >= FALSE)
    return written("Tell me who is the youngest of them.", NAMES, f"I compare.\nAnswer: {LETTERS[at % 4]}")


def judged(prompt: str, off: int = 0) -> str:
    """The answer to a question, in the order its options are shown; with ``off`` that of somebody else."""
    shown = dict(re.findall(r"^([A-Z])\. (.*)$", prompt, re.MULTILINE))
    options = ("one", "two", "three") if "wise" in prompt else NAMES
    wise = "one" if "are kind?" in prompt else "three"
    right = wise if "wise" in prompt else of_rank(prompt, "youngest")
    named = options[(options.index(right) + off) % len(options)]
    return f"It is {named}.\n" + next(f"Answer: {letter}" for letter, option in shown.items() if option == named)


def unsure(prompt: str) -> str:
    mode = (*MODES, *("wrong" for _ in UNFIT + PROGRAMS))[number_of(prompt)]
    if mode == "mute" or "are kind?" in prompt:
        return "Hard to say."
    # Who rambles names the right letter, and is cut off behind it.
    return judged(prompt, {"wrong": 2, "deceived": 1}.get(mode, 0)) + " " * (9999 if mode == "rambling" else 0)


DIE = "#script (lua) os.exit(1) #end."
COUNT = "n(N) :- N = #count { P : is(P,wise) }.\n"
HELD = "opt(0) :- n(1).\nopt(1) :- n(2).\nopt(2) :- n(3).\n"
PROGRAMS: tuple[tuple[str, bool], ...] = (
    (f"{COUNT}{HELD}", True),
    (f"```\n{COUNT}{HELD}% so three, é\n```\nThat is all.", False),  # the solver reads ASCII only
    (f"```prolog\n{COUNT}{HELD}```\nThat is all.", True),
    (f"n(N) :- N = #count {{ P : is(P,kind) }}.\n{HELD}", False),  # proves another option
    (f"{COUNT}{HELD}opt(0) :- n(3).", False),  # proves two
    (f"is(sam,kind). is(ann,kind). n(N) :- N = #count {{ P : is(P,kind) }}.\n{HELD}", False),
    (f"{COUNT}{HELD}{DIE}", False),
    (f'{COUNT}{HELD}#include "/etc/passwd".', False),
    ("opt(2).", False),
    (f"{COUNT}opt(2) :- n(3).\nopt(0) :- n(1), not n(1).\nopt(1) :- n(2), not n(2).", False),  # contradicts itself
    (f"{COUNT}{HELD}% proves what is not asked", False),
)
"""Rules on top of the problem about Sam, Ann and Mia, and whether they prove that all three are wise."""
LYING = CASES + len(PROGRAMS) - 1
"""The problem whose new question asks something else than its rules do."""


def prover(number: int) -> str:
    quality = "kind" if number == LYING else "wise"
    asked = written(f"How many of them are {quality}?", ("one", "two", "three"), "Sam, Ann and Mia.\nAnswer: C")
    return f"{asked}\nProgram: {PROGRAMS[number - CASES][0]}"


CAST: Mapping[str, Callable[[str], str]] = {
    "writer": writer,
    "sure": judged,
    "unsure": unsure,
}


class Invented(Recordings):
    """Answers worked out from the prompt, which is what stands in the books as the question."""

    def __init__(self) -> None:
        pass

    def question(self, prompt: str) -> str | None:
        return prompt

    def answer(self, model: str, question: str, seed: int) -> str:
        return CAST[model](question)


class Company(Replay):
    """Writers and judges."""

    def __init__(self, books: Path) -> None:
        self._recordings = Invented()
        self._prices = dict.fromkeys(CAST, (Decimal(1), Decimal(2)))
        Provider.__init__(self, books, Script(models=tuple(CAST)))

    def serve(
        self, n: int, body: dict[str, Any], sha: str, *, key: str | None = None, custom_id: str | None = None
    ) -> Order:
        order = super().serve(n, body, sha, key=key, custom_id=custom_id)
        return dataclasses.replace(order, latency_s=SLOW)


class CompanyServer(ApiServer):
    """The server for the length of a ``with``."""

    def __enter__(self) -> Self:
        command = [sys.executable, __file__, "--log", str(self.log_path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout
        ready = self.process.stdout.readline()
        if not ready:
            self.stop()
            raise RuntimeError("the server did not start; its stderr says why")
        self.port = json.loads(ready)["port"]
        return self

    def prompts(self, model: str) -> list[str]:
        """What a model was asked."""
        return [entry["question"] for entry in self.log("replayed") if entry["model"] == model]


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompanyServer]:
    with CompanyServer(tmp_path_factory.mktemp("company")) as server:
        yield server


# A project of a user's

MODEL = """
[models."{name}"]
engine = "openai"
model = "{served}"
base_url = "{url}"
api_key_env = "COMPANY_KEY"
price = {{ input = 1.0, output = 2.0 }}
"""
TOML = """
name = "{run}"
language = "en"

[questions]
train = "train.jsonl"
validation = 0.01
{models}
[[rung]]
name = "worked"
kind = "worked"

[variants]
{variants}

[[member]]
name = "a"
"""
AGREED = """
models = ["writer"]
judges = ["writer", "sure", "unsure"]
max_tokens = 150
dollars = DOLLARS
"""


def row(number: int) -> dict[str, Any]:
    """A problem as the user's file has it."""
    if number >= CASES:
        wise: dict[str, Any] = json.loads(WORLDS.read_text().splitlines()[0])
        return {"problem": f"Case {number}. {wise['problem']}", "questions": wise["questions"]}
    text = problem(number)
    who = of_rank(text, "oldest")
    asked = {"question": "Who is the oldest?", "options": NAMES, "answer": LETTERS[NAMES.index(who)]}
    return {"problem": text, "questions": [asked | {"worked": f"Nobody is older than {who}.\n{who}"}]}


class Project:
    """A folder with questions and a configuration, in which stages run as a user types them."""

    def __init__(self, folder: Path, company: ApiServer, patch: pytest.MonkeyPatch, name: str = "run") -> None:
        self.folder, self.company, self._patch = folder, company, patch
        self.run_folder = folder / "runs" / name
        self._toml = f"{name}.toml"
        patch.chdir(folder)
        patch.setenv("COMPANY_KEY", "test-key")
        patch.setenv("COLUMNS", "200")

    def data(self) -> None:
        """Write the problems to learn from, numbered in order, and one that will be held out."""
        count = CASES + len(PROGRAMS)
        ids = [f"p{n:02}" for n in range(count + 1)]
        (held_out,) = validation_ids(ids, 0.01, 2024)
        numbers = {name: number for number, name in enumerate(name for name in ids if name != held_out)}
        lines = (json.dumps({"id": name} | row(numbers.get(name, 99))) + "\n" for name in ids)
        (self.folder / "train.jsonl").write_text("".join(lines))

    def write(self, variants: str, models: Mapping[str, str] | None = None) -> None:
        """The configuration; ``models`` are names and who answers to them."""
        named = models or {name: name for name in CAST}
        tables = "".join(MODEL.format(name=name, served=served, url=self.company.url) for name, served in named.items())
        text = TOML.format(run=self.run_folder.name, models=tables, variants=variants)
        (self.folder / self._toml).write_text(text)

    def run(self, *stages: str) -> int:
        for stage in stages:
            self._patch.setattr(sys, "argv", ["stepladder", stage, self._toml])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            if ended.value.code:
                return int(ended.value.code)
        return 0

    @property
    def variants(self) -> Path:
        return self.run_folder / "variants"

    def questions(self) -> list[Question]:
        return read_records(self.variants / "questions.jsonl", Question)

    def rejected(self) -> dict[str, dict[str, Any]]:
        rows = [row for _, row in parse_lines(self.variants / "rejected.jsonl")]
        assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
        return {row["id"]: row for row in rows}

    def summary(self) -> Any:
        return json.loads((self.variants / "summary.json").read_text())

    def problems(self) -> dict[int, str]:
        """Numbers and ids of the problems that variants are written about."""
        rows = read_records(self.run_folder / "questions/train.jsonl", Question)
        return dict(sorted((number_of(row.problem), row.problem_id) for row in rows))


def files(folder: Path) -> dict[str, bytes]:
    """All that a stage wrote; of the manifest, all but how long it took."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    manifest = json.loads(found["manifest.json"])
    manifest.pop("seconds")
    return found | {"manifest.json": json.dumps(manifest).encode()}


class Done(NamedTuple):
    """A run of the stage that several tests look at."""

    project: Project
    asked: dict[str, list[str]]
    """What each model was asked."""
    billed: int


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, company: CompanyServer) -> Iterator[Done]:
    with pytest.MonkeyPatch.context() as patch:
        project = Project(tmp_path_factory.mktemp("done"), company, patch)
        project.data()
        project.write(AGREED.replace("DOLLARS", "1.0"))
        before = {name: len(company.prompts(name)) for name in CAST}
        assert project.run("questions", "samples", "variants") == 0
        asked = {name: company.prompts(name)[before[name] :] for name in CAST}
        yield Done(project, asked, sum(map(len, asked.values())))


def test_what_enough_others_answer_alike_or_a_program_proves_is_accepted_and_nothing_else(done: Done) -> None:
    problems = done.project.problems()
    proved = [at for at, (_, holds) in enumerate(PROGRAMS, CASES) if holds]
    accepted = [f"{problems[at]}~writer-0" for at in (*range(3), *proved)]
    assert [question.id for question in done.project.questions()] == accepted
    rejected = done.project.rejected()
    assert rejected.keys() == {f"{name}~writer-0" for name in problems.values()} - {*accepted}
    unproved = [name for name, row in rejected.items() if row["reason"] == "not proved"]
    fit = [f"{problems[at]}~writer-0" for at in (*range(len(MODES)), *range(CASES, CASES + len(PROGRAMS)))]
    assert unproved == [name for name in fit if name not in accepted]
    summary = done.project.summary()
    assert summary["problems"] == summary["written"] == CASES + len(PROGRAMS)
    assert summary["accepted"] == {"agreed": 3, "program": len(proved)}
    assert summary["refused"] == Counter(row["reason"] for row in rejected.values())
    assert summary["writers"] == {"writer": len(accepted)}


def test_each_refusal_has_its_reason_and_what_was_written(done: Done) -> None:
    rejected, problems = done.project.rejected(), done.project.problems()
    for number, (text, reason) in enumerate(UNFIT):
        row = rejected[f"{problems[len(MODES) + number]}~writer-0"]
        assert row["writer"] == "writer"
        assert row["reason"].startswith(reason)
        assert row["text"] == text if reason != "cut off" else text.startswith(row["text"])
    row = rejected[f"{problems[FALSE]}~writer-0"]
    assert Question.model_validate(row["question"]).source == "variant/writer"
    assert row["chain"].startswith("I compare.")


def test_where_a_question_comes_from_can_be_told(done: Done) -> None:
    samples = read_records(done.project.variants / "accepted.jsonl", Sample)
    with Ledger(done.project.folder / "runs/ledger.sqlite") as ledger:
        stored = {row["key"]: row for row in ledger.export()}
    for question, sample in zip(done.project.questions(), samples, strict=True):
        number = number_of(question.problem)
        assert question.problem == row(number)["problem"]
        assert question.source == "variant/writer"
        assert (question.worked, question.program, question.reviewed) == (None, None, False)
        assert (sample.question_id, sample.answer, sample.verdict) == (question.id, question.answer, "accepted")
        assert (sample.rung, sample.model) == ("variants", "writer")
        assert sample.permutation == tuple(range(len(question.options)))
        if number < CASES:
            assert question.answer == LETTERS[NAMES.index(of_rank(question.problem, "youngest"))]
            assert sample.text == f"I compare.\nAnswer: {question.answer}"
        else:
            assert sample.text == "Sam, Ann and Mia.\nAnswer: C"
        call = stored[sample.key]
        assert f"Problem: {question.problem}\n\nAsked before:" in call["request"]["messages"][0]["content"]
        assert sample.text in json.loads(call["raw"])["choices"][0]["message"]["content"]


def test_a_writer_sees_solved_questions_about_other_problems(done: Done) -> None:
    for prompt in done.asked["writer"]:
        *examples, mine = re.findall(r"^Problem: (\w+ \d+)\.", prompt, re.MULTILINE)
        assert len(set(examples)) == 2
        assert mine not in examples
        assert prompt.count("\nReasoning: ") == 3  # of two examples and of the form
        assert ("\n- Who is the oldest?\n" if mine.startswith("Family") else "\n- Is Sam neat?\n") in prompt


def test_a_judge_sees_shuffled_options_and_not_what_the_writer_says(done: Done) -> None:
    rejected, problems = done.project.rejected(), done.project.problems()
    asked = {question.id: question for question in done.project.questions()}
    asked |= {name: Question.model_validate(row["question"]) for name, row in rejected.items() if "question" in row}
    assert len(asked) == len(MODES) + len(PROGRAMS)  # what a program proves is asked as well
    moved = 0
    for judge in ("sure", "unsure"):
        shuffled = {name: orders(1, len(one.options), 2024, name, judge)[0] for name, one in asked.items()}
        expected = Counter(ask_messages(asked[name], order)[-1].content for name, order in shuffled.items())
        if judge == "unsure":  # what is cut off is bought once more, with twice the room
            name = f"{problems[MODES.index('rambling')]}~writer-0"
            expected[ask_messages(asked[name], shuffled[name])[-1].content] += 1
        assert Counter(done.asked[judge]) == expected
        moved += sum(list(order) != sorted(order) for order in shuffled.values())
    assert moved > len(asked)
    assert not any("Answer: " in prompt or "Reasoning" in prompt for prompt in done.asked["sure"])


def test_a_writer_sees_the_program_of_the_problem_and_not_what_it_asks(done: Done) -> None:
    for prompt in done.asked["writer"]:
        assert ("\nis(sam,wise).\n" in prompt) == (number_of(prompt) >= CASES)
        assert "answer(" not in prompt


def test_nobody_judges_what_it_wrote(done: Done) -> None:
    assert len(done.asked["writer"]) == CASES + len(PROGRAMS) + 1  # one was cut off
    assert all("Asked before:" in prompt for prompt in done.asked["writer"])


def test_it_is_all_on_one_account(done: Done) -> None:
    with Ledger(done.project.folder / "runs/ledger.sqlite") as ledger:
        accounts, spent = ledger.accounts("run"), ledger.spent("run")
    assert {(account.rung, account.model) for account in accounts} == {
        ("variants", name) for name in ("writer", "sure", "unsure")
    }
    assert spent == sum(account.micro_dollars for account in accounts) > 0
    assert sum(sum(account.outcomes.values()) for account in accounts) == done.billed


def test_the_report_counts_what_writers_and_judges_cost(done: Done) -> None:
    folders = [costs.Folder("samples", None), costs.Folder("variants", None), costs.Folder("final/variants", None)]
    final = done.project.run_folder / "final" / "variants"
    shutil.copytree(done.project.variants, final)  # as if it had been written with the same answers
    samples, variants, again = costs.stages(done.project.run_folder, folders)
    shutil.rmtree(final)
    with Ledger(done.project.folder / "runs/ledger.sqlite") as ledger:
        spent = ledger.spent("run") / 1e6
    assert samples.dollars == 0  # local
    assert 0.9 * spent < variants.dollars < spent  # the answer that was cut off and asked again is only in the ledger
    assert again.dollars == 0  # paid once


def test_a_rerun_asks_nothing_and_writes_the_same(done: Done) -> None:
    whole, billed = files(done.project.variants), done.project.company.settled()["billed"]
    assert done.project.run("variants") == 0
    assert files(done.project.variants) == whole
    (done.project.variants / "manifest.json").unlink()
    assert done.project.run("variants") == 0
    assert files(done.project.variants) == whole
    assert done.project.company.settled()["billed"] == billed


def test_one_model_under_two_names_has_one_voice(
    done: Done, company: CompanyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder of the run before, so that only the new orders of options are asked."""
    project = Project(done.project.folder, company, monkeypatch, "twice")
    names = {"writer~2": "writer", "writer": "writer", "sure": "sure", "sure-2": "sure"}
    project.write('models = ["writer~2"]\nmax_tokens = 150', names)
    before = company.prompts("writer")
    assert project.run("questions", "samples", "variants") == 0
    assert project.summary()["accepted"].keys() == {"program"}
    ids = {question.id for question in project.questions()} | {*project.rejected()}
    assert ids == {f"{name}~writer~2-0" for name in project.problems().values()}
    assert company.prompts("writer") == before


def test_what_nothing_proves_waits_for_people_and_their_decisions_hold(
    done: Done, company: CompanyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder of the run before, so that nothing is asked."""
    project = Project(done.project.folder, company, monkeypatch, "reviewed")
    project.write(AGREED.replace("DOLLARS", "1.0"))
    toml = project.folder / "reviewed.toml"
    toml.write_text(toml.read_text().replace("[questions]", '[questions]\nreviewed = "reviewed.jsonl"'))
    reviewed, billed = project.folder / "reviewed.jsonl", company.settled()["billed"]
    reviewed.touch()
    assert project.run("questions", "samples", "variants") == 0

    index = Index(project.run_folder)
    waiting = index.doubtful
    unproved = {name for name, row in project.rejected().items() if row["reason"] == "not proved"}
    assert {*waiting} == unproved
    whole = index.whole(waiting[0])
    assert whole is not None
    assert whole.row.split == "variant"
    assert [sample.model for sample, _ in whole.chains] == ["writer", "sure", "unsure"]
    proved = index.whole(project.questions()[0].id)
    assert proved is not None
    assert [accepted for _, accepted in proved.chains] == [True]

    kept, dropped, relabelled = waiting[0], proved.question.id, waiting[1]
    letter = next(letter for letter in "AB" if letter != index.whole(relabelled).question.answer)  # type: ignore[union-attr]
    lines = (
        {"id": kept, "action": "keep", "label": whole.question.answer, "evidence": evidence_of(whole.question)},
        {"id": dropped, "action": "drop"},
        {"id": relabelled, "action": "relabel", "answer": letter},
        {"id": waiting[2], "action": "keep", "evidence": "of another text"},
    )
    reviewed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert project.run("questions", "samples", "variants") == 0
    accepted = {question.id for question in project.questions()}
    assert kept in accepted
    assert project.summary()["accepted"]["reviewed"] == 1
    rejected = {name: row["reason"] for name, row in project.rejected().items()}
    assert [rejected[name] for name in (dropped, relabelled)] == ["refused by a reviewer"] * 2
    assert Index(project.run_folder).doubtful == [name for name in waiting if name not in (kept, relabelled)]
    assert company.settled()["billed"] == billed


def test_a_run_that_a_cap_and_then_a_kill_stopped_ends_with_the_same_files(
    tmp_path: Path,
    done: Done,
    company: CompanyServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    project = Project(tmp_path, company, monkeypatch)
    project.data()
    project.write(AGREED.replace("DOLLARS", "0.01"))
    assert project.run("questions", "samples") == 0
    before = company.settled()["billed"]
    assert project.run("variants") == 1
    assert "the cap is reached ($0.0100 for the rung variants)" in " ".join(capsys.readouterr().err.split())
    assert not project.variants.exists()
    problems = CASES + len(PROGRAMS)
    assert 0 < company.settled()["billed"] - before < problems
    project.write(AGREED.replace("DOLLARS", "1.0"))
    command = [sys.executable, "-m", "stepladder", "variants", "run.toml"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while company.billing()["billed"] < before + problems + 5 and child.poll() is None:  # the first judge judges
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not project.variants.exists()
    assert company.settled()["billed"] - before < done.billed
    assert project.run("variants") == 0
    assert files(project.variants) == files(done.project.variants)
    assert company.settled()["billed"] - before == done.billed  # what was bought is not bought again


# Proved by a program


@pytest.fixture(scope="module")
def wise() -> list[Question]:
    """The first problem of the demo: Sam, Ann and Mia are wise."""
    row = json.loads(WORLDS.read_text().splitlines()[0])
    return [
        Question(id=f"w#{n}", problem_id="w", problem=row["problem"], language="en", source="s", **asked)
        for n, asked in enumerate(row["questions"])
    ]


def test_questions_that_differ_on_the_problem_leave_no_program(wise: list[Question]) -> None:
    """Some families say in the question what is supposed: then no program holds the problem alone."""
    more = wise[0].model_copy(update={"program": f"is(sam,tall).\n{wise[0].program}"})
    assert _program(wise) == facts(str(wise[0].program))
    assert _program([*wise, more]) is None
    assert _program([wise[0].model_copy(update={"program": "opt(0)."})]) is None
    assert _program([wise[0].model_copy(update={"program": None})]) is None


ASKS = "opt(0) :- is(sam,shy).\nopt(1) :- is(sam,neat).\n"


@pytest.mark.parametrize(
    "rules",
    [
        ASKS,
        "opt(0) :- tall. opt(1) :- short. tall :- is(sam,shy). short :- not tall, person(sam).",
        "opt( 0 ) :- is(sam,shy), not is(sam,loud).\nopt(1):-is(sam,neat).  % the right one, is(ann,tall).",
        "likes(X,Y) :- is(X,K), is(Y,K).\nlikes(X,Z) :- likes(X,Y), likes(Y,Z).\n"
        'opt(0) :- not likes(sam,mia).\nopt(1) :- likes(sam,mia), name("a. b", 1..2) = name("a. b", 1).',
        "opt(0) :- not opt(1). opt(1) :- is(sam,neat).",
    ],
)
def test_rules_that_only_ask(wise: list[Question], rules: str) -> None:
    base = facts(str(wise[0].program))
    assert only_asks(base, rules, 2)


@pytest.mark.parametrize(
    "rules",
    [
        "is(sam,tall).",
        "is (sam,tall).",
        "is(P,tall) :- person(P).",
        "-is(sam,neat).",
        "person(zoe).",
        "{ is(sam,tall) }.",
        "1 { tall(P) : person(P) } 1.",
        "tall(sam) ; short(sam).",
        "tall(sam) | is(sam,tall).",
        "tall(sam), is(sam,tall) :- person(sam).",
        ":- not is(sam,tall).",
        "not is(sam,neat).",
        "#true.",
        "#show is/2.",
        "#external is(sam,tall).",
        "#const wise = kind.",
        "#program other.",
        "#include <incmode>.",
        "&diff { a - b } <= 1.",
        '"is(sam,tall)." is(sam,tall).',
        "tall(sam). %* is hidden *% is(sam,tall).",
        "tall(sam).is(sam,tall).",
        "opt(1).",
        "opt(1) :- yes. yes.",
        "opt(X) :- X = 1.",
        "opt(1) :- 1 < 2.",
        "is(sam,tall)",
    ],
)
def test_rules_that_say_more_than_the_problem(wise: list[Question], rules: str) -> None:
    base = facts(str(wise[0].program))
    assert not only_asks(base, f"{ASKS}{rules}", 2)
    assert not only_asks(base, f"{rules}\n{ASKS}", 2)


def test_every_option_must_be_held_against_the_problem(wise: list[Question]) -> None:
    base = facts(str(wise[0].program))
    assert not only_asks(base, "opt(1) :- is(sam,neat).", 2)
    assert not only_asks(base, ASKS, 3)
    assert not only_asks(base, "", 2)
    assert not only_asks("", ASKS, 2)


def test_what_asks_is_no_part_of_the_problem() -> None:
    program = (
        'is(sam,wise). name(sam,"opt. answer").  % opt(0) is right\n%* opt(1). *%\nanswer(yes) :-\n  is(sam,wise).\n'
        "opt(0) :- answer(yes). is(ann,wise)%* so *%:-p.\n1 { opt(0..1) } 1.\n:- not opt(0).\n#show opt/1.\nd(1..3)."
    )
    assert facts(program) == 'is(sam,wise).\nname(sam,"opt. answer").\nis(ann,wise) :-p.\nd(1..3).'


def test_the_demos_own_questions_are_proved_by_their_own_rules() -> None:
    """Rules of the kind that a careful writer adds, on all families of problems."""
    rows = [json.loads(line) for line in WORLDS.read_text().splitlines()]
    for row in {row["source"].split("/")[1]: row for row in rows}.values():
        asked = row["questions"][0]
        base = facts(asked["program"])
        rules = "\n".join(line for line in asked["program"].splitlines() if re.match(r"(?:answer|opt)\(", line))
        assert only_asks(base, rules, len(asked["options"])), row["id"]
        assert LETTERS[prove_rules(base, rules, len(asked["options"]), 10, 512)] == asked["answer"]


# The form


ASKED = Question(
    id="p#0", problem_id="p", problem=problem(0), question="Who is the oldest of the four?", options=NAMES, answer="A",
    language="en", source="exam", worked="w", program="p.", reviewed=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "stem", "options", "answer", "chain"),
    [
        (
            "Question: Who is old?\nA. Ann\nB. Bob\nReasoning: Ann.\nAnswer: A",
            "Who is old?", ("Ann", "Bob"), "A", "Ann.\nAnswer: A",
        ),
        (
            "Sure!\n\n**Question:** Who\nis old?\n\n**A.** Ann \n\n**B)** Bob's *son*\n\n**Reasoning:**\n1. Ann.\n\n"
            "**Answer: B**",
            "Who\nis old?", ("Ann", "Bob's *son"), "B", "1. Ann.\n\n**Answer: B**",
        ),
        (
            "### 问题：谁最大？\nA．安\nB、鲍勃\n推理：安最大。\n答案是：A\n程序：\n```prolog\nopt(0) :- p.\n```",
            "谁最大？", ("安", "鲍勃"), "A", "安最大。\n答案是：A",
        ),
    ],
)  # fmt: skip
def test_a_question_is_read(text: str, stem: str, options: tuple[str, ...], answer: str, chain: str) -> None:
    draft = read(text, ASKED, "p~m-0")
    question = draft.question
    assert (question.id, question.question, question.options, question.answer) == ("p~m-0", stem, options, answer)
    assert draft.chain == chain
    assert draft.rules == ("opt(0) :- p." if "opt" in text else "")
    assert (question.worked, question.program, question.reviewed) == (None, None, False)
    assert (question.problem_id, question.problem) == (ASKED.problem_id, ASKED.problem)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *((text, reason) for text, reason in UNFIT if reason not in {"cut off", "repeats a question"}),
        ("", "no question and reasoning"),
        ("Reasoning: r\nQuestion: q\nA. a\nB. b\nAnswer: A", "no question and reasoning"),
        (written("", ("Ann", "Bob"), "Answer: A"), "no question in front of the options"),
        (written("Who?", ("Ann",), "Answer: A"), "options are not lettered"),
        ("Question: Who?\nA. Ann\nC. Bob\nReasoning: r\nAnswer: A", "options are not lettered"),
        ("Question: Who?\nA. Ann\nB.\nReasoning: r\nAnswer: A", "options are not lettered"),
        ("Question: Who?\nA. Ann\nB. **\nReasoning: r\nAnswer: A", "options are not lettered"),
        ("Question: Who?\nA. Ann, who\nis old\nB. Bob\nReasoning: r\nAnswer: A", "options are not lettered"),
        ("Question: Who?\nA. Ann\nB. Bob\nChoose one.\nReasoning: r\nAnswer: A", "options are not lettered"),
        (written("Who?", ("Ann", "Bob", "A and B"), "r\nAnswer: A"), "options speak of each other"),
        (written("Who?", ("Ann", "Bob"), "Answer: A or B"), "no answer line at the end"),
        (written("Who?", ("Ann", "Bob"), "r\nAnswer: A\nI hope that helps."), "no answer line at the end"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        read(text, ASKED, "p~m-0")


@pytest.mark.parametrize(
    ("stem", "options", "repeated"),
    [
        ("Who is the oldest of the four?", NAMES, True),
        ("WHO, then, is the oldest of the four?", NAMES[::-1], True),
        ("Who is the oldest of the four", ("dan", "bob", "Cleo", "ann"), True),
        ("Who is the youngest of the four?", NAMES, False),
        ("Who is older than Bob and younger than Dan?", NAMES, False),
        ("How old is the oldest of the four?", ("20", "30", "40", "50"), False),
    ],
)
def test_the_same_question_in_other_words_is_known(stem: str, options: tuple[str, ...], repeated: bool) -> None:
    question = ASKED.model_copy(update={"question": stem, "options": options})
    assert is_repeated(question, [ASKED]) == repeated
    assert not is_repeated(question, [])


def test_the_form_asks_for_the_answer_line_that_is_read() -> None:
    for language, line in ANSWER_LINE.items():
        asked = ASKED.model_copy(update={"language": language})
        text = written("Who is old?", ("Ann", "Bob"), f"Ann.\n{line.format('B')}")
        assert read(text, asked, "n").question.answer == "B"


# The table


GOOD = """
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
models = ["m", "n"]
agree = 2

[[member]]
name = "a"
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", None),
        ("agree = 2", 'judges = ["m", "n"]\nagree = 1', None),
        ('["m", "n"]', '["m", "x"]', "[variants] names unknown model 'x'; known under [models]: m, n, o"),
        ("agree", 'judges = ["x"]\nagree', "[variants] names unknown model 'x'; known under [models]: m, n, o"),
        ('models = ["m", "n"]', "", "missing key 'variants.models'; add it"),
        ('["m", "n"]', "[]", "key 'variants.models': Tuple should have at least 1 item"),
        ('["m", "n"]', '["m", "m"]', "key 'variants': model 'm' is named twice; name it once"),
        ("agree", 'judges = ["o", "o", "n"]\nagree', "model 'o' is named twice; name it once"),
        (
            "agree = 2",
            "agree = 3",
            "agree = 3, but only 2 judges beside the writer 'm'; lower agree or name more models",
        ),
        ("agree", 'judges = ["m", "o"]\nagree', "only 1 judges beside the writer 'm'; lower agree or name more models"),
        ("agree = 2", "agree = 0", "key 'variants.agree': Input should be greater than or equal to 1 (got 0)"),
        ("agree = 2", "temperature = 0\nper_problem = 2", "per_problem above 1 needs temperature above 0"),
        ("agree = 2", "colour = 1", "unknown key 'variants.colour'; [variants] knows: "),
        ('name = "worked"', 'name = "variants"', "a rung cannot be called 'variants' beside [variants]"),
    ],
)
def test_settings_of_the_table_that_make_no_sense(tmp_path: Path, old: str, new: str, said: str | None) -> None:
    assert old in GOOD
    path = tmp_path / "run.toml"
    path.write_text(GOOD.replace(old, new, 1))
    if said is None:
        assert load(path).variants is not None
        return
    with pytest.raises(ConfigError) as error:
        load(path)
    assert said in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    asyncio.run(serve(0, Company(parser.parse_args().log), while_stdin=True))


if __name__ == "__main__":
    main()
