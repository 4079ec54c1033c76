"""bfloat16 on processors that do not multiply it: the same sums as on hardware that does, in float32 kernels.

Two bfloat16 numbers have an exact product in float32, and hardware adds such products in float32 and rounds once, at
the end. So does this, with float32 kernels of the whole matrices: on a CPU with AVX2 six times as fast as PyTorch's own
emulation (EXPERIMENTS.md).
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
"""The operators that linear layers and matrix products come to, forwards and backwards."""


@functools.cache
def emulate_bfloat16() -> None:
    """From now on, CPU products of bfloat16 matrices in this process are computed by float32 kernels."""
    import torch

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _LIBRARIES.append(library)  # its kernels are there as long as it is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel of PyTorch's takes second place is what is wanted
        for name in PRODUCTS:
            library.impl(name, _widened(name), "CPU", with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]


_LIBRARIES: list[Any] = []


def _widened(name: str) -> Any:
    """PyTorch's kernel, given bfloat16 matrices as float32."""
    import torch

    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keys: torch.DispatchKeySet, first: torch.Tensor, *others: Any, **more: Any) -> Any:
        if first.dtype != torch.bfloat16:
            return kernel.call_boxed(keys, first, *others, **more)
        wide = (each.float() if isinstance(each, torch.Tensor) else each for each in (first, *others))
        return kernel.call_boxed(keys, *wide, **more).to(torch.bfloat16)

    return product
