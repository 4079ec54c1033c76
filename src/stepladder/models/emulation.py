"""bfloat16 on processors that do not multiply it: the same sums as on hardware that does, in float32 kernels.

Two bfloat16 numbers have an exact product in float32, and hardware adds such products in float32 and rounds once, at
the end. So does this, with float32 kernels of the whole matrices: on a CPU with AVX2 six times as fast as PyTorch's own
emulation (docs/experiments.md).
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

PRODUCTS = {
    "mm": False,
    "addmm": False,
    "bmm": False,
    "baddbmm": False,
    "_scaled_dot_product_flash_attention_for_cpu": True,
    "_scaled_dot_product_flash_attention_for_cpu_backward": False,
}
"""The operators that linear layers, matrix products and attention come to, forwards and backwards; True: only the first
of its results is in the format of its arguments."""


@functools.cache
def emulate_bfloat16() -> Any:
    """From now on, CPU products of bfloat16 matrices in this process are computed by float32 kernels.

    Returns the library that holds these kernels; the cache keeps it alive, and them with it."""
    import torch

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel of PyTorch's takes second place is what is wanted
        for name, only_first in PRODUCTS.items():
            product = _widened(name, only_first)
            library.impl(name, product, "CPU", with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]
    return library


def _widened(name: str, only_first: bool) -> Any:
    """PyTorch's kernel, given bfloat16 matrices as float32."""
    import torch

    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value

    def product(keys: torch.DispatchKeySet, first: torch.Tensor, *others: Any, **more: Any) -> Any:
        if first.dtype != torch.bfloat16:
            return kernel.call_boxed(keys, first, *others, **more)
        result = kernel.call_boxed(keys, *map(wide, (first, *others)), **{key: wide(more[key]) for key in more})
        if isinstance(result, torch.Tensor):
            return result.to(torch.bfloat16)
        narrow, kept = (result[:1], result[1:]) if only_first else (result, ())
        return (*(each.to(torch.bfloat16) for each in narrow), *kept)

    return product
