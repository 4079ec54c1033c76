"""``stepladder pack``: a finished run as a folder that answers offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepladder.context import Context
from stepladder.errors import MissingExtra
from stepladder.terminal import say


def pack(config: Path, runs: Path, out: Path, engine: str | None, image: str | None, pythons: Sequence[str]) -> None:
    """Make the package of a run (:func:`stepladder.packaging.build.pack`).

    Raises:
        MissingExtra: a library that packing needs is not installed.
        UserError: the folder is there, the run is not finished, or wheels cannot be downloaded or built.
    """
    try:
        from stepladder.packaging import build, wheels
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "'stepladder[pack]'") from None
    context = Context.open(config, runs)
    with context.workspace.locked(), context.progress.stage("package"):
        build.pack(context, out, engine, image, pythons or [wheels.THIS_PYTHON])  # type: ignore[arg-type]  # the CLI has checked
    say(context.progress.console, f"Wrote {out}")
