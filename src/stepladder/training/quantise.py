"""GPTQ through llm-compressor: 4- or 8-bit weights in the compressed-tensors format that vLLM and transformers read.

GPTQ: Frantar et al. 2022, arXiv:2210.17323.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from stepladder import models, template
from stepladder.config import Quantise
from stepladder.errors import ModelError
from stepladder.records import Example
from stepladder.training.packing import tokenise


def quantise(settings: Quantise, merged: Path, examples: Sequence[Example], max_length: int, folder: Path) -> None:
    """Quantise every linear layer but the head, calibrated on whole conversations of the student's own training set
    (prompt and chain, in the template it is served with).

    Raises:
        ModelError: ``group_size`` does not divide a layer's input width.
    """
    models.require("compressed_tensors", "datasets", "llmcompressor", "loguru")
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from loguru import logger

    # Remarks meant for these libraries' own developers, in the middle of our live view.
    for library in ("llmcompressor", "compressed_tensors"):
        logger.disable(library)
    for name in ("llmcompressor", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tokenizer = models.load_tokenizer(merged)
    template.check(tokenizer, merged)
    model = models.load(merged)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % settings.group_size:
            raise ModelError(
                f"[quantise] group_size {settings.group_size} does not divide the {module.in_features} inputs of "
                f"{name}; use 32, 64 or another divisor"
            )
    rows = tokenise(tokenizer, examples, max_length)
    data = Dataset.from_list([{"input_ids": row.ids, "attention_mask": [1] * len(row.ids)} for row in rows])
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=settings.bits,
            group_size=settings.group_size,
            symmetric=settings.symmetric,
            strategy=QuantizationStrategy.GROUP,
        ),
    )
    with models.quiet():
        oneshot(
            model=model,
            dataset=data,
            recipe=GPTQModifier(config_groups={"weights": scheme}, ignore=["lm_head"]),
            max_seq_length=max_length,
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
            log_dir=None,
        )
        model.to(torch.bfloat16).save_pretrained(folder, save_compressed=True)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    template.write(tokenizer, folder)
