"""A download in a process of its own, online: ``python -m stepladder.models.download NAME`` (see ``fetching``).

Says on standard output where the files are, or why they are not; shows its progress on standard error.
"""

from __future__ import annotations

import contextlib
import sys

from stepladder.models.hubs import parse


def main() -> int:
    wanted = parse(sys.argv[1])
    if wanted is None:
        return 2
    with contextlib.redirect_stdout(sys.stderr):  # the last word on standard output is ours
        print(f"downloading {sys.argv[1]} from {wanted.hub.title}", flush=True)
        try:
            said, code = str(wanted.snapshot(local=False)), 0
        except KeyboardInterrupt:
            return 130
        except Exception as error:  # noqa: BLE001 (the libraries raise anything, from connection errors to their own)
            said, code = _reason(error), 1
    print(said)
    return code


def _reason(error: Exception) -> str:
    """The first line of what a library says; the second too where the first is no more than a status."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if "Client Error" in lines[0] else 1]).rstrip(" .:")


if __name__ == "__main__":
    sys.exit(main())
