"""llama.cpp's programs: where they are, and how weights are converted, quantised and served with them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stepladder.errors import MissingExtra, ServeError, UserError
from stepladder.models.files import read_json, refuse_code
from stepladder.records import Message
from stepladder.serving.probe import direct, free_port, is_healthy, is_ours, refuses_strangers
from stepladder.supervise import child_environment, supervised
from stepladder.training.data import log_tail
from stepladder.training.swift import OFFLINE

LOOPBACK = "127.0.0.1"
SLOTS = 8
"""Answers that the server writes at once."""
STARTUP_SECONDS, POLL_SECONDS, VERSION_SECONDS, REPLY_SECONDS = 300.0, 0.3, 30.0, 60.0
MAX_REPLY_BYTES = 2**24
PLAIN_KERNELS = ["--no-repack"]
"""For a second start where the first one ended by a signal: on some machines llama.cpp's kernels for AMX read where
they must not (commit 0c1e570 on a virtual Xeon: SIGSEGV in ggml_backend_amx_mul_mat)."""
SIGNALS = 128
"""Exit codes above it stand for a signal."""
TOKENIZER = "tokenizer.json"
_CONVERT_AS_GPT2 = """
import os, runpy, sys
script = sys.argv[1]
sys.path.insert(0, os.path.dirname(script))
from conversion import base
known = base.TextModel.get_vocab_base_pre
def name(model, tokenizer):
    try:
        return known(model, tokenizer)
    except NotImplementedError:
        return "gpt-2"
base.TextModel.get_vocab_base_pre = name
sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""
"""The converter, but where it does not know how the tokenizer splits text, that is as GPT-2's does."""


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

    def prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The token ids that the server makes of a conversation and the beginning of the assistant's turn.

        Raises:
            ServeError: it does not say.
        """
        rendered = self._ask("apply-template", {"messages": [message.model_dump() for message in messages]})
        text = {"content": rendered.get("prompt"), "add_special": True, "parse_special": True}
        return list(self._ask("tokenize", text).get("tokens", ()))

    def _ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(  # noqa: S310 (our own address)
            f"{self.url.removesuffix('/v1')}/{path}", json.dumps(body).encode(), headers
        )
        try:
            with direct.open(request, timeout=REPLY_SECONDS) as reply:
                answer = json.loads(reply.read(MAX_REPLY_BYTES))
        except (OSError, ValueError) as error:
            raise ServeError(f"llama.cpp's server did not answer /{path} ({error})") from None
        return answer if isinstance(answer, dict) else {}


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
    words = [str(programs.convert), str(weights.resolve()), "--outfile", str(out.resolve()), "--outtype", "auto"]
    tokenizer = read_json(weights / TOKENIZER) if (weights / TOKENIZER).exists() else {}
    if _is_plain_byte_level(tokenizer):
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            words[1] = folder
            for path in weights.resolve().iterdir():
                Path(folder, path.name).symlink_to(path)
            Path(folder, TOKENIZER).unlink()
            tokenizer["model"]["byte_fallback"] = False
            Path(folder, TOKENIZER).write_text(json.dumps(tokenizer), encoding="utf-8")
            _run([sys.executable, "-c", _CONVERT_AS_GPT2, *words], log, "llama.cpp cannot convert it")
    else:
        _run([sys.executable, *words], log, "llama.cpp cannot convert it")


def _is_plain_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer splits text as GPT-2's does, into bytes that all have a token: it never falls back to bytes,
    although its file may say so, which the converter takes as a sign of SentencePiece. That file's tokens may be any,
    and the converter knows how a tokenizer splits text by what tokens it makes of one."""
    splits = tokenizer.get("pre_tokenizer") or {}
    return splits.get("type") == "ByteLevel" and bool(splits.get("use_regex")) and tokenizer["model"]["type"] == "BPE"


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
    environment = child_environment() | {"LLAMA_API_KEY": key}
    for flags in ([], PLAIN_KERNELS):
        with supervised([*words, *flags], log, environment) as child:
            if _is_up(child, port, log):
                if not refuses_strangers(LOOPBACK, port):
                    raise ServeError("llama.cpp's server does not ask for its key; use a newer one")
                yield Served(f"http://{LOOPBACK}:{port}/v1", key)
                return
        if child.returncode <= SIGNALS:
            break
    raise ServeError(f"llama.cpp's server ended with code {child.returncode}: ... {log_tail(log)}")


def _is_up(child: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    """Wait until the server can answer; False where it has ended.

    Raises:
        ServeError: it takes too long.
    """
    deadline = time.monotonic() + STARTUP_SECONDS
    while not (is_ours(child.pid, port) and is_healthy(LOOPBACK, port)):
        if child.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise ServeError(f"llama.cpp's server was not healthy within {STARTUP_SECONDS:g} s: ... {log_tail(log)}")
        time.sleep(POLL_SECONDS)
    return True


def _run(words: Sequence[str], log: Path, failure: str) -> None:
    with supervised(words, log, child_environment() | OFFLINE) as child:
        child.wait()
    if child.returncode:
        raise UserError(f"{failure} (code {child.returncode}): ... {log_tail(log)}")


def _cores() -> int:
    return len(os.sched_getaffinity(0))
