"""What ships under examples/ loads, and is what the generator makes, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepladder.closedworld.generate import generate, to_line
from stepladder.config import load
from stepladder.mcq.questionfile import read_problems

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_demo_questions_are_what_the_generator_makes(split: str) -> None:
    shipped = (EXAMPLES / "closedworld" / f"{split}.jsonl").read_text(encoding="utf-8")
    problems = shipped.count("\n")
    assert shipped == "".join(map(to_line, generate(2024, problems, "en", split)))


def test_the_demo_configuration_is_whole() -> None:
    config = load(EXAMPLES / "demo.toml")
    assert len(config.member) == 3
    assert config.questions.test is not None
    test = read_problems(config.questions.test, config.language, labelled=True)
    train = read_problems(config.questions.train, config.language, labelled=True)
    assert sum(len(problem.questions) for problem in test) >= 200
    families = {question.source.split("/")[1] for problem in train for question in problem.questions}
    assert families == {"chaining", "ordering", "table", "arithmetic"}
    assert not {p.questions[0].problem for p in train} & {p.questions[0].problem for p in test}


def test_every_shipped_question_carries_its_worked_solution_and_its_proof() -> None:
    for path in sorted((EXAMPLES / "closedworld").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            for question in json.loads(line)["questions"]:
                assert question["worked"]
                assert question["program"]


def test_the_championship_says_what_its_teachers_cost() -> None:
    config = load(EXAMPLES / "championship.toml")
    prices = {name: model.price for name, model in config.models.items()}
    assert all(prices.values())
    assert [name for name, model in config.models.items() if model.is_own] == ["base"]
    assert {"gpt-4o-mini", "deepseek-v2", "gpt-4o"} < set(prices)
    assert "2024-08" in (EXAMPLES / "championship.toml").read_text(encoding="utf-8")
