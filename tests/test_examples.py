"""What ships under examples/ loads, and is what the generator makes, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from made import QUESTION

from stepladder import cli
from stepladder.closedworld.generate import generate, to_line
from stepladder.config import load
from stepladder.forecast import memory
from stepladder.forecast.capacity import serving
from stepladder.forecast.datasheets import parse_card
from stepladder.forecast.model_shape import qwen25
from stepladder.forecast.workload import Workload
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.questionfile import read_problems

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_demo_questions_are_what_the_generator_makes(split: str) -> None:
    shipped = (EXAMPLES / "closedworld" / f"{split}.jsonl").read_text(encoding="utf-8")
    problems = shipped.count("\n")
    assert shipped == "".join(map(to_line, generate(2024, problems, "en", split)))


def test_the_demo_configuration_is_whole() -> None:
    config = load(EXAMPLES / "demo.toml")
    assert len(config.member) == 2
    assert config.questions.test is not None
    test = read_problems(Path(config.questions.test), config.language, labelled=True)
    train = read_problems(Path(config.questions.train), config.language, labelled=True)
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


def test_every_recipe_loads_and_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With generated questions in the place of the contest's, which are not ours to ship."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    data = tmp_path / "examples" / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(map(to_line, generate(1, 8, "zh", split))), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    recipes = sorted((tmp_path / "examples").glob("*.toml"))
    assert {"championship.toml", "today.toml", "demo.toml"} <= {path.name for path in recipes}
    for recipe in recipes:
        monkeypatch.setattr(sys, "argv", ["stepladder", "plan", str(recipe)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert (ended.value.code, said.err) == (0, ""), recipe.name
        assert "training questions about" in said.out


def test_the_championship_is_the_entrys() -> None:
    config = load(EXAMPLES / "championship.toml")
    train, predict, hard = config.train, config.predict, config.rung[-1]
    assert (train.warmup, train.max_length, train.weight_decay, train.adam_beta2) == (0.03, 4096, 0.1, 0.95)
    assert (train.lora_rank, train.lora_alpha, train.lora_dropout, train.packing) == (256, 512, 0.05, False)
    assert train.batch_size * train.gradient_accumulation == 8
    assert (predict.engine, predict.max_tokens, predict.temperature) == ("vllm", 2048, 0.1)
    assert (predict.top_p, predict.top_k) == (0.7, 20)
    assert {rung.max_tokens for rung in config.rung} == {2048}
    assert hard.also_solved
    assert hard.samples_after_miss
    folders = {config.prompts_for(name) for name in config.models} | {config.student_prompts}
    assert {folder.name for folder in folders if folder is not None} == {"chains", "gpt-4o", "answers"}
    for folder in folders:
        system, _ = ask_messages(QUESTION.model_copy(update={"language": "zh"}), (0, 1), folder)
        assert "专家" in system.content
        assert "简明" in system.content
        assert "答案是：" in system.content
    assert len(config.member) == 4
    assert [config.models[member.teachers[0]].model for member in config.member if member.name == "hard"] == [
        "gpt-4o-2024-08-06"
    ]


def test_the_recipes_differ_in_teachers_and_the_settings_that_are_argued_and_date_their_prices() -> None:
    then, today = (load(EXAMPLES / f"{name}.toml") for name in ("championship", "today"))
    for config in (then, today):
        assert [name for name, model in config.models.items() if model.price is None] == ["base"]
        assert (config.models["base"].engine, config.models["base"].path) == ("vllm", config.train.base)
    for table in ("questions", "limits", "quantise", "serve", "predict", "ensemble"):
        assert getattr(then, table) == getattr(today, table)
    argued = {"lora_rank", "lora_alpha", "learning_rate"}
    assert then.train.model_dump(exclude=argued) == today.train.model_dump(exclude=argued)
    assert [(member.name, member.orders) for member in today.member if not member.balance] == [
        ("all", 2), ("hard", 2), ("variants", 2)
    ]  # fmt: skip
    assert [rung.clean for rung in today.rung] == [True, True, False]
    folder = today.prompts_for("gpt-6-terra")
    assert folder == EXAMPLES / "prompts" / "words"
    assert "不用字母" in ask_messages(QUESTION.model_copy(update={"language": "zh"}), (0, 1), folder)[0].content
    text = (EXAMPLES / "today.toml").read_text(encoding="utf-8")
    prices = [line for line in text.splitlines() if line.startswith("price = ") and "input = 0," not in line]
    assert len(prices) == 3
    assert all(re.search(r"# .*2026-\d\d-\d\d", line) for line in prices)
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
