"""Linear layers in which a row's bits do not hang on the other rows."""

from __future__ import annotations

import pytest
import torch

from stepladder.models import products
from stepladder.models.number_format import prepare_dtype

pytestmark = pytest.mark.dtype

SIZES = (16, 19, 31, 40, 64, 65, 100, 129, 200, 256)


@pytest.mark.parametrize("shape", [(192, 576), (1536, 576), (576, 1536), (200, 64)])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    dtype = prepare_dtype("auto")
    weight = torch.randn(shape, generator=generator).to(dtype)
    rows = torch.randn(300, shape[1], generator=generator).to(dtype)
    with products.IndependentRows():
        expected = torch.nn.functional.linear(rows, weight)
        for size in SIZES:
            chosen = torch.randperm(300, generator=generator)[:size]
            assert torch.equal(torch.nn.functional.linear(rows[chosen], weight), expected[chosen])


def test_pieces_give_what_linear_gives() -> None:
    generator = torch.Generator().manual_seed(2)
    rows, weight, bias = (torch.randn(shape, generator=generator) for shape in ((3, 50, 8), (5, 8), (5,)))
    expected = torch.nn.functional.linear(rows, weight, bias)
    torch.testing.assert_close(products.linear_in_pieces(rows, weight, bias), expected)
    torch.testing.assert_close(products.linear_in_pieces(rows[0, 0], weight, bias), expected[0, 0])


def test_kernels_that_add_otherwise_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear layer whose last bit hangs on the number of rows is multiplied in pieces, and only that."""

    def hangs_on_the_number(input: torch.Tensor, weight: torch.Tensor, bias: object = None) -> torch.Tensor:
        return input @ weight.T + len(input)

    rows, weight = torch.ones(100, 4), torch.ones(3, 4)
    monkeypatch.setattr(products, "linear", hangs_on_the_number)
    monkeypatch.setattr(products, "_in_pieces", {})
    assert set(products._linear(rows, weight).flatten().tolist()) == {4.0 + products.PIECE}
    monkeypatch.setattr(products, "linear", lambda input, weight, bias=None: (input[..., None, :] * weight).sum(-1))
    assert set(products._linear(rows, torch.ones(2, 4)).flatten().tolist()) == {4.0}
    assert list(products._in_pieces.values()) == [True, False]
