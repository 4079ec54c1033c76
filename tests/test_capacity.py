"""Memory and time arithmetic, against figures that are known."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from stepladder.commands import plan
from stepladder.config import load
from stepladder.context import Context
from stepladder.errors import ModelError, UserError
from stepladder.forecast import capacity, fit_tables, memory
from stepladder.forecast.capacity import Card, Workload, levers, members_in, parse_card, serving
from stepladder.forecast.memory import GIB, MAX_SEQUENCES, training, weights
from stepladder.forecast.model_shape import QWEN25_SHAPES, Shape, qwen25, read
from stepladder.progress import Progress
from stepladder.stages import flow
from stepladder.workspace import Workspace

LARGE = QWEN25_SHAPES["32B"]
WORK = Workload(questions=1328, votes=1, members=4, prompt=200, read=200, answer=400, length=2048, bits=4)


def test_a_32b_model_in_4_bits_on_32_gib() -> None:
    """18.0 GiB of weights, 256 KiB of keys and values a token, about 20 sequences of 2,048."""
    assert weights(LARGE, 4) / GIB == pytest.approx(18.0, abs=0.05)
    assert memory.kv_per_token(LARGE) == 256 * 1024
    assert serving(LARGE, WORK, parse_card("32")).at_once == 20


@pytest.mark.parametrize(
    ("size", "billions"),
    [("0.5B", 0.494), ("1.5B", 1.54), ("3B", 3.09), ("7B", 7.62), ("14B", 14.77), ("32B", 32.76), ("72B", 72.7)],
)
def test_parameters_of_a_published_family(size: str, billions: float) -> None:
    assert QWEN25_SHAPES[size].parameters / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize(
    ("rank", "qlora", "cards", "gib"),
    [(256, False, 1, 97), (64, False, 1, 73), (256, True, 1, 54), (64, True, 1, 30), (256, False, 2, 52),
     (256, False, 4, 29)],
)  # fmt: skip
def test_training_a_32b_model_on_4096_tokens(rank: int, qlora: bool, cards: int, gib: float) -> None:
    """Figures worked out by hand without logits, to which a layer's activations and its gathered weights add some."""
    parts = training(LARGE, rank, 4096, 0, qlora=qlora, cards=cards)
    assert parts.total / GIB == pytest.approx(gib, rel=0.08)


def test_what_takes_memory_in_training() -> None:
    usual = training(LARGE, 256, 4096, 2048)
    assert training(LARGE, 256, 4096, 4096).logits == 2 * usual.logits
    assert training(LARGE, 256, 4096, 2048, checkpointing=False).activations > 10 * usual.activations
    assert training(LARGE, 128, 4096, 2048).adapter == usual.adapter / 2
    assert training(LARGE, 256, 4096, 2048, bytes_each=4).weights == 2 * usual.weights
    assert memory.quantising(LARGE, 128, 600).total / GIB == pytest.approx(73.8, rel=0.02)


