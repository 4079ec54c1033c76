"""What ships under examples/ loads, and is what the generator makes, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepladder.closedworld.generate import generate, to_line
from stepladder.config import load
from stepladder.forecast import memory
from stepladder.forecast.capacity import serving
from stepladder.forecast.datasheets import parse_card
from stepladder.forecast.model_shape import qwen25
from stepladder.forecast.workload import Workload
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


def test_one_card_is_said_to_be_unmeasured_and_fits_its_cards() -> None:
    text = (EXAMPLES / "one-card.toml").read_text(encoding="utf-8")
    assert "UNMEASURED" in text.partition("[questions]")[0]
    config = load(EXAMPLES / "one-card.toml")
    train, shape = config.train, qwen25(config.train.base)
    assert shape is not None
    tokens = train.batch_size * train.max_length
    parts = memory.training(shape, train.lora_rank, tokens, tokens // 2, qlora=train.qlora)
    work = Workload(201, 1, 2, 300, 300, 400, 2048, config.quantise.bits, engine=config.predict.engine)
    for card in ("RTX 3090", "RTX 4090", "L4", "A10"):
        assert parts.total < parse_card(card).gib * memory.GIB
        assert serving(shape, work, parse_card(card)).at_once > 100
