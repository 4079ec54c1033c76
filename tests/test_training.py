"""The order in which a student sees its examples."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stepladder.training.trl import Batched


@given(st.lists(st.integers(1, 400), min_size=1, max_size=90), st.integers(1, 8), st.integers(0, 9))
def test_an_epoch_holds_every_example_once_and_each_epoch_has_its_own_order(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    sampler = Batched(lengths, batch_size, seed)
    first = list(sampler)
    assert sorted(first) == list(range(len(lengths)))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(first)


def test_batches_hold_like_lengths_in_random_order() -> None:
    lengths = [100 + i % 4 * 50 for i in range(64)]
    order = list(Batched(lengths, 4, seed=1))
    batches = [[lengths[i] for i in order[at : at + 4]] for at in range(0, 64, 4)]
    assert sum(max(batch) - min(batch) for batch in batches) / len(batches) < 50
    assert [batch[0] for batch in batches] != sorted(batch[0] for batch in batches)
