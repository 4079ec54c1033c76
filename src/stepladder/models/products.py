"""Linear layers in which a row's bits do not hang on the other rows. Imports torch, so import it late."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import linear, pad
from torch.overrides import TorchFunctionMode

PIECE = 64
"""Rows of a product. Where all products have as many, a row's bits depend on the row alone; fewer are slower for many
rows, and more for few (docs/determinism.md)."""
PROBED_SIZES = (16, 24, 33, 65, 128, 300)
"""Numbers of rows between which processors were seen to change how they add."""

_in_pieces: dict[tuple[torch.Size, torch.dtype, int], bool] = {}
"""By a weight's shape, its number format and the number of threads: whether it is multiplied in pieces."""


class IndependentRows(TorchFunctionMode):
    """Context manager in which linear layers on the CPU give a row the same bits whatever rows stand beside it, from
    the smallest of :data:`PROBED_SIZES` on.

    The kernels of some processors add in another order for another number of rows. Whether they do is found out at the
    first product with a weight of some shape; if so, rows are multiplied in pieces of :data:`PIECE`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (_linear if func is linear else func)(*args, **(kwargs or {}))


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if weight.device.type != "cpu" or isinstance(weight, FakeTensor):
        return linear(input, weight, bias)
    kernel = (weight.shape, weight.dtype, torch.get_num_threads())
    if kernel not in _in_pieces:
        _in_pieces[kernel] = _depends_on_row_count(weight)
    return linear_in_pieces(input, weight, bias) if _in_pieces[kernel] else linear(input, weight, bias)


def _depends_on_row_count(weight: torch.Tensor) -> bool:
    """Whether rows of a product have other bits in one of :data:`PROBED_SIZES`."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(max(PROBED_SIZES), weight.shape[1], generator=generator).to(weight.dtype)
    expected = linear_in_pieces(rows, weight)
    return not all(torch.equal(linear(rows[:size], weight), expected[:size]) for size in PROBED_SIZES)


def linear_in_pieces(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear``, computed for :data:`PIECE` rows at a time, the last ones filled up with zeros."""
    rows = input.reshape(-1, input.shape[-1])
    filled = pad(rows, (0, 0, 0, -len(rows) % PIECE))
    pieces = [linear(piece, weight, bias) for piece in torch.split(filled, PIECE)]
    return torch.cat(pieces)[: len(rows)].reshape(*input.shape[:-1], len(weight))
