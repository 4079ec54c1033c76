"""Load weights and tokenizers of model folders with transformers, which is imported only inside functions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stepladder.config import Dtype
from stepladder.errors import ModelError, UserError
from stepladder.models.files import read_json
from stepladder.models.gptq_format import load_gptq
from stepladder.models.libraries import need, quiet, require
from stepladder.models.number_format import has_cuda, prepare_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAFE = {"trust_remote_code": False, "use_safetensors": True}
"""A folder's code is never run, and its pickles are never read."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        ModelError: it cannot be loaded, or has no chat template.
    """
    need("transformers")  # where a server computes, PyTorch need not be installed
    from transformers import AutoTokenizer

    with _loading("tokenizer", folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("x", add_special_tokens=False)  # settings of another type than expected fail when they are used
    if tokenizer.chat_template is None:
        raise ModelError(f"{folder}: the tokenizer has no chat template; use the instruct or chat version of the model")
    return tokenizer


def load(folder: Path, dtype: Dtype = "auto", *, move: bool = True) -> PreTrainedModel:
    """A causal language model that computes in ``dtype``, its quantised weights unpacked; on CUDA if there is any and
    ``move`` is set, else on the CPU.

    Raises:
        ModelError: the folder's files are not a model, or are damaged.
    """
    require()
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    computed_in = prepare_dtype(dtype)
    with _loading("model", folder), quiet():
        quantization = read_json(folder / "config.json").get("quantization_config")
        if quantization is not None and quantization.get("quant_method") == "gptq":
            model = load_gptq(folder, computed_in)
        else:
            unpack = (
                {} if quantization is None else {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
            )
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=computed_in, **SAFE, **unpack)
    if move and has_cuda():
        model = model.to("cuda")  # type: ignore[arg-type]
    return model


def skeleton(folder: Path) -> PreTrainedModel:
    """A model on the meta device: its layers and shapes without weights, which takes no memory."""
    require()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _loading("model", folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]


def load_in_4_bits(folder: Path, dtype: Dtype = "auto") -> PreTrainedModel:
    """A base for QLoRA (Dettmers et al. 2023, arXiv:2305.14314): linear layers in 4 bits (NF4, with quantised scales),
    unpacked to ``dtype`` to compute.

    Raises:
        ModelError: as :func:`load`.
    """
    require("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    computed_in = prepare_dtype(dtype)
    packed = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed_in,
    )
    place = "cuda" if has_cuda() else "cpu"
    with _loading("model", folder), quiet():
        model = cast(
            "PreTrainedModel",
            AutoModelForCausalLM.from_pretrained(
                folder, **SAFE, quantization_config=packed, dtype=computed_in, device_map={"": place}
            ),
        )
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # On such a CPU a layer is repacked when it is first evaluated, into a format without gradients: nothing
            # below it would learn after the first validation.
            vars(layer)["support_avx512bf16_for_cpu"] = False
    return model


@contextlib.contextmanager
def _loading(kind: str, folder: Path) -> Iterator[None]:
    """Turn the libraries' errors about files they cannot load into a ModelError of one line."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # The libraries raise anything for files that are not what they expect: tokenizers a bare Exception, or panics.
        is_panic = type(error).__name__ == "PanicException"
        if (not isinstance(error, Exception) and not is_panic) or "out of memory" in str(error).lower():
            raise
        reason = (str(error).strip().split("\n")[0].rstrip(" .:") or type(error).__name__)[:300]
        raise ModelError(
            f"{folder}: the {kind} cannot be loaded ({reason}); give a complete, undamaged folder"
        ) from None
