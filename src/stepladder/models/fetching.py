"""Models named by an id, from the hub's cache or downloaded by a process of its own (``download``)."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

from stepladder.errors import ModelError
from stepladder.models.hubs import OFFLINE_VARIABLES, USER_ENVIRONMENT, parse


@functools.cache  # every stage's fingerprint asks where the base is
def find(name: str) -> Path | None:
    """Folder of the model with an id ``[modelscope:]OWNER/NAME[@REVISION]``, downloaded on first use; None if ``name``
    is not an id.

    Raises:
        ModelError: it is not in the cache and cannot be downloaded.
        MissingExtra: the hub's library is not installed.
    """
    model_id = parse(name)
    if model_id is None:
        return None
    if (folder := model_id.cached()) is not None:
        return folder
    hub, repo, revision = model_id
    if setting := next(
        (key for key in OFFLINE_VARIABLES if (USER_ENVIRONMENT[key] or "").upper() in {"1", "ON", "YES", "TRUE"}), None
    ):
        reason = f"{setting}={USER_ENVIRONMENT[setting]}"
    else:
        done = subprocess.run(  # noqa: S603 (our own module, no shell)
            [sys.executable, "-m", "stepladder.models.download", name],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False, env=_online(),
        )  # fmt: skip
        output = done.stdout.strip().rpartition("\n")[2]
        if done.returncode == 0:
            return Path(output)
        reason = output or f"the download ended with code {done.returncode}"
    command = f"{hub.command} {repo}" + ("" if revision is None else f" --revision {revision}")
    raise ModelError(
        f"model {name!r}: no such folder, not (or not whole) in the cache of {hub.title}, "
        f"and not downloaded ({reason}); run '{command}' on a machine with internet, or give a folder"
    )


def _online() -> dict[str, str]:
    """The environment of a download: online, and with progress bars unless the user turned them off."""
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if USER_ENVIRONMENT["TQDM_DISABLE"] is None:
        environment.pop("TQDM_DISABLE", None)
    return environment
