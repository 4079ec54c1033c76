"""Memory and time arithmetic, against figures that are known."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stepladder.commands import plan
from stepladder.config import load
from stepladder.context import Context
from stepladder.errors import ModelError, UserError
from stepladder.forecast import capacity, fit_tables, memory, published
from stepladder.forecast.capacity import levers, serving
from stepladder.forecast.datasheets import CARDS, Card, parse_card
from stepladder.forecast.fit_tables import Terms
from stepladder.forecast.many_servers import DRIVER_ANSWERS, throughput
from stepladder.forecast.memory import GIB, MAX_SEQUENCES, training, weights
from stepladder.forecast.model_shape import QWEN25_SHAPES, Shape, qwen25, read
from stepladder.forecast.workload import Workload, obstacle
from stepladder.progress import Progress, duration
from stepladder.stages import flow
from stepladder.workspace import Workspace

LARGE = QWEN25_SHAPES["32B"]
WORK = Workload(questions=1328, votes=1, members=4, prompt=200, read=200, answer=400, length=2048, bits=4)


def test_a_32b_model_in_4_bits_on_32_gib() -> None:
    """18.0 GiB of weights, 256 KiB of keys and values a token, about 20 sequences of 2,048."""
    assert weights(LARGE, 4) / GIB == pytest.approx(18.0, abs=0.05)
    assert memory.kv_per_token(LARGE) == 256 * 1024
    assert serving(LARGE, WORK, parse_card("RTX 5090")).at_once == 20


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
    on = parse_card("RTX 5090")
    usual = serving(LARGE, WORK, on)
    assert serving(LARGE, WORK._replace(members=2), on).seconds == pytest.approx(usual.seconds / 2)
    measured = serving(LARGE, WORK, on, rate=usual.rate).seconds  # while it was measured prompts were read as well
    assert 0.5 * usual.seconds < measured < usual.seconds
    assert serving(LARGE, WORK._replace(read=50), on).seconds < usual.seconds
    slow = serving(LARGE, WORK, on, rate=10)
    assert slow.seconds / 4 == pytest.approx(1328 * 400 / 10, rel=0.02)
    assert serving(QWEN25_SHAPES["0.5B"], WORK, on).rate <= MAX_SEQUENCES / capacity.MIN_STEP_SECONDS


def test_a_machine_without_a_card_unpacks_what_it_computes_with() -> None:
    on = Card("a CPU", 16, 20, 0.1, None, "a test", bytes_each=4)
    embedded = WORK._replace(members=1, engine="local")
    done = serving(QWEN25_SHAPES["0.5B"], embedded, on)
    assert done.weights == 4 * QWEN25_SHAPES["0.5B"].parameters
    assert done.rate == pytest.approx(
        0.1e12 * capacity.COMPUTE_EFFICIENCY / (2 * QWEN25_SHAPES["0.5B"].parameters), rel=0.01
    )
    assert not serving(QWEN25_SHAPES["7B"], embedded, on).fits
    served = serving(QWEN25_SHAPES["7B"], WORK, on)  # by vLLM, which computes with packed weights
    assert (served.fits, served.cache) == (True, memory.HOST_CACHE_GIB * GIB)
    here = parse_card("cpu")
    assert here.bytes_each in (2, 4)
    assert 0.001 < here.tflops < 1000
    assert 0.1 < here.bandwidth < 10_000


def test_what_does_not_fit_says_so_and_the_largest_lever_comes_first() -> None:
    card = parse_card("RTX 5090")
    whole = serving(LARGE, WORK._replace(bits=16), card)
    assert not whole.fits
    assert whole.seconds == float("inf")
    first, *others = levers(LARGE, WORK._replace(bits=16), card)
    assert first.change == "4 bits"
    assert not any(lever.result.fits for lever in others)
    assert levers(LARGE, WORK._replace(votes=9), card)[0].change == "one answer a question"
    assert levers(LARGE, WORK, card)[0].change == "one member"


def shown(
    folder: Path,
    text: str,
    card: str,
    hours: float,
    rate: float | None = None,
    megabits: float = 0,
    questions: int | None = None,
    **fleet: Any,
) -> str:
    (folder / "run.toml").write_text(text, encoding="utf-8")
    console = Console(file=io.StringIO(), width=80)
    config = load(folder / "run.toml")
    context = Context(config, Workspace(folder / "runs", config.name), Progress(console))
    flow.run(context, ("questions",))
    shape, work = plan.shape_of(config.train.base), plan.work_of(context)
    work = work._replace(questions=questions or work.questions)
    fit_tables.show(config, shape, work, Terms(parse_card(card), hours, rate, megabits, **fleet), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


EXAMPLES = Path(__file__).parent.parent / "examples" / "closedworld"
QUESTIONS = f"""
name = "p"
language = "en"
[questions]
train = "{EXAMPLES / "train.jsonl"}"
test = "{EXAMPLES / "test.jsonl"}"
[[rung]]
name = "worked"
kind = "worked"
[[member]]
name = "a"
"""


def test_a_plan_says_yes_or_no(tmp_path: Path) -> None:
    text = (
        QUESTIONS
        + """
