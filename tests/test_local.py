"""The embedded engine against transformers' own generate, on the real bundled model."""

from __future__ import annotations

import contextlib
import gc
import random
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from stepladder import models
from stepladder.ask.local import decoding
from stepladder.ask.local import engine as local_engine
from stepladder.ask.local.engine import Local
from stepladder.ask.local.memory import BATCH_SHARE, SCORE_BYTES, rows_that_fit
from stepladder.ask.request import Request
from stepladder.errors import AskError
from stepladder.records import Message

pytestmark = pytest.mark.dtype

TEXTS = (
    "Ann is kind. Bob is loud. Who is loud?",
    "Ann is kind. Bob is loud. Who is kind?",
    "What is 2 + 2?",
    "hi",
)


def request(text: str, **settings: float) -> Request:
    messages = (Message(role="system", content="Answer briefly."), Message(role="user", content=text))
    return Request.model_validate({"model": "bundled", "messages": messages, "max_tokens": 12} | settings)


@pytest.fixture(scope="module")
def engine() -> Local:
    return Local.load(models.locate(models.BUNDLED))


def test_a_batch_answers_what_generate_answers_one_at_a_time(engine: Local) -> None:
    import torch

    requests = [request(text) for text in TEXTS]
    answers = engine.answer(requests)
    for asked, answer in zip(requests, answers, strict=True):
        ids = torch.tensor([engine._prompt(asked).tokens])
        expected = engine._model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=asked.max_tokens, do_sample=False
        )
        text = engine._tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer.text == str(text).strip()
        assert answer.prompt_tokens == ids.shape[1]


def test_an_answer_is_the_same_bytes_whatever_its_company(engine: Local) -> None:
    """Alone, by twos, by fives and all at once: other batches, other padding, other shared prefixes; other numbers of
    rows at the end, where some have finished."""
    problems = ("Ann is kind. Bob is loud.", "Room 1 has tea. Room 2 has milk. Room 3 has no tea, as everybody knows.")
    asked = [request(f"{problem} {text}", max_tokens=24) for problem in problems for text in TEXTS]
    together = [answer.text for answer in engine.answer(asked)]
    assert len(set(together)) > 4
    for size in (1, 2, 5):
        groups = [asked[at : at + size] for at in range(0, len(asked), size)]
        assert [answer.text for group in groups for answer in engine.answer(group)] == together


