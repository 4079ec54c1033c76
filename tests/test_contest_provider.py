"""The provider of the rehearsal, over HTTP: recorded chains to shuffled options, new questions, limits, retirement."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from contest_provider import ContestServer, moved
from made import QUESTION
from replay_server import UNRECORDED

from stepladder.mcq.answer import strict
from stepladder.mcq.prompts import ask_messages, variant_messages
from stepladder.mcq.questionfile import read_problems
from stepladder.mcq.shuffle import shown
from stepladder.mcq.variant import read
from stepladder.records import LETTERS, Message, Question

STRONGEST = "gpt-4o-2024-08-06"
THEN = date(2024, 11, 20)


@pytest.fixture(scope="module")
def provider(contest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContestServer]:
    with ContestServer(tmp_path_factory.mktemp("provider"), contest, THEN) as server:
        yield server


@pytest.fixture(scope="module")
def questions(contest: Path) -> list[Question]:
    problems = read_problems(contest / "train.jsonl", "zh", labelled=True)
    return [question for problem in problems[:12] for question in problem.questions]


def ask(server: ContestServer, messages: tuple[Message, ...], model: str = STRONGEST, **settings: Any) -> Any:
    body = {"model": model, "messages": [message.model_dump() for message in messages], "max_tokens": 2048} | settings
    return server.call("POST", "/v1/chat/completions", json.dumps(body))


def text(answer: Any) -> str:
    return str(answer.json["choices"][0]["message"]["content"])


def test_a_recorded_answer_names_the_same_option_in_any_order(
    provider: ContestServer, questions: list[Question]
) -> None:
    compared = 0
    for question in questions:
        straight = tuple(range(len(question.options)))
        said = {}
        for order in (straight, straight[::-1]):
            answer = ask(provider, ask_messages(question, order), "gpt-4o-mini-2024-07-18")
            options = shown(question.options, order)
            letter = strict(text(answer), options).letter
            said[order] = letter and options[LETTERS.index(letter)]
        if said[straight]:
            assert said[straight] == said[straight[::-1]]
            compared += 1
    assert compared > len(questions) / 2


def test_letters_that_are_names_stay() -> None:
    texts = {"problem": "A和B赛跑。", "question": "谁赢了？", "options": ("张三", "李四"), "language": "zh"}
    question = QUESTION.model_copy(update=texts)
    prompt = ask_messages(question, (1, 0))[-1].content
    assert moved("A比B快，所以张三赢。\n答案是：A", question, prompt) == "A比B快，所以张三赢。\n答案是：B"


def test_a_new_question_is_one_that_was_held_back(provider: ContestServer, questions: list[Question]) -> None:
    first = [question for question in questions if question.problem_id == questions[0].problem_id]
    draft = read(text(ask(provider, variant_messages(first[:-1], [], None))), first[0], "new")
    assert (draft.question.question, draft.question.answer) == (first[-1].question, first[-1].answer)
    assert text(ask(provider, variant_messages(first, [], None))) == UNRECORDED, "there is no other"


def test_tokens_a_minute_are_kept_to(contest: Path, tmp_path: Path, questions: list[Question]) -> None:
    messages = ask_messages(questions[0], tuple(range(len(questions[0].options))))
    with ContestServer(tmp_path, contest, THEN) as server:
        answers = [ask(server, messages, max_tokens=14_000) for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429], "30,000 tokens a minute"
        assert int(answers[2].headers["retry-after"]) > 20
        assert answers[2].headers["x-ratelimit-limit-tokens"] == "30000"
        assert server.billing()["billed"] == 2


def test_models_that_are_gone_and_models_that_think(contest: Path, tmp_path: Path, questions: list[Question]) -> None:
    messages = ask_messages(questions[0], tuple(range(len(questions[0].options))))
    with ContestServer(tmp_path, contest, date(2026, 11, 26)) as server:
        assert ask(server, messages, "deepseek-chat").json["error"]["code"] == "model_not_found"
        listed = {model["id"] for model in server.call("GET", "/v1/models").json["data"]}
        assert "deepseek-chat" not in listed
        assert STRONGEST in listed
        assert ask(server, messages, "gpt-6-luna").json["error"]["code"] == "unsupported_parameter"
        settings = {"max_tokens": None, "max_completion_tokens": 100, "temperature": 0.7}
        assert ask(server, messages, "gpt-6-luna", **settings).json["error"]["code"] == "unsupported_value"
        assert ask(server, messages, "gpt-6-luna", **settings, reasoning_effort="none").status == 200
