"""Models named by an id, on the Hugging Face hub or on ModelScope: looked up in the hub's cache, or downloaded.

In this process the hubs' libraries stay offline (see ``models.require``; they read their settings when imported). A
download is therefore a process of its own (``download``).
"""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from stepladder.errors import MissingExtra


class Hub(NamedTuple):
    """A place that models are downloaded from."""

    title: str
    module: str
    """The Python module whose ``snapshot_download`` looks in the cache, or downloads."""
    command: str
    """The shell command that downloads a model."""
    install: tuple[str, ...]
    """The pip package of the module; empty: the training extra installs it."""


HUGGING_FACE = Hub("Hugging Face", "huggingface_hub", "hf download", ())
MODELSCOPE = Hub("ModelScope", "modelscope.hub.snapshot_download", "modelscope download --model", ("modelscope",))
ID_PATTERN = re.compile(r"(modelscope:)?(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
ALLOW_PATTERNS = (
    "*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges.txt", "README.md",
    "LICENSE*",
)  # fmt: skip
IGNORE_PATTERNS = ("*.bin", "*.pt", "*.py", "*/*")
"""Pickles and programs, which could run foreign code; subfolders, which hold other formats of the same weights."""
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
USER_ENVIRONMENT = {key: os.environ.get(key) for key in (*OFFLINE_VARIABLES, "TQDM_DISABLE")}
"""The user's own values, read before ``models.require`` sets some."""


class ModelId(NamedTuple):
    """A parsed model id."""

    hub: Hub
    repo: str
    revision: str | None

    def snapshot(self, *, local: bool) -> Path:
        """The folder of its files: if ``local``, from the cache only; otherwise what is missing is downloaded.

        Raises:
            MissingExtra: the hub's library is not installed.
            Exception: whatever the library raises if the files are not in the cache or cannot be downloaded.
        """
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import, so that this process stays offline
        try:
            module = importlib.import_module(self.hub.module)
        except ModuleNotFoundError as error:
            raise MissingExtra((error.name or self.hub.module).partition(".")[0], *self.hub.install) from None
        return Path(
            module.snapshot_download(
                self.repo,
                revision=self.revision,
                allow_patterns=list(ALLOW_PATTERNS),
                ignore_patterns=list(IGNORE_PATTERNS),
                local_files_only=local,
            )
        )

    def cached(self) -> Path | None:
        """Its folder if the cache holds all of its files, else None.

        Raises:
            MissingExtra: the hub's library is not installed.
        """
        try:
            folder = self.snapshot(local=True)
        except MissingExtra:
            raise
        except Exception:  # noqa: BLE001 (each library raises other errors for files that are not there)
            return None
        # In the layout of older ModelScopes the path does not name the revision.
        is_pinned = self.revision is None or folder.as_posix().endswith(f"/snapshots/{self.revision}")
        return folder if _is_whole(folder) and (self.hub is HUGGING_FACE or is_pinned) else None


def cached(name: str) -> Path | None:
    """Folder of the model with an id if the cache holds all of it; None if not, or if ``name`` is no id."""
    model_id = parse(name)
    return None if model_id is None else model_id.cached()


def parse(name: str) -> ModelId | None:
    """The parts of an id ``[modelscope:]OWNER/NAME[@REVISION]``; None if ``name`` is not one."""
    match = ID_PATTERN.fullmatch(name)
    if match is None or ".." in name:
        return None
    return ModelId(HUGGING_FACE if match[1] is None else MODELSCOPE, match[2], match[3])


def _is_whole(folder: Path) -> bool:
    """Whether config, tokenizer and all shards exist; a cache may hold an interrupted download."""
    if not (folder / "config.json").is_file() or not any(folder.glob("tokenizer*")) or any(folder.glob("*.incomplete")):
        return False
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        shards = {folder / name for name in index["weight_map"].values()}
    except FileNotFoundError:
        shards = set(folder.glob("*.safetensors"))
    except (ValueError, KeyError):
        return False
    return bool(shards) and all(shard.is_file() for shard in shards)
