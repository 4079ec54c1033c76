"""Models and datasets named by an id, on the Hugging Face hub or on ModelScope: looked up in the hub's cache, or
downloaded.

In this process the hubs' libraries stay offline (see ``models.require``; they read their settings when imported). A
download is therefore a process of its own (``download``).
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stepladder.config.addresses import HUB_ID
from stepladder.errors import MissingExtra


class Hub(NamedTuple):
    """A place that models and datasets are downloaded from."""

    title: str
    module: str
    """The Python module whose ``snapshot_download`` looks in the cache, or downloads."""
    command: str
    """The shell command that downloads a model."""
    data_command: str
    """The shell command that downloads a file of a dataset."""
    install: tuple[str, ...]
    """The pip package of the module; empty: the training extra installs it."""


HUGGING_FACE = Hub("Hugging Face", "huggingface_hub", "hf download", "hf download --repo-type dataset", ())
MODELSCOPE = Hub(
    "ModelScope", "modelscope.hub.snapshot_download", "modelscope download --model", "modelscope download --dataset",
    ("modelscope",),
)  # fmt: skip
ALLOW_PATTERNS = (
    "*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges.txt", "README.md",
    "LICENSE*",
)  # fmt: skip
IGNORE_PATTERNS = ("*.bin", "*.pt", "*.py", "*/*")
"""Pickles and programs, which could run foreign code; subfolders, which hold other formats of the same weights."""
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
USER_ENVIRONMENT = {key: os.environ.get(key) for key in (*OFFLINE_VARIABLES, "TQDM_DISABLE")}
"""The user's own values, read before ``models.require`` sets some."""


class RepoId(NamedTuple):
    """A parsed id of a model or a dataset."""

    hub: Hub
    repo: str
    revision: str | None

    def snapshot(self, *, local: bool) -> Path:
        """The folder of a model's files: if ``local``, from the cache only; otherwise what is missing is downloaded.

        Raises:
            MissingExtra: the hub's library is not installed.
            Exception: whatever the library raises if the files are not in the cache or cannot be downloaded.
        """
        return self._snapshot(ALLOW_PATTERNS, local=local, ignore_patterns=list(IGNORE_PATTERNS))

    def data_file(self, file: str, *, local: bool) -> Path:
        """A file of a dataset, as :meth:`snapshot`.

        Raises:
            FileNotFoundError: the dataset has no such file, or it is not in the cache.
        """
        path = self._snapshot([file], local=local, repo_type="dataset") / file
        if not path.is_file():
            raise FileNotFoundError(f"it has no file {file!r}")
        return path

    def _snapshot(self, patterns: Sequence[str], *, local: bool, **details: Any) -> Path:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import, so that this process stays offline
        try:
            module = importlib.import_module(self.hub.module)
        except ModuleNotFoundError as error:
            raise MissingExtra((error.name or self.hub.module).partition(".")[0], *self.hub.install) from None
        return Path(
            module.snapshot_download(
                self.repo, revision=self.revision, allow_patterns=list(patterns), local_files_only=local, **details
            )
        )

    def cached(self) -> Path | None:
        """A model's folder if the cache holds all of its files, else None.

        Raises:
            MissingExtra: the hub's library is not installed.
        """
        try:
            folder = self.snapshot(local=True)
        except MissingExtra:
            raise
        except Exception:  # noqa: BLE001 (each library raises other errors for files that are not there)
            return None
        return folder if _is_whole(folder) and self._is_of_revision(folder) else None

    def cached_file(self, file: str) -> Path | None:
        """A dataset's file if it is in the cache, else None.

        Raises:
            MissingExtra: the hub's library is not installed.
        """
        try:
            path = self.data_file(file, local=True)
        except MissingExtra:
            raise
        except Exception:  # noqa: BLE001 (as above)
            return None
        return path if self._is_of_revision(path.parents[file.count("/")]) else None

    def _is_of_revision(self, folder: Path) -> bool:
        """Whether a folder of the cache is that of the revision. In the layout of older ModelScopes the path does not
        name it."""
        is_pinned = self.revision is None or folder.as_posix().endswith(f"/snapshots/{self.revision}")
        return self.hub is HUGGING_FACE or is_pinned


def cached(name: str) -> Path | None:
    """Folder of the model with an id if the cache holds all of it; None if not, or if ``name`` is no id."""
    model_id = parse(name)
    return None if model_id is None else model_id.cached()


def parse(name: str) -> RepoId | None:
    """The parts of an id ``[modelscope:]OWNER/NAME[@REVISION]``; None if ``name`` is not one."""
    match = HUB_ID.fullmatch(name)
    if match is None or ".." in name:
        return None
    return RepoId(HUGGING_FACE if match[1] is None else MODELSCOPE, match[2], match[3])


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
