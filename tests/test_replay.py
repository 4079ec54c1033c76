"""The whole cascade on real problems and recorded answers, and the server that replays them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from replay_server import (
    ANSWERS,
    KEY_ENV,
    LADDER,
    QUESTIONS,
    TEACHERS,
    UNRECORDED,
    Replayed,
    ReplayServer,
    configuration,
    cut,
    prompt_of,
    tokens,
)

from stepladder import cli
from stepladder.ask.ledger import Account, Ledger
from stepladder.mcq.answer import strict
from stepladder.mcq.prompts import ask_messages
from stepladder.records import LETTERS, Question, Sample, parse_lines, read

PROBLEMS = 60
ASKED_WITH = "Qwen2-7B-Instruct"

# The server, with recordings made up here


QUESTION = Question(
    id="p#0", problem_id="p", problem="甲比乙高。", question="谁高？", options=("甲", "乙", "丙"), answer="A",
    language="zh", source="train",
)  # fmt: skip


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplayServer]:
    folder = tmp_path_factory.mktemp("made-up")
    asked = {"question": QUESTION.question, "options": QUESTION.options, "answer": QUESTION.answer}
    problem = {"id": QUESTION.problem_id, "problem": QUESTION.problem, "questions": [asked]}
    (folder / QUESTIONS).write_text(json.dumps(problem), encoding="utf-8")
    answers = {"model": ASKED_WITH, "id": QUESTION.id, "responses": ["答案是：A", "答案是：B"]}
    (folder / ANSWERS).write_text(json.dumps(answers), encoding="utf-8")
    with ReplayServer(folder, folder) as server:
        yield server


def say(server: ReplayServer, user: str, model: str = ASKED_WITH, **more: Any) -> tuple[int, Any]:
    """Status and body of one request."""
    body = {"model": model, "messages": [{"role": "user", "content": user}], **more}
    answer = server.call("POST", "/v1/chat/completions", json.dumps(body))
    return answer.status, answer.json


def said(server: ReplayServer, **more: Any) -> str:
    status, body = say(server, prompt_of(QUESTION), **more)
    assert status == 200
    return str(body["choices"][0]["message"]["content"])


def test_the_seed_numbers_the_answer(made_up: ReplayServer) -> None:
    assert said(made_up) == "答案是：A"
    assert [said(made_up, seed=seed)[-1] for seed in range(4)] == ["A", "B", "A", "B"]
    assert said(made_up, model=TEACHERS["llama-405b"].recorded) == UNRECORDED


def test_only_options_in_their_own_order_are_known(made_up: ReplayServer) -> None:
    before = made_up.billing()
    status, body = say(made_up, ask_messages(QUESTION, (1, 0, 2))[-1].content)
    assert status == 400
    assert "options in their own order" in body["error"]["message"]
    assert say(made_up, prompt_of(QUESTION), model="gpt-5")[0] == 404
    after = made_up.billing()
    assert after["billed"] == before["billed"]
    assert after["refused"] == before["refused"] + 2


def test_tokens_are_counted_by_the_rule_and_the_cap_cuts(made_up: ReplayServer) -> None:
    before = made_up.counted().get(ASKED_WITH, Counter())
    status, body = say(made_up, prompt_of(QUESTION), max_tokens=2)
    assert status == 200
    assert body["choices"][0] == {
        "index": 0, "message": {"role": "assistant", "content": "答案是"}, "finish_reason": "length"
    }  # fmt: skip
    # The prompt has 11 Chinese characters and 14 others, 10.8 tokens; at 0.2 micro-dollars each, 13 tokens cost 2.6.
    assert body["usage"] == {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13}
    added = made_up.counted()[ASKED_WITH] - before
    assert added == {"requests": 1, "prompt_tokens": 11, "completion_tokens": 2, "micro_dollars": 3}


@pytest.mark.parametrize(("text", "count"), [("", 0), ("一", 1), ("一二三四五", 3), ("abc", 1), ("一，a", 2)])
def test_the_rule_of_thumb(text: str, count: int) -> None:
    assert tokens(text) == count
    assert cut(text, count) == text
    assert tokens(cut(text * 9, 2)) == (2 if text else 0)


def test_a_script_is_not_skipped_silently(made_up: ReplayServer) -> None:
    with pytest.raises(ValueError, match="does what was recorded"):
        made_up.set_script({"faults": [{"kind": "500"}]})


# The cascade, on real problems


class Climbed(NamedTuple):
    """A run of the cascade, what everybody's books say, and the recordings it was played from."""

    folder: Path
    questions: list[Question]
    requests: list[Replayed]
    billing: dict[str, int]
    spent: int
    accounts: list[Account]
    recorded: dict[tuple[str, str], list[str]]

    def samples(self, name: str) -> list[Sample]:
        return read(self.folder / f"{name}.jsonl", Sample)

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def audited(self) -> list[dict[str, Any]]:
        return [row for _, row in parse_lines(self.folder / "audit.jsonl")]

    def letter(self, teacher: str, question: Question) -> str | None:
        """What a model's recording strictly says."""
        texts = self.recorded.get((TEACHERS[teacher].recorded, question.id), [UNRECORDED])
        return strict(texts[0], question.options).letter

    def is_right(self, teacher: str, question: Question) -> bool:
        """Whether that is the label, or an option of the same text."""
        letter = self.letter(teacher, question)
        return letter is not None and text_of(question, letter) == text_of(question, str(question.answer))

    def reached(self) -> dict[str, list[Question]]:
        """Who should be asked on each rung: the questions that no model below it has right."""
        found, left = {}, self.questions
        for rung, teachers in LADDER.items():
            found[rung] = left
            left = [q for q in left if not any(self.is_right(teacher, q) for teacher in teachers)]
        return found | {"": left}


