"""Download a model, or a file of a dataset, in a process of its own, online (see ``fetching``):
``python -m stepladder.models.download NAME [FILE]``.

Prints the path of what was downloaded, or why there is none, on standard output, and its progress on standard error.
"""

from __future__ import annotations

import contextlib
import resource
import sys

from stepladder.models.hubs import parse

MAX_DATA_BYTES = 2 * 2**30
"""Of a dataset's file, whatever its hub says of its size; ShareGPT's largest has 0.7 GB."""


def main() -> int:
    name, *files = sys.argv[1:]
    repo_id = parse(name)
    if repo_id is None:
        return 2
    with contextlib.redirect_stdout(sys.stderr):  # so that the line below is alone on standard output
        print(f"downloading {' '.join([*files, 'of', name] if files else [name])} from {repo_id.hub.title}", flush=True)
        try:
            if files:
                resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_DATA_BYTES, MAX_DATA_BYTES))
                result = str(repo_id.data_file(files[0], local=False))
            else:
                result = str(repo_id.snapshot(local=False))
            code = 0
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
