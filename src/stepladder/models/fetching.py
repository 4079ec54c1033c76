"""Models and data files named by an id: from the hub's cache, or downloaded by a process of its own (``download``),
which is the only one that uses the network."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from stepladder.errors import ModelError, UserError
from stepladder.models.hubs import OFFLINE_VARIABLES, USER_ENVIRONMENT, parse

DATA_SECONDS = 3600.0
"""For the download of a data file; what has arrived by then is kept, and the next try goes on from there."""


@functools.cache  # every stage's fingerprint asks where the base is
def find(name: str) -> Path | None:
    """Folder of the model with an id ``[modelscope:]OWNER/NAME[@REVISION]``, downloaded on first use; None if ``name``
    is not an id.

    Raises:
        ModelError: it is not in the cache and cannot be downloaded.
        MissingExtra: the hub's library is not installed.
    """
    repo_id = parse(name)
    if repo_id is None:
        return None
    if (folder := repo_id.cached()) is not None:
        return folder
    hub, repo, revision = repo_id
    path, reason = _download(name)
    if path is not None:
        return path
    command = f"{hub.command} {repo}" + ("" if revision is None else f" --revision {revision}")
    raise ModelError(
        f"model {name!r}: no such folder, not (or not whole) in the cache of {hub.title}, "
        f"and not downloaded ({reason}); run '{command}' on a machine with internet, or give a folder"
    )


@functools.cache
def find_data(name: str, file: str) -> Path:
    """A data file of the dataset with an id, downloaded on first use.

    Raises:
        UserError: ``name`` is not an id, or the file is not in the cache and cannot be downloaded.
        MissingExtra: the hub's library is not installed.
    """
    repo_id = parse(name)
    if repo_id is None:
        raise UserError(f"{name!r}: is no dataset of a hub; give OWNER/NAME, modelscope:OWNER/NAME, or a file")
    if (path := repo_id.cached_file(file)) is not None:
        return path
    path, reason = _download(name, file, timeout_seconds=DATA_SECONDS)
    if path is not None:
        return path
    hub, repo, revision = repo_id
    command = f"{hub.data_command} {repo} {file}" + ("" if revision is None else f" --revision {revision}")
    raise UserError(
        f"dataset {name!r}: {file!r} is not in the cache of {hub.title}, and not downloaded ({reason}); run "
        f"'{command}' on a machine with internet, or give a file as 'source'"
    )


def _download(*words: str, timeout_seconds: float | None = None) -> tuple[Path | None, str]:
    """Let a process download what the words name; returns its path, or None and the reason."""
    if setting := next(
        (key for key in OFFLINE_VARIABLES if (USER_ENVIRONMENT[key] or "").upper() in {"1", "ON", "YES", "TRUE"}), None
    ):
        return None, f"{setting}={USER_ENVIRONMENT[setting]}"
    try:
        done = subprocess.run(  # noqa: S603 (our own module, no shell)
            [sys.executable, "-m", "stepladder.models.download", *words], timeout=timeout_seconds,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False, env=_online(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"it took more than {timeout_seconds:.0f} s; try again to go on"
    output = done.stdout.strip().rpartition("\n")[2]
    if done.returncode == 0:
        return Path(output), ""
    return None, output or f"the download ended with code {done.returncode}"


def _online() -> dict[str, str]:
    """The environment of a download: online, and with progress bars unless the user turned them off."""
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if USER_ENVIRONMENT["TQDM_DISABLE"] is None:
        environment.pop("TQDM_DISABLE", None)
    return environment
