"""The embedded engine against transformers' own generate, on the real bundled model."""

from __future__ import annotations

import pytest
import torch

from stepladder import models
from stepladder.ask.local import decoding
from stepladder.ask.local.engine import Local
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


def test_the_cache_says_how_full_it_is(engine: Local) -> None:
    """Every cache layer of transformers must."""
    block = decoding._Block(engine._model, torch.zeros(2, dtype=torch.long), 40)
    block.place(torch.arange(3).expand(2, 3), torch.tensor([3, 2]), torch.float32)
    layer = block.blocks[0]
    keys, _ = layer.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
    assert keys.shape == (2, 1, 32, 4), "whole columns are read"
    assert (layer.get_seq_length(), layer.get_max_length(), layer.get_mask_sizes(3)) == (32, 64, (32, 0))


def test_log_probabilities_are_not_silently_left_out(engine: Local) -> None:
    wanted = Request(model="m", messages=(Message(role="user", content="Hi"),), max_tokens=4, top_logprobs=2)
    with pytest.raises(AskError, match="log-probabilities of one token only"):
        engine.plan([wanted])
