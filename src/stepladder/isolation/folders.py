"""A stranger's folder: files inside it, never what its links lead to outside."""

from __future__ import annotations

import stat
from pathlib import Path

from stepladder.errors import InputError


def files_inside(folder: Path) -> list[Path]:
    """The regular files of a folder and its subfolders, sorted; links to files inside count, and in a snapshot of a
    hub's cache those to the repository's blobs.

    Raises:
        InputError: a link leads out of the folder, or something is neither file nor folder.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        check_inside(path, folder)
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            files.append(path)
        elif not stat.S_ISDIR(mode):
            raise InputError(path, "is neither a file nor a folder; remove it")
    return files


def check_inside(path: Path, folder: Path) -> None:
    """Raises:
    InputError: a path of a folder is, by a link, outside of it, or nowhere.
    """
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parents[1] / "blobs")
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise InputError(path, "is a link that leads nowhere; remove it or put the file there") from None
    if not any(target.is_relative_to(root) for root in roots):
        raise InputError(path, f"is a link that leaves {folder}; put the file itself there")
