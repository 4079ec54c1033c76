"""The forecast: its arithmetic, and a pilot and a run over real HTTP that it is held against."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from replay_server import ANSWERS, KEY_ENV, QUESTIONS, ReplayServer, configuration, tokens

from stepladder import cli
from stepladder.config import Config
from stepladder.forecast.cost import Estimate, assume, forecast, prompt_tokens, solved_share
from stepladder.mcq.prompts import ask_messages
from stepladder.records import Question
from stepladder.stages.flow import missing_keys

LADDER = {"easy": ("qwen2-7b",), "hard": ("llama-405b",)}
COUNT = 40
RIGHT = 30
"""Of the questions, the small model knows the first so many and the large one all."""


def config(rungs: list[dict[str, Any]], **more: Any) -> Config:
    model = {"engine": "openai", "base_url": "http://x/v1", "price": {"input": 1, "output": 2}, "concurrency": 10}
    base: dict[str, Any] = {
        "name": "p", "language": "en", "questions": {"train": "t"}, "models": {"m": model, "n": model},
        "rung": rungs, "member": [{"name": "a"}],
    }  # fmt: skip
    return Config.model_validate(base | more)


def question(name: str, worked: str | None = None) -> Question:
    return Question(
        id=name, problem_id=name, problem="x" * 100, question="?", options=("a", "b"), answer="A", language="en",
        source="s", worked=worked,
    )  # fmt: skip


def test_a_forecast_follows_the_ladder() -> None:
    asked = [question(f"q{n}", "b\na" if n < 25 else None) for n in range(100)]
    run = config([{"name": "w", "kind": "worked"}, {"name": "e", "models": ["m"]}, {"name": "h", "models": ["m", "n"]}])
    rates = assume(run, asked)
    assert rates["w"].solved == Estimate(0.25, 0.25, 0.25)
    easy, one, other = forecast(run, 100, 100, rates)
    assert easy.questions == easy.calls == Estimate(75, 75, 75)
    assert one.questions.likely == pytest.approx(75 * 0.65)
    assert (one.rung, one.model, other.model) == ("h", "m", "n")
    prompt = prompt_tokens(asked[0], None)
    assert easy.prompt_tokens.likely == pytest.approx(75 * prompt)
    assert easy.dollars.likely == pytest.approx(75 * (prompt * 1 + 400 * 2) / 1e6)
    assert easy.batched is not None
    assert easy.batched.likely == pytest.approx(easy.dollars.likely / 2)
    assert easy.seconds.likely == pytest.approx(75 * 10 / 10)
    for row in (easy, one, other):
        assert row.dollars.low < row.dollars.likely < row.dollars.high


@pytest.mark.parametrize(
    ("rung", "calls"),
    [
        ({"orders": 2}, 1 + 0.35**0.5),
        ({"samples": 5, "temperature": 0.7, "accept": "majority"}, 5),
        ({}, 1),
    ],
)
def test_calls_a_question(rung: dict[str, Any], calls: float) -> None:
    run = config([{"name": "e", "models": ["m"], **rung}])
    (row,) = forecast(run, 100, 100, assume(run, [question("q")]))
    assert row.calls.likely == pytest.approx(100 * calls)


def test_few_calls_take_as_long_as_one() -> None:
    run = config([{"name": "e", "models": ["m"]}])
    rates = assume(run, [question("q")])
    (row,) = forecast(run, 3, 3, rates)
    assert row.seconds == pytest.approx(rates["e"].models["m"].seconds)


def test_limits_of_the_account_bound_the_time() -> None:
    run = config([{"name": "e", "models": ["m"]}])
    limited = run.models["m"].model_copy(update={"requests_per_minute": 6.0})
    run = run.model_copy(update={"models": {"m": limited}})
    (row,) = forecast(run, 100, 100, assume(run, [question("q")]))
    assert row.seconds.likely == pytest.approx(1000)


def test_a_missing_key_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config([{"name": "e", "models": ["m"]}])
    keyed = run.model_copy(update={"models": {"m": run.models["m"].model_copy(update={"api_key_env": KEY_ENV})}})
    monkeypatch.delenv(KEY_ENV, raising=False)
    assert (missing_keys(run, "samples"), missing_keys(keyed, "samples")) == ({}, {KEY_ENV: "m"})
    assert missing_keys(keyed, "variants") == missing_keys(keyed, "report") == {}
    monkeypatch.setenv(KEY_ENV, "test-key")
    assert missing_keys(keyed, "samples") == {}


def test_variants_are_planned_too() -> None:
    run = config(
        [{"name": "e", "models": ["m"]}],
        variants={"models": ["m", "n"], "agree": 1, "per_problem": 2},
    )
    _, *rows = forecast(run, 100, 30, assume(run, [question("q")]))
    assert [(row.model, row.calls.likely) for row in rows] == [("m", 60), ("n", 60), ("m", 60), ("n", 60)]


def test_a_share_has_the_greatest_first() -> None:
    seen = solved_share(10, 20)
    assert seen.low > seen.likely == 0.5 > seen.high
    assert solved_share(0, 5).high > 0
    assert solved_share(5, 5).low < 1


def test_the_rule_of_thumb_is_the_one_the_test_server_bills_by() -> None:
    asked = question("q").model_copy(update={"language": "zh", "problem": "甲比乙高。", "question": "谁高？"})
    billed = tokens(*(message.content for message in ask_messages(asked, (0, 1))))
    assert prompt_tokens(asked, None) == pytest.approx(billed, abs=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplayServer]:
    folder = tmp_path_factory.mktemp("plan")
    asked = {"question": "谁高？", "options": ["甲", "乙"], "answer": "A"}
    problems = [{"id": f"p{n:02}", "problem": f"第{n}题：甲比乙高。", "questions": [asked]} for n in range(COUNT)]
    known = {"Qwen2-7B-Instruct": RIGHT, "Meta-Llama-3.1-405B-Instruct-FP8": COUNT}
    rows = [
        {"model": model, "id": f"p{n:02}#0", "responses": ["甲比乙高，所以甲高。\n答案是：A"]}
        for model, count in known.items()
        for n in range(count)
    ]
    for name, lines in ((QUESTIONS, problems), (ANSWERS, rows)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with ReplayServer(folder, folder) as running:
        yield running


def test_a_pilot_is_asked_once_and_the_run_is_held_against_the_plan(
    server: ReplayServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY_ENV, "test-key")
    monkeypatch.setenv("COLUMNS", "100")
    toml = tmp_path / "run.toml"
    toml.write_text(configuration("run", server.url, server.contest / QUESTIONS, LADDER), encoding="utf-8")

    def run(*words: str) -> str:
        monkeypatch.setattr(
            sys, "argv", ["stepladder", words[0], str(toml), "--runs", str(tmp_path / "runs"), *words[1:]]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    told = run("plan")
    assert "solves 35 % (25 to 45) of what reaches it (assumed)" in told
    assert server.counted() == {}
    told = run("plan", "--pilot", "20")
    assert "(pilot of 20)" in told
    asked = server.counted()
    assert asked["Qwen2-7B-Instruct"]["requests"] == 20
    assert "Plan against actual" not in told
    run("samples")
    after = server.counted()
    held_out = 1
    assert after["Qwen2-7B-Instruct"]["requests"] == COUNT - held_out  # the pilot's answers stood in the ledger
    told = run("plan", "--pilot", "20")
    assert server.counted() == after
    made = [line.split() for line in told.partition("Plan against actual")[2].splitlines() if line.startswith("easy")]
    small = after["Qwen2-7B-Instruct"]
    assert made[0][-3:-1] == [str(COUNT - held_out), f"{small['prompt_tokens'] + small['completion_tokens']:,}"]
    assert float(made[0][-1]) == pytest.approx(small["micro_dollars"] / 1e6, abs=1e-4)