def test_long_prompts_are_attended_to_in_pieces(engine: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [request(text * 9, max_tokens=6) for text in TEXTS]
    whole = engine.answer(asked)
    monkeypatch.setattr(decoding, "MAX_SCORES", 1)
    assert engine.answer(asked) == whole


def test_sampling_depends_on_the_request_and_not_on_its_company(engine: Local) -> None:
    hot = [request(TEXTS[0], temperature=1.5, sample_index=index) for index in range(4)]
    together = engine.answer(hot)
    alone = engine.answer(hot[:1])
    assert together[0].text == alone[0].text
    assert len({answer.text for answer in together}) > 1


def test_a_plan_holds_every_request_once(engine: Local) -> None:
    requests = [request(text, max_tokens=cap) for text in TEXTS for cap in (4, 8)]
    groups = engine.plan(requests)
    assert sorted(r.key + str(r.max_tokens) for g in groups for r in g) == sorted(
        r.key + str(r.max_tokens) for r in requests
    )
    assert all(len({r.max_tokens for r in group}) == 1 for group in groups)


def test_batches_are_as_large_as_the_memory_that_is_free(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Local.load(base)
    requests = [request(text) for text in TEXTS]
    longest = max(len(engine._prompt(r).tokens) for r in requests)
    whole = {r.key: answer for r, answer in zip(requests, engine.answer(requests), strict=True)}
    each = row_bytes(engine, longest, 12)
    for rows in (2, len(requests)):
        monkeypatch.setattr(local_engine, "free_where_computed", lambda rows=rows: (rows + 0.5) * each / BATCH_SHARE)
        groups = engine.plan(requests)
        assert max(map(len, groups)) == rows
        assert sorted(r.key for group in groups for r in group) == sorted(r.key for r in requests)
        assert {r.key: a for group in groups for r, a in zip(group, engine.answer(group), strict=True)} == whole
    monkeypatch.setattr(local_engine, "free_where_computed", lambda: 0)
    assert max(map(len, engine.plan(requests))) == 1


def row_bytes(engine: Local, prompt_tokens: int, max_tokens: int) -> float:
    """Bytes of a row, from how many of them fit a lot of memory."""
    rows = rows_that_fit(engine._model.config, 1e13, prompt_tokens, max_tokens, engine._model.dtype.itemsize)
    scores = engine._model.config.num_attention_heads * prompt_tokens**2 * SCORE_BYTES
    return float(BATCH_SHARE * 1e13 / rows + scores)


def test_a_row_of_32_billion_parameters_takes_what_the_arithmetic_says() -> None:
    """2,048 tokens of keys and values in bfloat16 are 0.5 GiB (docs/guide/plan.md): of 18 GiB beside 61 GiB of weights
    on a card of 80 GiB, a batch has 22 requests, not the 128 that would take 64 GiB."""
    config = Qwen2Config(
        hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
        num_key_value_heads=8, vocab_size=152_064,
    )  # fmt: skip
    assert 15 < rows_that_fit(config, 18 * 2**30, 600, 1448, 2) <= 28
    assert rows_that_fit(config, 2**30, 600, 1448, 2) == 1
    assert rows_that_fit(config, 18 * 2**30, 600, 1448, 4) < 14


@contextlib.contextmanager
def memory_left(mib: int) -> Iterator[None]:
    """This process can map so much more memory, and is refused what exceeds it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + mib * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_batch_that_memory_is_refused_for_is_halved_until_it_fits(base: Path) -> None:
    draw = random.Random(1)
    requests = [request(" ".join(draw.choices(TEXTS, k=60)) + str(number), max_tokens=2) for number in range(32)]
    engine = Local.load(base)
    expected = engine.answer(requests)
    with memory_left(300):
        answers = engine.answer(requests)
    assert answers == expected
    assert 1 <= engine._max_rows < 32
    engine = Local.load(base)
    long = request(" ".join(draw.choices(TEXTS, k=600)), max_tokens=2)  # its attention takes 256 MiB at a time
    with memory_left(100), pytest.raises(AskError, match=r"a prompt of [\d,]+ tokens .* do not fit the free memory"):
        engine.answer([long])


def test_an_error_that_is_not_of_memory_is_raised(engine: Local) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        engine._computed(engine._complete, [engine._prompt(request("hi"))._replace(tokens=(10**6,))])


def test_the_cache_says_how_full_it_is(engine: Local) -> None:
    """Every cache layer of transformers must."""
    block = decoding._Block(engine._model, torch.zeros(2, dtype=torch.long), 40)
    block.columns.place(torch.arange(3).expand(2, 3), torch.tensor([3, 2]), torch.float32)
    layer = block.blocks[0]
    keys, _ = layer.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
    assert keys.shape == (2, 1, 32, 4), "whole columns are read"
    assert (layer.get_seq_length(), layer.get_max_length(), layer.get_mask_sizes(3)) == (32, 64, (32, 0))


def test_there_is_never_a_second_whole_cache(engine: Local) -> None:
    cache = decoding._Block(engine._model, torch.zeros(2, dtype=torch.long), 40)
    cache.columns.place(torch.arange(3).expand(2, 3), torch.tensor([3, 2]), torch.float32)
    for layer in cache.blocks:
        layer.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
    wider = cache.spread(torch.tensor([0, 0, 1]), 70)
    assert [len(layer.keys) for layer in wider.blocks] == [3] * len(cache.blocks)
    assert not any(hasattr(layer, "keys") or hasattr(layer, "values") for layer in cache.blocks)
    gone = weakref.ref(wider.blocks[-1].keys)
    gc.disable()
    try:
        del wider, layer
        assert gone() is None, "a cache that nobody uses keeps its memory until Python looks for cycles"
    finally:
        gc.enable()


def test_log_probabilities_are_not_silently_left_out(engine: Local) -> None:
    wanted = Request(model="m", messages=(Message(role="user", content="Hi"),), max_tokens=4, top_logprobs=2)
    with pytest.raises(AskError, match="log-probabilities of one token only"):
        engine.plan([wanted])
