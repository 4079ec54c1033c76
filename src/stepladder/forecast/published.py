"""Published figures of vLLM, which forecasts are held against: ``python benchmarks/forecast.py --published``.

Read 2026-11-26. All are of one card. ShareGPT: 1,000 requests at once, 217 tokens in and 201 out on average, by
``vllm bench serve``; where its page gives tokens in and out together, those written are 201 of 419.
"""

from __future__ import annotations

from typing import NamedTuple

from stepladder.forecast import capacity
from stepladder.forecast.datasheets import parse_card
from stepladder.forecast.model_shape import Shape
from stepladder.forecast.workload import Workload

QWEN3_8B = Shape(36, 4096, 12288, 32, 8, 128, 151_936, tied=False)
QWEN3_14B = Shape(40, 5120, 17408, 40, 8, 128, 151_936, tied=False)
QWEN3_32B = Shape(64, 5120, 25600, 64, 8, 128, 151_936, tied=False)
LLAMA2_7B = Shape(32, 4096, 11008, 32, 32, 128, 32_000, tied=False)
LLAMA31_8B = Shape(32, 4096, 14336, 32, 8, 128, 128_256, tied=False)
GPUSTACK = "github.com/gpustack/gpustack docs/performance-lab/"
SHAREGPT = (1000, 217.4, 201.4)
WRITTEN_SHARE = 201.4 / (217.4 + 201.4)
"""Of ShareGPT's tokens in and out."""


class PublishedFigure(NamedTuple):
    """A measurement that somebody else published."""

    model: str
    shape: Shape
    bits: int
    card: str
    at_once: int
    prompt: float
    """Tokens, on average."""
    answer: float
    """Tokens, on average."""
    tokens_per_second: float
    """Written, of all requests together."""
    source: str


FIGURES = (
    PublishedFigure("Qwen3-8B", QWEN3_8B, 16, "RTX 4090", *SHAREGPT, 3869.3 * WRITTEN_SHARE,
                    f"{GPUSTACK}references/the-impact-of-quantization-on-vllm-inference-performance.md, vLLM 0.9.2"),
    PublishedFigure("Qwen3-8B AWQ Marlin", QWEN3_8B, 4, "RTX 4090", *SHAREGPT, 5536.7 * WRITTEN_SHARE, "the same"),
    PublishedFigure("Qwen3-8B", QWEN3_8B, 16, "A100 80", *SHAREGPT, 10338.25 * WRITTEN_SHARE, "the same"),
    PublishedFigure("Qwen3-8B GPTQ Marlin", QWEN3_8B, 4, "A100 80", *SHAREGPT, 8146.73 * WRITTEN_SHARE, "the same"),
    PublishedFigure("Qwen3-8B", QWEN3_8B, 16, "H100", *SHAREGPT, 13305.38 * WRITTEN_SHARE, "the same"),
    PublishedFigure("Qwen3-8B W4A16", QWEN3_8B, 4, "H100", *SHAREGPT, 13605.46 * WRITTEN_SHARE, "the same"),
    PublishedFigure("Qwen3-14B", QWEN3_14B, 16, "A100 80", *SHAREGPT, 1887.31,
                    f"{GPUSTACK}qwen3-14b/a100.md, vLLM 0.11.0"),
    PublishedFigure("Qwen3-14B AWQ", QWEN3_14B, 4, "A100 80", *SHAREGPT, 1801.74, "the same"),
    PublishedFigure("Qwen3-32B", QWEN3_32B, 16, "A100 80", *SHAREGPT, 832.43,
                    f"{GPUSTACK}qwen3-32b/a100.md, vLLM 0.11.0"),
    PublishedFigure("Qwen3-32B AWQ", QWEN3_32B, 4, "A100 80", *SHAREGPT, 850.81, "the same"),
    PublishedFigure("Qwen3-32B", QWEN3_32B, 16, "H100", *SHAREGPT, 1131.55,
                    f"{GPUSTACK}qwen3-32b/h100.md, vLLM 0.11.0"),
    PublishedFigure("Llama-2-7B", LLAMA2_7B, 16, "A10G", 1000, 256, 128, 3.803 * 128,
                    "github.com/neuralmagic/nm-vllm commit c13b5c2, vLLM 0.2.0"),
    PublishedFigure("Llama-3.1-8B", LLAMA31_8B, 16, "A100 40", 8, 1024, 128, 75 * 6.6,
                    "johnmusgrave.com/p/vllm-throughput-latency-sweep-on, vLLM 0.23.0"),
)  # fmt: skip


class Deviations(NamedTuple):
    """How far the forecasts of speed are from the published figures, as shares; above 0: forecast too fast."""

    lowest: float
    median: float
    highest: float


def deviation(figure: PublishedFigure) -> float:
    """How far the forecast of one figure is off, as a share; above 0: forecast too fast."""
    work = Workload(
        questions=figure.at_once,
        votes=1,
        members=1,
        prompt=figure.prompt,
        read=figure.prompt,
        answer=figure.answer,
        length=round(figure.prompt + figure.answer),
        bits=figure.bits,
        utilisation=0.9,  # vLLM's default
    )
    return capacity.throughput(figure.shape, work, parse_card(figure.card)) / figure.tokens_per_second - 1


def deviations() -> Deviations:
    """The lowest, the middle and the highest of all figures."""
    ordered = sorted(map(deviation, FIGURES))
    return Deviations(ordered[0], ordered[len(ordered) // 2], ordered[-1])