def test_a_shape_is_read_from_a_folder_or_known_by_its_id(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    shape = read(base)
    assert (shape.layers, shape.hidden) == (config["num_hidden_layers"], config["hidden_size"])
    assert qwen25("Qwen/Qwen2.5-Coder-0.5B-Instruct@0123") == QWEN25_SHAPES["0.5B"]
    assert qwen25("Qwen/Qwen2.5-32B-Instruct") == LARGE
    assert qwen25("Qwen/Qwen3-32B") is None
    assert plan.shape_of("nobody/nothing") is None
    (tmp_path / "config.json").write_text('{"hidden_size": 8}', encoding="utf-8")
    with pytest.raises(ModelError, match="no 'num_attention_heads'"):
        read(tmp_path)


def test_parameters_are_those_of_the_weights(base: Path) -> None:
    """All but biases are counted."""
    from stepladder import models

    model = models.load(base)
    counted = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias"))
    assert read(base).parameters == counted


@pytest.mark.parametrize(
    ("text", "gib"),
    [("32", 32), ("24 GiB", 24), ("80gb", 80), ("RTX 4090", 24), ("4090", 24), ("a100-80", 80), ("h200", 141)],
)  # fmt: skip
def test_cards_by_name_and_by_size(text: str, gib: float) -> None:
    assert parse_card(text).gib == gib


@pytest.mark.parametrize("text", ["", "0", "-3", "fast", "4091", "nan", "inf"])
def test_what_is_no_card_is_said(text: str) -> None:
    with pytest.raises(UserError, match="no such card; give its GiB, such as 32, or cpu, or one of T4, "):
        parse_card(text)


def test_time_follows_the_work() -> None:
    on = parse_card("V100 32")
    usual = serving(LARGE, WORK, on)
    assert serving(LARGE, WORK._replace(members=2), on).seconds == pytest.approx(usual.seconds / 2)
    measured = serving(LARGE, WORK, on, rate=usual.rate).seconds  # while it was measured prompts were read as well
    assert 0.6 * usual.seconds < measured < usual.seconds
    assert serving(LARGE, WORK._replace(read=50), on).seconds < usual.seconds
    slow = serving(LARGE, WORK, on, rate=10)
    assert slow.seconds / 4 == pytest.approx(1328 * 400 / 10, rel=0.02)
    assert members_in(LARGE, WORK, on, usual.seconds / 3600 * 1.01) == 4
    assert serving(QWEN25_SHAPES["0.5B"], WORK, on).rate <= MAX_SEQUENCES / capacity.MIN_STEP_SECONDS


def test_a_machine_without_a_card_unpacks_what_it_computes_with() -> None:
    on = Card("a CPU", 16, 20, 0.1, bytes_each=4)
    done = serving(QWEN25_SHAPES["0.5B"], WORK._replace(members=1), on)
    assert done.weights == 4 * QWEN25_SHAPES["0.5B"].parameters
    assert done.rate == pytest.approx(0.1e12 * capacity.EFFICIENCY / (2 * QWEN25_SHAPES["0.5B"].parameters), rel=0.01)
    assert not serving(QWEN25_SHAPES["7B"], WORK, on).fits
    here = parse_card("cpu")
    assert here.bytes_each in (2, 4)
    assert 0.001 < here.tflops < 1000
    assert 0.1 < here.bandwidth < 10_000


def test_what_does_not_fit_says_so_and_the_largest_lever_comes_first() -> None:
    whole = serving(LARGE, WORK._replace(bits=16), parse_card("32"))
    assert not whole.fits
    assert whole.seconds == float("inf")
    assert members_in(LARGE, WORK._replace(bits=16), parse_card("32"), 4) == 0
    first, *others = levers(LARGE, WORK._replace(bits=16), parse_card("32"))
    assert first.change == "4 bits"
    assert not any(lever.result.fits for lever in others)
    assert levers(LARGE, WORK._replace(votes=9), parse_card("32"))[0].change == "one answer a question"
    assert levers(LARGE, WORK, parse_card("32"))[0].change == "one member"


def shown(folder: Path, text: str, gib: str, hours: float, rate: float | None = None) -> str:
    (folder / "run.toml").write_text(text, encoding="utf-8")
    console = Console(file=io.StringIO(), width=80)
    config = load(folder / "run.toml")
    context = Context(config, Workspace(folder / "runs", config.name), Progress(console))
    flow.run(context, ("questions",))
    shape, work = plan.shape_of(config.train.base), plan.work_of(context)
    fit_tables.show(config, shape, work, parse_card(gib), hours, rate, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_plan_says_yes_or_no(tmp_path: Path) -> None:
    examples = Path(__file__).parent.parent / "examples" / "closedworld"
    text = f"""
name = "p"
language = "en"
[questions]
train = "{examples / "train.jsonl"}"
test = "{examples / "test.jsonl"}"
[[rung]]
name = "worked"
kind = "worked"
[train]
base = "Qwen/Qwen2.5-32B-Instruct"
[[member]]
name = "a"
[[member]]
name = "b"
"""
    said = shown(tmp_path, text, "32", 4)
    assert "201 questions, 1 answer each" in said
    assert "Yes: 2 members in 4 bits answer everything in" in said
    assert "The largest lever: " in said
    assert max(map(len, said.splitlines())) <= 80
    assert "No: 2 members in 4 bits need" in shown(tmp_path, text, "32", 0.01)
    assert "do not fit 16 GiB" in shown(tmp_path, text, "16", 4)
    assert "The largest lever: a card of 24 GiB (L4)" in shown(tmp_path, text, "16", 4)
    assert "Speed: as you measured it." in " ".join(shown(tmp_path, text, "32", 4, 100).split())
    assert "is not on this machine yet" in shown(tmp_path, text.replace("Qwen/Qwen2.5-32B", "nobody/x"), "32", 4)


def test_a_shape_knows_what_is_shared() -> None:
    shape = Shape(2, 8, 16, 2, 1, 4, 100, tied=True)
    assert shape._replace(tied=False).parameters - shape.parameters == 800
    assert shape.linear_parameters == 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)


def test_members_side_by_side_on_a_card() -> None:
    three = WORK._replace(members=3, length=1024)
    cache = capacity.side_by_side_cache(QWEN25_SHAPES["3B"], three, parse_card("32"))
    assert cache is not None
    assert cache / GIB == pytest.approx(32 * 0.92 / 3 - weights(QWEN25_SHAPES["3B"], 4) / GIB - 1.5, abs=0.01)
    assert capacity.side_by_side_cache(QWEN25_SHAPES["3B"], three._replace(members=9), parse_card("32")) is None
    assert capacity.side_by_side_cache(LARGE, three, parse_card("32")) is None
    assert capacity.side_by_side_cache(QWEN25_SHAPES["3B"], three, Card("cpu", 32, 20, 0.1, 4)) is None


def test_a_card_is_used_as_far_as_serve_says() -> None:
    whole = serving(QWEN25_SHAPES["7B"], WORK, parse_card("32")).cache
    half = serving(QWEN25_SHAPES["7B"], WORK._replace(utilisation=0.5), parse_card("32")).cache
    assert whole - half == pytest.approx((0.92 - 0.5) * 32 * GIB)
    assert serving(QWEN25_SHAPES["7B"], WORK._replace(kv_cache_gib=2), parse_card("32")).cache == 2 * GIB
