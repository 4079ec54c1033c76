"""bfloat16 matrix products on CPUs without instructions for them, by float32 kernels.

The product of two bfloat16 numbers is exact in float32. Hardware adds such products in float32 and rounds once at the
end, and so do float32 kernels on the converted matrices. On a CPU with AVX2 they are six times as fast as PyTorch's own
emulation (docs/experiments.md). A product holds float32 copies of its two matrices, at most of the largest layer.
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
"""The operators behind linear layers, matrix products and attention, forward and backward. True: only the first of the
operator's results has the dtype of its arguments.
"""


@functools.cache
def emulate_bfloat16() -> Any:
    """Compute CPU products of bfloat16 matrices in this process by float32 kernels from now on.

    Returns:
        The library that holds the kernels; the cache keeps it, and so them, alive.
    """
    import torch

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch's kernel is overridden is intended
        for name, only_first in PRODUCTS.items():
            product = _widened(name, only_first)
            library.impl(name, product, "CPU", with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]
    return library


def _widened(name: str, only_first: bool) -> Any:
    """PyTorch's kernel called with bfloat16 matrices converted to float32, its results converted back."""
    import torch

    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def to_float32(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value

    def product(keys: torch.DispatchKeySet, first: torch.Tensor, *others: Any, **options: Any) -> Any:
        if first.dtype != torch.bfloat16:
            return kernel.call_boxed(keys, first, *others, **options)
        result = kernel.call_boxed(
            keys, *map(to_float32, (first, *others)), **{key: to_float32(options[key]) for key in options}
        )
        if isinstance(result, torch.Tensor):
            return result.to(torch.bfloat16)
        converted, unconverted = (result[:1], result[1:]) if only_first else (result, ())
        return (*(each.to(torch.bfloat16) for each in converted), *unconverted)

    return product