def text_of(question: Question, letter: str) -> str:
    return question.options[LETTERS.index(letter)]


def command(stage: str, patch: pytest.MonkeyPatch) -> None:
    """Run a stage as a user types it."""
    patch.setattr(sys, "argv", ["stepladder", stage, "run.toml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


@pytest.fixture(scope="module")
def climbed(contest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Climbed]:
    """The first problems, climbed once for all tests."""
    folder = tmp_path_factory.mktemp("climbed")
    train = folder / "train.jsonl"
    train.write_bytes(b"".join((contest / QUESTIONS).read_bytes().splitlines(keepends=True)[:PROBLEMS]))
    with ReplayServer(folder, contest) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv(KEY_ENV, "test-key")
        (folder / "run.toml").write_text(configuration("run", server.url, train, LADDER), encoding="utf-8")
        command("questions", patch)
        command("samples", patch)
        with Ledger(folder / "runs/ledger.sqlite") as ledger:
            spent, accounts = ledger.spent("run"), ledger.accounts("run")
        rows = (row for _, row in parse_lines(contest / ANSWERS))
        yield Climbed(
            folder / "runs/run/samples",
            read(folder / "runs/run/questions/train.jsonl", Question),
            server.replayed(),
            server.settled(),
            spent,
            accounts,
            {(row["model"], row["id"]): row["responses"] for row in rows},
        )


def test_the_ledger_says_what_the_server_billed(climbed: Climbed) -> None:
    assert climbed.billing["refused"] == 0
    assert climbed.spent == climbed.billing["micro_dollars"] == sum(one.micro_dollars for one in climbed.requests)
    for account in climbed.accounts:
        billed = [one for one in climbed.requests if one.model == TEACHERS[account.model].recorded]
        assert account.micro_dollars == sum(one.micro_dollars for one in billed)
        assert account.prompt_tokens == sum(one.prompt_tokens for one in billed)
        assert account.completion_tokens == sum(one.completion_tokens for one in billed)
        assert sum(account.outcomes.values()) == len(billed)
    assert {(one.rung, one.model) for one in climbed.accounts} == {(r, t) for r, some in LADDER.items() for t in some}


def test_a_question_is_solved_by_the_first_rung_that_has_it_right(climbed: Climbed) -> None:
    reached = [*climbed.reached().values()]
    rows = climbed.json("summary.json")["rungs"]
    assert [row["asked"] for row in rows] == [len(asked) for asked in reached[:-1]]
    assert [row["solved"] for row in rows] == [len(asked) - len(left) for asked, left in pairwise(reached)]
    doubted = {row["id"] for row in climbed.audited()}
    right = {
        (question.id, rung, teacher)
        for rung, questions in climbed.reached().items()
        for question in questions
        for teacher in LADDER.get(rung, ())
        if climbed.is_right(teacher, question) and question.id not in doubted
    }
    accepted = [(sample.question_id, sample.rung, sample.model) for sample in climbed.samples("accepted")]
    assert set(accepted) == right
    assert len(accepted) == len(right)
    assert {rung for _, rung, _ in right} == set(LADDER)


def test_a_solved_question_is_asked_no_more_and_rungs_are_asked_in_their_order(climbed: Climbed) -> None:
    asked = [(TEACHERS[teacher].recorded, climbed.reached()[rung]) for rung, some in LADDER.items() for teacher in some]
    assert [model for model, _ in groupby(climbed.requests, key=lambda one: one.model)] == [model for model, _ in asked]
    for model, questions in asked:
        billed = Counter(one.question for one in climbed.requests if one.model == model)
        assert billed == {question.id: 1 for question in questions}
    samples = [*climbed.samples("accepted"), *climbed.samples("rejected")]
    assert all(sample.permutation == tuple(range(len(sample.permutation))) for sample in samples)


def test_a_label_is_doubted_only_where_two_models_name_the_same_other_letter(climbed: Climbed) -> None:
    asked = {question.id: question for question in climbed.questions}
    reached = climbed.reached()
    for row in climbed.audited():
        question = asked[row["id"]]
        assert row["suggested"] != question.answer == row["label"]
        teachers = [t for rung, some in LADDER.items() if question in reached[rung] for t in some]
        assert sum(climbed.letter(teacher, question) == row["suggested"] for teacher in teachers) > 1
    assert climbed.audited()
