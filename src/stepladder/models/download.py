"""Download a model in a process of its own, online: ``python -m stepladder.models.download NAME`` (see ``fetching``).

Prints the folder of the files, or why there is none, on standard output, and its progress on standard error.
"""

from __future__ import annotations

import contextlib
import sys

from stepladder.models.hubs import parse


def main() -> int:
    model_id = parse(sys.argv[1])
    if model_id is None:
        return 2
    with contextlib.redirect_stdout(sys.stderr):  # so that the line below is alone on standard output
        print(f"downloading {sys.argv[1]} from {model_id.hub.title}", flush=True)
        try:
            result, code = str(model_id.snapshot(local=False)), 0
        except KeyboardInterrupt:
            return 130
        except Exception as error:  # noqa: BLE001 (the libraries raise anything, from connection errors to their own)
            result, code = _reason(error), 1
    print(result)
    return code


def _reason(error: Exception) -> str:
    """The first line of an error of a hub's library; the second too where the first is only an HTTP status."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if "Client Error" in lines[0] else 1]).rstrip(" .:")


if __name__ == "__main__":
    sys.exit(main())