[train]
base = "Qwen/Qwen2.5-32B-Instruct"
[[member]]
name = "b"
[predict]
engine = "vllm"
"""
    )
    said = shown(tmp_path, text, "RTX 5090", 4)
    assert "201 questions, 1 answer each" in said
    assert "Yes: 2 members in 4 bits answer everything in" in said
    assert "The largest lever: " in said
    assert "published figures of vLLM such forecasts were 37% too slow to 48% too fast" in said
    assert "No: 2 members in 4 bits need" in shown(tmp_path, text, "RTX 5090", 0.01)
    half = text + '[serve]\ndtype = "float16"\n'
    assert "do not fit T4" in shown(tmp_path, half, "T4", 4)
    assert "The largest lever: a card of 24 GiB (L4)" in shown(tmp_path, half, "T4", 4)
    assert "Speed: as you measured it." in shown(tmp_path, text, "RTX 5090", 4, 100)
    assert "is not on this machine yet" in shown(tmp_path, text.replace("Qwen/Qwen2.5-32B", "nobody/x"), "32", 4)


def test_many_servers_take_less_time_until_the_driver_is_what_limits() -> None:
    card = parse_card("H100")
    million = WORK._replace(questions=10**6, members=1)
    alone = serving(LARGE, million, card).seconds
    found = {servers: throughput(LARGE, million, card, servers) for servers in (1, 8, 64, 512, 4096)}
    times = [one.seconds for one in found.values() if one is not None]
    assert times[0] == pytest.approx(alone, rel=0.01)
    assert times[0] / times[1] == pytest.approx(8, rel=0.05)
    assert times == sorted(times, reverse=True)
    assert times[-1] == times[-2] > 10**6 / DRIVER_ANSWERS
    few, many = found[8], found[4096]
    assert few is not None
    assert many is not None
    assert "the cards" in few.limit(8, math.inf)
    assert "the driver" in many.limit(4096, math.inf)
    assert "the disk" in few.limit(8, 10**9)
    assert few.ledger_bytes == pytest.approx(10**6 * 3580, rel=0.01)
    assert throughput(LARGE, million, parse_card("T4"), 8) is None
    slow = throughput(LARGE, million, card, 8, measured=1000.0)
    assert slow is not None
    assert slow.rate == 8 * 1000 / WORK.answer


def test_a_plan_of_a_cluster_says_what_limits_it(tmp_path: Path) -> None:
    text = QUESTIONS + '[train]\nbase = "Qwen/Qwen2.5-32B-Instruct"\n[predict]\nengine = "vllm"\n'
    said = shown(tmp_path, text, "H100", 4, servers=16, card_price=2.5, questions=10**6)
    assert "1,000,000 questions, 1 answer each" in said
    assert re.search(r"16 servers with a card each: [\d hmin]+, \$\d+\.\d\d; \d+ answers a second, [\d.]+ GiB", said)
    assert "What limits them: the cards; more of them help, up to " in said
    assert "servers with a card each" not in shown(tmp_path, text, "H100", 4)


def test_the_engine_of_predict_decides_what_computes(tmp_path: Path) -> None:
    """The embedded engine unpacks 4-bit weights: 61 GiB, not 18."""
    text = QUESTIONS + '[train]\nbase = "Qwen/Qwen2.5-32B-Instruct"\n[predict]\nengine = "local"\n'
    assert "No: 1 member in 4 bits do not fit RTX 5090." in shown(tmp_path, text, "RTX 5090", 4)
    said = shown(tmp_path, text, "A100 80", 4)
    assert "61.0 GiB" in said
    assert "The embedded engine computes, which unpacks weights" in said


def test_weights_take_time_to_arrive(tmp_path: Path) -> None:
    text = QUESTIONS + '[train]\nbase = "Qwen/Qwen2.5-32B-Instruct"\n[predict]\nengine = "vllm"\n'
    said = shown(tmp_path, text, "RTX 5090", 4, megabits=100)
    seconds = capacity.arrival_seconds(weights(LARGE, 4), 100)
    assert seconds == pytest.approx(weights(LARGE, 4) * (8 / 100e6 + 1 / capacity.UNPACK_BYTES_PER_SECOND))
    assert f"In it {duration(seconds)} until the weights are there: 100 Mbit/s, and unpacking." in said
    assert "until the weights are there" not in shown(tmp_path, text, "RTX 5090", 4)


@pytest.mark.parametrize(
    ("card", "changes", "problem"),
    [
        ("32", {}, "llm-compressor's 4 bits need compute capability 7.5: a card of 32 GiB may be a V100 32, of "),
        ("V100 32", {}, "need compute capability 7.5: a V100 32 has compute capability 7.0"),
        ("V100 32", {"bits": 16}, "bfloat16 needs compute capability 8.0, or set [serve] dtype = 'float16': a V100"),
        ("V100 32", {"quantiser": "gptqmodel", "dtype": "float16"}, None),
        ("T4", {}, "bfloat16 needs compute capability 8.0, or set [serve] dtype = 'float16': a T4 has compute"),
        ("T4", {"dtype": "float16"}, None),
        ("T4", {"engine": "local"}, "or set [predict] dtype = 'float32'"),
        ("RTX 5090", {}, None),
        ("24", {}, None),
    ],
)
def test_what_a_card_has_no_kernels_for_is_said(card: str, changes: dict[str, Any], problem: str | None) -> None:
    reason = obstacle(parse_card(card), WORK._replace(**changes))
    assert (reason is None) == (problem is None)
    assert (problem or "") in (reason or "")
    assert serving(QWEN25_SHAPES["7B"], WORK._replace(**changes), parse_card(card)).fits == (problem is None)


def test_a_plan_for_a_card_without_kernels_says_what_to_change(tmp_path: Path) -> None:
    text = QUESTIONS + '[train]\nbase = "Qwen/Qwen2.5-32B-Instruct"\n[predict]\nengine = "vllm"\n'
    said = shown(tmp_path, text, "32", 4)
    assert "Taken for a V100 32, the slowest of that size" in said
    assert "No: vLLM's kernels for llm-compressor's 4 bits need compute capability 7.5" in said
    assert "The largest lever: a card of 32 GiB (RTX 5090)" in said


def test_the_old_kernel_of_a_v100_is_slow() -> None:
    old = WORK._replace(quantiser="gptqmodel", dtype="float16")
    slow, fast = serving(LARGE, old, parse_card("V100 32")), serving(LARGE, WORK, parse_card("RTX 5090"))
    assert fast.rate / slow.rate > 3


def test_a_size_stands_for_the_slowest_card_that_has_it() -> None:
    assert [parse_card(size).taken_for for size in ("16", "20", "24", "32", "40", "80", "200")] == [
        "T4", "L4", "L4", "V100 32", "A100 40", "A100 80", "H200",
    ]  # fmt: skip
    assert all(card.source and card.capability for card in CARDS)


def test_forecasts_are_near_published_figures() -> None:
    """Within the bounds that docs/guide/planning.md names; most within 30 %."""
    lowest, median, highest = published.deviations()
    assert (lowest, highest) == pytest.approx((-0.37, 0.48), abs=0.01)
    assert abs(median) < 0.1
    near = [figure for figure in published.FIGURES if abs(published.deviation(figure)) < 0.3]
    assert len(near) >= len(published.FIGURES) - 2


def test_a_shape_knows_what_is_shared() -> None:
    shape = Shape(2, 8, 16, 2, 1, 4, 100, tied=True)
    assert shape._replace(tied=False).parameters - shape.parameters == 800
    assert shape.linear_parameters == 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)


def test_members_side_by_side_on_a_card() -> None:
    three = WORK._replace(members=3, length=1024)
    card = parse_card("RTX 5090")
    cache = capacity.side_by_side_cache(QWEN25_SHAPES["3B"], three, card)
    assert cache is not None
    assert cache / GIB == pytest.approx(32 * 0.92 / 3 - weights(QWEN25_SHAPES["3B"], 4) / GIB - 1.5, abs=0.01)
    assert capacity.side_by_side_cache(QWEN25_SHAPES["3B"], three._replace(members=9), card) is None
    assert capacity.side_by_side_cache(LARGE, three, card) is None
    assert capacity.side_by_side_cache(QWEN25_SHAPES["3B"], three, Card("cpu", 32, 20, 0.1, None, "")) is None


def test_a_card_is_used_as_far_as_serve_says() -> None:
    whole = serving(QWEN25_SHAPES["7B"], WORK, parse_card("32")).cache
    half = serving(QWEN25_SHAPES["7B"], WORK._replace(utilisation=0.5), parse_card("32")).cache
    assert whole - half == pytest.approx((0.92 - 0.5) * 32 * GIB)
    assert serving(QWEN25_SHAPES["7B"], WORK._replace(kv_cache_gib=2), parse_card("32")).cache == 2 * GIB
