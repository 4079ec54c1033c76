"""bfloat16 in float32 kernels: rounded once, with gradients, and nothing else changed. In a process of its own, since
it holds for the rest of one."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import torch
from stepladder.models.emulation import emulate_bfloat16

torch.manual_seed(0)
exact = torch.randn(9, 40), torch.randn(24, 40), torch.randn(24)
before = torch.nn.functional.linear(*exact)
emulate_bfloat16()
emulate_bfloat16()
assert torch.equal(torch.nn.functional.linear(*exact), before)

rows, weight, bias = (each.bfloat16().requires_grad_() for each in exact)
for more in ((), (bias,)):
    wide = torch.nn.functional.linear(rows.float(), weight.float(), *(each.float() for each in more))
    assert torch.equal(torch.nn.functional.linear(rows, weight, *more), wide.bfloat16())
batch = rows.reshape(3, 3, 40)
assert torch.equal(batch @ batch.mT, (batch.float() @ batch.float().mT).bfloat16())

torch.nn.functional.linear(rows, weight).backward(torch.ones(9, 24, dtype=torch.bfloat16))
assert torch.equal(weight.grad, (torch.ones(24, 9) @ rows.detach().float()).bfloat16())
heads = [torch.randn(2, 3, 7, 8).bfloat16().requires_grad_() for _ in "qkv"]
wide = [head.detach().float().requires_grad_() for head in heads]
hidden = torch.zeros(7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), -1e30)
attend = torch.nn.functional.scaled_dot_product_attention
mixed, exactly = attend(*heads, hidden.bfloat16()), attend(*wide, hidden)
assert torch.equal(mixed, exactly.bfloat16())
mixed.backward(torch.ones_like(mixed))
assert all(head.grad.dtype == torch.bfloat16 and head.grad.any() for head in heads)

with torch.autocast("cpu", torch.bfloat16):
    assert torch.nn.functional.linear(*exact[:2]).dtype == torch.bfloat16
"""


def test_products_are_rounded_once_and_all_else_is_as_before() -> None:
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
