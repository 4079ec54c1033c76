"""What a training step computes: packs lose nothing, and the order in which a student sees them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepladder import models
from stepladder.config import Train
from stepladder.records import Example, Message
from stepladder.training.data import Data
from stepladder.training.sequences import IGNORED, LengthGroupedSampler, Pack, TokenRow, pack, singly

pytestmark = pytest.mark.dtype


def rows_of(packed: Pack) -> list[tuple[list[int], list[int]]]:
    """The rows of a pack spelled out again: (ids, scored ids)."""
    tokens = list(zip(packed.input_ids, packed.labels, packed.position_ids, packed.branches, strict=True))
    rows = []
    for branch in range(1, max(packed.branches) + 1):
        own = [token for token in tokens if token[3] in (0, branch)]
        assert [token[2] for token in own] == list(range(len(own)))
        rows.append(([token[0] for token in own], [token[1] for token in own if token[1] != IGNORED]))
    return rows


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=2, max_size=9), st.integers(1, 8)), max_size=12))
def test_packs_hold_every_row_once_in_no_more_tokens_than_the_rows_have(drawn: list[tuple[list[int], int]]) -> None:
    rows = [TokenRow(ids, min(prompt, len(ids) - 1)) for ids, prompt in drawn]
    packs = pack(rows, max_length=20)
    packed = Counter(tuple(map(tuple, row)) for one in packs for row in rows_of(one))
    assert packed == Counter((tuple(row.ids), tuple(row.ids[row.prompt_length :])) for row in rows)
    assert sum(len(one.input_ids) for one in packs) <= sum(len(row.ids) for row in rows)
    assert all(len(one.input_ids) <= 20 for one in packs)


def test_questions_about_one_problem_share_a_pack_and_others_do_not() -> None:
    system, problems = list(range(10)), [list(range(20, 40)), list(range(40, 60))]
    rows = [TokenRow([*system, *problem, 100 + n, 101, 102], 31) for problem in problems for n in range(3)]
    packs = pack(rows, max_length=100)
    assert [max(one.branches) for one in packs] == [3, 3]
    assert [len(one.input_ids) for one in packs] == [30 + 3 * 3] * 2


def test_a_pack_gives_the_loss_and_the_gradients_of_its_rows() -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    from stepladder.training.loss import collate, completion_loss

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).double()  # type: ignore[no-untyped-call]
    draw = torch.Generator().manual_seed(1)
    shared = torch.randint(50, (7,), generator=draw).tolist()
    rows = [TokenRow(shared + torch.randint(50, (n,), generator=draw).tolist(), 9) for n in (5, 9, 6)]
    rows.append(TokenRow([*rows[0].ids[:9], 1, 2, 3], 9))  # another chain of the first row's question
    rows.append(TokenRow([3, 4, 5, 6], 2))  # shares nothing

    def measure(packs: list[Pack]) -> list[Any]:
        loss = completion_loss(model, collate([one._asdict() for one in packs]))
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    packs = pack(rows, max_length=100)
    assert len(packs) < len(rows)
    for expected, got in zip(measure(singly(rows)), measure(packs), strict=True):
        torch.testing.assert_close(got, expected)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=90), st.integers(1, 8), st.integers(0, 9))
def test_an_epoch_holds_every_example_once_and_each_epoch_has_its_own_order(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    sampler = LengthGroupedSampler(lengths, batch_size, seed)
    first = list(sampler)
    assert sorted(first) == list(range(len(lengths)))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(first)


def test_batches_hold_like_lengths_in_random_order() -> None:
    lengths = [100 + i % 4 * 50 for i in range(64)]
    order = list(LengthGroupedSampler(lengths, 4, seed=1))
    batches = [[lengths[i] for i in order[at : at + 4]] for at in range(0, 64, 4)]
    assert sum(max(batch) - min(batch) for batch in batches) / len(batches) < 50
    assert [batch[0] for batch in batches] != sorted(batch[0] for batch in batches)


def test_without_packing_a_step_holds_the_conversations_that_the_recipe_says(base: Path) -> None:
    pytest.importorskip("trl")
    from stepladder.training import trl

    tokenizer = models.load_tokenizer(base)
    asked = Message(role="user", content="One long problem that all questions are about. " * 5)
    examples = [
        Example(
            messages=(asked, Message(role="assistant", content=f"Chain {n}.\nAnswer: A")), question_id="q", teacher="t"
        )
        for n in range(20)
    ]
    recipe = Train(batch_size=1, gradient_accumulation=8, packing=False)
    assert trl._plan(recipe, Data(examples), tokenizer).steps_per_epoch == 3
    packed = trl._plan(recipe.model_copy(update={"packing": True}), Data(examples), tokenizer)
    assert (len(packed.packs), packed.steps_per_epoch) == (1, 1)


def test_weight_decay_reaches_both_trainers(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from stepladder.training import swift, trl

    settings = Train(weight_decay=0.1)
    plan = trl.Plan([], [], steps_per_epoch=1, is_measured=False, stops_early=False, metric="eval_loss")
    assert trl._arguments(settings, 0, plan, tmp_path).weight_decay == 0.1
    words = swift.sft(settings, 0, tmp_path, tmp_path, tmp_path, "float32", cuda=False)
    assert words[words.index("--weight_decay") + 1] == "0.1"
