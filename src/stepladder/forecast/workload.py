"""What is to be answered, by what, and what a card's kernels cannot do."""

from __future__ import annotations

from typing import NamedTuple

from stepladder.config import Serve
from stepladder.forecast.datasheets import Card

MIN_VLLM = (7, 0)
"""Compute capability that vLLM needs (docs.vllm.ai/en/v0.14.0/getting_started/installation/gpu)."""
MIN_COMPRESSED_TENSORS = (7, 5)
"""For 4 and 8 bits in llm-compressor's format: the Marlin kernels. vLLM's table of quantised formats has them from
Turing on (docs.vllm.ai/en/latest/features/quantization, read 2026-11-26; up to 0.15 from Ampere, 8.0, on)."""
MIN_BFLOAT16 = (8, 0)
"""For products in bfloat16, in vLLM and in PyTorch."""
OLD_KERNEL_SLOWDOWN = 3.0
"""Of the classic GPTQ format on cards without Marlin, whose kernel does not scale with the batch: 2 to 4 times slower
(github.com/vllm-project/vllm/pull/2497)."""


class Workload(NamedTuple):
    """The questions to answer, and the models that answer them."""

    questions: int
    votes: int
    """Answers to each question."""
    members: int
    prompt: float
    """Tokens of a prompt, on average."""
    read: float
    """Those of them that an earlier prompt about the same problem does not share, on average."""
    answer: float
    """Tokens of an answer, on average."""
    length: int
    """Tokens of the longest prompt and answer together."""
    bits: int
    """Of the members' weights."""
    utilisation: float = Serve().utilisation
    """Share of a card's memory that a server may use."""
    kv_cache_gib: float | None = None
    """Size of the KV cache; by default what the weights leave."""
    engine: str = "vllm"
    """``[predict] engine``: ``vllm`` computes with packed weights, ``local`` unpacks them."""
    dtype: str = "auto"
    """Number format to compute in: ``[serve] dtype`` for vLLM, ``[predict] dtype`` for the embedded engine."""
    quantiser: str = "llmcompressor"
    """``[quantise] backend``, which decides the format of the weights."""


def obstacle(card: Card, workload: Workload) -> str | None:
    """Why the card cannot answer at all, whatever its memory, and what to do; None if nothing is known against it."""
    if card.capability is None:
        return None
    has = f"compute capability {card.capability[0]}.{card.capability[1]}"
    if card.taken_for is not None:
        has = f"a card of {card.gib:g} GiB may be a {card.taken_for}, of {has}; name yours with --card if it is another"
    else:
        has = f"a {card.name} has {has}"
    table = "serve" if workload.engine == "vllm" else "predict"
    other = "float16" if workload.engine == "vllm" else "float32"
    if workload.engine == "vllm" and card.capability < MIN_VLLM:
        return f"vLLM needs compute capability 7.0: {has}"
    if _is_packed(workload) and workload.quantiser == "llmcompressor" and card.capability < MIN_COMPRESSED_TENSORS:
        return f"vLLM's kernels for llm-compressor's {workload.bits} bits need compute capability 7.5: {has}"
    if workload.dtype in {"auto", "bfloat16"} and card.capability < MIN_BFLOAT16:
        return f"bfloat16 needs compute capability 8.0, or set [{table}] dtype = '{other}': {has}"
    return None


def slowdown(card: Card, workload: Workload) -> float:
    """How many times longer decoding takes than with the kernels of newer cards."""
    is_old = card.capability is not None and card.capability < MIN_COMPRESSED_TENSORS
    return OLD_KERNEL_SLOWDOWN if is_old and _is_packed(workload) else 1.0


def _is_packed(workload: Workload) -> bool:
    return workload.engine == "vllm" and workload.bits < 16
