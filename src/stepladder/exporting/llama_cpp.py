"""llama.cpp's programs: where they are, and how weights are converted, quantised and served with them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from stepladder.errors import MissingExtra, ServeError, UserError
from stepladder.models.files import refuse_code
from stepladder.serving.probe import free_port, is_healthy, is_ours, refuses_strangers
from stepladder.supervise import child_environment, supervised
from stepladder.training.data import log_tail
from stepladder.training.swift import OFFLINE

ENVIRONMENT = Path(".venv-llama")
"""Where ``make llama`` puts it."""
LOOPBACK = "127.0.0.1"
SLOTS = 8
"""Answers that the server writes at once."""
STARTUP_SECONDS, POLL_SECONDS, VERSION_SECONDS = 300.0, 0.3, 30.0


class LlamaCpp(NamedTuple):
    """The programs that are used."""

    convert: Path
    """A Python script, which this Python runs: it needs PyTorch and Transformers."""
    quantise: Path
    server: Path


class Served(NamedTuple):
    """A server that was started."""

    url: str
    """Up to ``/v1``."""
    key: str


def find(folder: Path) -> LlamaCpp:
    """llama.cpp in the folder that ``make llama`` makes, or in a checkout that was built (``build/bin``).

    Raises:
        UserError: one of its programs is not there.
    """
    script, quantise, server = "convert_hf_to_gguf.py", "llama-quantize", "llama-server"
    binaries = [folder / "bin", folder / "build" / "bin"]
    places = {script: [folder, folder / "llama.cpp"], quantise: binaries, server: binaries}
    found = {
        name: next((place / name for place in sought if (place / name).is_file()), None)
        for name, sought in places.items()
    }
    if missing := [name for name, path in found.items() if path is None]:
        raise UserError(
            f"{folder}: has no {missing[0]}; 'make llama' builds llama.cpp from pinned sources, or --llama-cpp names a "
            "checkout that is built"
        )
    return LlamaCpp(*(path.absolute() for path in found.values() if path is not None))


def version(programs: LlamaCpp) -> str:
    """What the server calls itself.

    Raises:
        UserError: it cannot be started.
    """
    try:
        ended = subprocess.run(  # noqa: S603
            [str(programs.server), "--version"], capture_output=True, text=True, errors="replace",
            timeout=VERSION_SECONDS, check=True, env=child_environment(),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{programs.server}: cannot be started ({error}); build llama.cpp again") from None
    said = (ended.stdout + ended.stderr).splitlines()
    return next((line.partition(":")[2].strip() for line in said if line.startswith("version:")), "unknown")


def convert(programs: LlamaCpp, weights: Path, out: Path, log: Path) -> None:
    """Convert a model folder into a GGUF file in its own number format.

    Raises:
        MissingExtra: a library that the converter needs is not installed.
        ModelError: the folder brings code.
        UserError: the converter failed, for instance at an architecture or a tokenizer that it does not know.
    """
    if importlib.util.find_spec("sentencepiece") is None:
        raise MissingExtra("sentencepiece", "'stepladder[gguf]'")
    refuse_code(weights, "llama.cpp's converter")
    words = [sys.executable, programs.convert, weights.resolve(), "--outfile", out.resolve(), "--outtype", "auto"]
    _run([str(word) for word in words], log, "llama.cpp cannot convert it")


def quantise(programs: LlamaCpp, source: Path, out: Path, kind: str, log: Path) -> None:
    """Quantise a GGUF file.

    Raises:
        UserError: it failed.
    """
    words = [str(programs.quantise), str(source), str(out), kind.upper(), str(_cores())]
    _run(words, log, "llama.cpp cannot quantise it")


@contextlib.contextmanager
def served(programs: LlamaCpp, file: Path, max_length: int, log: Path) -> Iterator[Served]:
    """Serve a GGUF file on this machine, to whoever has the key, for the length of the block. Its chat template is the
    one in the file. ``max_length`` is that of a prompt and its answer together, tokens.

    Raises:
        ServeError: it does not start.
    """
    key, port = secrets.token_hex(32), free_port(LOOPBACK)
    words = [
        str(programs.server), "--model", str(file), "--host", LOOPBACK, "--port", str(port), "--offline", "--no-ui",
        "--jinja", "--reasoning-format", "none", "--parallel", str(SLOTS), "--ctx-size", str(SLOTS * max_length),
        "--threads", str(_cores()),
    ]  # fmt: skip
    with supervised(words, log, child_environment() | {"LLAMA_API_KEY": key}) as child:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not (is_ours(child.pid, port) and is_healthy(LOOPBACK, port)):
            if child.poll() is not None:
                raise ServeError(f"llama.cpp's server ended with code {child.returncode}: ... {log_tail(log)}")
            if time.monotonic() > deadline:
                raise ServeError(
                    f"llama.cpp's server was not healthy within {STARTUP_SECONDS:g} s: ... {log_tail(log)}"
                )
            time.sleep(POLL_SECONDS)
        if not refuses_strangers(LOOPBACK, port):
            raise ServeError("llama.cpp's server does not ask for its key; use a newer one")
        yield Served(f"http://{LOOPBACK}:{port}/v1", key)


def _run(words: Sequence[str], log: Path, failure: str) -> None:
    with supervised(words, log, child_environment() | OFFLINE) as child:
        child.wait()
    if child.returncode:
        raise UserError(f"{failure} (code {child.returncode}): ... {log_tail(log)}")


def _cores() -> int:
    return len(os.sched_getaffinity(0))
