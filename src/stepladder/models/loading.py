"""Load weights and tokenizers of model folders with transformers, which is imported only inside functions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stepladder.config import Dtype
from stepladder.errors import ModelError, UserError
from stepladder.models.files import read_json
from stepladder.models.libraries import need, quiet, require
from stepladder.models.number_format import has_cuda, prepare_dtype
from stepladder.models.weight_files import WeightFiles

if TYPE_CHECKING:
    import torch
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

    with loading("tokenizer", folder):
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
    with loading("model", folder), quiet():
        quantization = read_json(folder / "config.json").get("quantization_config")
        if quantization is not None and quantization.get("quant_method") == "gptq":
            model = empty(folder, computed_in)
            fill(model, WeightFiles(folder), computed_in)
        else:
            unpack = (
                {} if quantization is None else {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
            )
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=computed_in, **SAFE, **unpack)
    if move and has_cuda():
        model = model.to("cuda")  # type: ignore[arg-type]
    return model


def skeleton(folder: Path, dtype: Dtype = "auto") -> PreTrainedModel:
    """A model without weights: its parameters are on the meta device and take no memory. What no file holds, such as
    rotary frequencies, is computed. :func:`fill` gives it weights.

    Raises:
        ModelError: the folder's config.json is not a model's.
    """
    require()
    computed_in = prepare_dtype(dtype)
    with loading("model", folder):
        return empty(folder, computed_in)


def empty(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """As :func:`skeleton`, whatever the machine can compute in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with _parameters_on_meta():
        model = cast("PreTrainedModel", AutoModelForCausalLM.from_config(config, dtype=dtype))  # type: ignore[no-untyped-call]
    model.tie_weights()
    model.train(False)
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters of modules that are made inside the block hold no data."""
    import torch

    register = torch.nn.Module.register_parameter

    def register_on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill(model: PreTrainedModel, files: WeightFiles, dtype: torch.dtype) -> None:
    """Give an empty model its weights, one at a time, so that no tensor is in memory twice.

    Raises:
        ModelError: a tensor is missing.
        ValueError: one does not belong to the model.
    """
    tied = set(model.all_tied_weights_keys)
    wanted = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if unknown := files.names - wanted:
        raise ValueError(f"tensor {min(unknown)} does not belong to the model")
    for name in sorted(wanted - (tied - files.names)):
        set_weight(model, name, files.read(name, dtype))
    model.tie_weights()


def set_weight(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace a parameter by a tensor of the same shape.

    Raises:
        ValueError: it has another shape.
    """
    import torch

    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    replaced = getattr(module, parameter_name)
    if replaced.shape != tensor.shape:
        raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, not {tuple(replaced.shape)}")
    setattr(module, parameter_name, torch.nn.Parameter(tensor, requires_grad=replaced.requires_grad))


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
    with loading("model", folder), quiet():
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
def loading(kind: str, folder: Path) -> Iterator[None]:
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
