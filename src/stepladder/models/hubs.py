"""Models named by an id, on the Hugging Face hub or on ModelScope: looked up in the hub's cache, downloaded once.

In this process the hubs' libraries stay offline (see ``models.require``; they read their settings when imported). So a
download is a process of its own, ``python -m stepladder.models.download NAME``: it says on standard output where the
files are, or why they are not, and shows its progress on standard error.
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
    """Has ``snapshot_download``, which looks in the cache, or downloads."""
    command: str
    """What a person types to download a model."""
    install: tuple[str, ...]
    """What pip installs it, if not the training extra."""


HUGGING_FACE = Hub("Hugging Face", "huggingface_hub", "hf download", ())
MODELSCOPE = Hub("ModelScope", "modelscope.hub.snapshot_download", "modelscope download --model", ("modelscope",))
ID = re.compile(r"(modelscope:)?(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
WANTED = (
    "*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges.txt", "README.md",
    "LICENSE*",
)  # fmt: skip
UNWANTED = ("*.bin", "*.pt", "*.py", "*/*")
"""Pickles and programs, which run what somebody else wrote; folders, which hold other forms of the same weights."""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
GIVEN = {key: os.environ.get(key) for key in (*OFFLINE, "TQDM_DISABLE")}
"""What the user had set before ``models.require`` did."""


class Wanted(NamedTuple):
    """What an id says."""

    hub: Hub
    repo: str
    revision: str | None

    def snapshot(self, *, local: bool) -> Path:
        """The folder of its files: ``local``, as the cache has it, else downloaded as far as it is not there.

        Raises:
            MissingExtra: the hub's library is not installed.
            Exception: whatever the library raises where it cannot.
        """
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: the rest of this process is to stay offline
        try:
            module = importlib.import_module(self.hub.module)
        except ModuleNotFoundError as error:
            raise MissingExtra((error.name or self.hub.module).partition(".")[0], *self.hub.install) from None
        return Path(
            module.snapshot_download(
                self.repo,
                revision=self.revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
                local_files_only=local,
            )
        )

    def cached(self) -> Path | None:
        """Its folder if all of it is in the cache."""
        try:
            folder = self.snapshot(local=True)
        except MissingExtra:
            raise
        except Exception:  # noqa: BLE001 (each library has its own ways to say that it is not there)
            return None
        # The layout of older ModelScopes does not say which revision it holds.
        is_pinned = self.revision is None or folder.as_posix().endswith(f"/snapshots/{self.revision}")
        return folder if _is_whole(folder) and (self.hub is HUGGING_FACE or is_pinned) else None


def cached(name: str) -> Path | None:
    """Folder of the model with an id if it is on this machine already, whole; nothing is downloaded."""
    wanted = parse(name)
    return None if wanted is None else wanted.cached()


def parse(name: str) -> Wanted | None:
    match = ID.fullmatch(name)
    if match is None or ".." in name:
        return None
    return Wanted(HUGGING_FACE if match[1] is None else MODELSCOPE, match[2], match[3])


def _is_whole(folder: Path) -> bool:
    """Whether config, tokenizer and all shards are there: a cache may hold a download that was killed."""
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
