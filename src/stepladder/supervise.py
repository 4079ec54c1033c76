"""Runs a command so that it ends with its parent, even if the parent is killed, and so do all processes it started.

Trainers and servers start processes in sessions of their own, which would outlive a killed parent and keep the cards.
So the command runs under a supervisor that reads a pipe which only the parent holds open: when the pipe is closed, by
the parent or by its end, the supervisor kills everything below it.
Run as ``python -m stepladder.supervise COMMAND ...``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import psutil

PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h."""
WATCH_SECONDS = 0.5
"""Between two looks at what a command does."""
PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TERM|TZ|TMP|TEMP|TMPDIR|PWD|HOSTNAME|LANG|LANGUAGE|VIRTUAL_ENV|CC|CXX|CPATH|MAX_JOBS"
    r"|LIBRARY_PATH|DO_NOT_TRACK|RANK|WORLD_SIZE|PYTHON\w*"
    r"|(LC|XDG|LD|CUDA|CUDNN|CUBLAS|NVIDIA|NCCL|GLOO|UCX|TORCH|TORCHELASTIC|TORCHINDUCTOR|PYTORCH|TRITON|VLLM|FLASHINFER"
    r"|HF|TRANSFORMERS|SAFETENSORS|TOKENIZERS|MODELSCOPE|SWIFT|DS|ACCELERATE|GPTQMODEL|LLM_COMPRESSOR|OMP|MKL|KMP"
    r"|OPENBLAS|GOMP|NUMEXPR|MALLOC|ROCR|ROCM|HIP|HSA|AMD|ZE|ONEAPI|ASCEND|XLA|MASTER|NODE|LOCAL|STEPLADDER)_\w+"
)
"""Names of the environment variables that programs of others are given: what they need to find libraries and cards."""
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)S?$", re.IGNORECASE)
"""Names that are not passed on even so."""


def child_environment() -> dict[str, str]:
    """This process's environment for a program that asks no teacher: without the teachers' keys, whose variables a
    configuration may call what it likes, and without any other secret."""
    return {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name) and not SECRET.search(name)}


@contextlib.contextmanager
def supervised(
    command: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command, with its output appended to ``log``. When the block ends, so do the command and all processes it
    started. ``folder`` is its working directory, by default that of this process."""
    arguments = [sys.executable, "-m", "stepladder.supervise", *command]
    with open_log(log) as file:
        # A session of its own, so that Ctrl+C reaches only the parent, which then leaves the block.
        child = subprocess.Popen(  # noqa: S603
            arguments, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=dict(environment),
            start_new_session=True, cwd=folder,
        )  # fmt: skip
    try:
        yield child
    finally:
        if child.stdin is not None:
            child.stdin.close()
        child.wait()


def run_watched(command: Sequence[str], log: Path, environment: Mapping[str, str], watch: Callable[[], None]) -> int:
    """Run a supervised command to its end, and call ``watch`` now and then meanwhile; returns its exit code."""
    with supervised(command, log, environment) as child:
        while child.poll() is None:
            time.sleep(WATCH_SECONDS)
            watch()
    return child.returncode


def open_log(path: Path) -> BinaryIO:
    """Open a log to append to it, never what a link in its place leads to."""

    def open_itself(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o644)

    return open(path, "ab", opener=open_itself)


def main() -> int:
    # Ray's workers kill their children, and nothing below them, as they end: so it is a grandchild that supervises.
    if supervisor := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(supervisor, 0)[1])
        return code if code >= 0 else 128 - code
    return _supervise(sys.argv[1:])


def _supervise(command: Sequence[str]) -> int:
    if sys.platform == "linux":  # orphaned descendants become children of this process
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603

    def watch() -> None:
        while os.read(0, 4096):
            pass
        _kill_all(child.pid)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    _kill_all(child.pid)  # processes that the command left behind
    return code if code >= 0 else 128 - code


def _kill_all(group: int) -> None:
    """Kill a process group, and on Linux every descendant of this process, until none is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    while running := _descendants():
        for process in running:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


def _descendants() -> list[psutil.Process]:
    """Running processes that this one or one of its descendants started."""
    running = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
    return running


if __name__ == "__main__":
    sys.exit(main())
