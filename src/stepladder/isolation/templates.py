"""Templates that may come from a stranger, rendered in a process that can do nothing else."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepladder.errors import InputError
from stepladder.isolation.folders import files_inside
from stepladder.records import read_text

SECONDS = 5.0
"""For one rendering, or a group of them."""
GROUP = 32
"""Renderings that the process is asked for at once."""
MAX_FILES, MAX_FILE_BYTES = 200, 1_000_000
"""Of a folder of templates."""
MAX_REPLY_BYTES = 32_000_000
WORKER = Path(__file__).with_name("template_worker.py")


class TemplateFault(Exception):
    """A template cannot be rendered; ``name`` and ``line`` say where, as far as that is known."""

    def __init__(self, problem: str, name: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.name, self.line = name, line


class Templates:
    """A set of templates by name, which may include each other.

    Args:
        sources: their texts.
        chat: whether they are chat templates, which get what transformers gives them.
    """

    def __init__(self, sources: Mapping[str, str], *, chat: bool) -> None:
        self._head = json.dumps({"sources": dict(sources), "chat": chat})

    @classmethod
    def of_folder(cls, folder: Path, fallback: Path) -> Templates:
        """The prompts in a folder, and those of ``fallback`` that it does not replace. Hidden files do not count.

        Raises:
            InputError: a file leads out of the folder, is too large or not UTF-8, or there are too many.
        """
        files = [path for path in files_inside(folder) if not path.name.startswith(".")]
        if len(files) > MAX_FILES:
            raise InputError(folder, f"holds {len(files)} files; a folder of prompts has {MAX_FILES} at most")
        for path in files:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise InputError(path, f"is larger than {MAX_FILE_BYTES:,} bytes; a template is a short text")
        packaged = {path.name: read_text(path) for path in sorted(fallback.glob("*.j2"))}
        return cls(packaged | {path.relative_to(folder).as_posix(): read_text(path) for path in files}, chat=False)

    def render(self, name: str, values: Mapping[str, Any]) -> str:
        """:meth:`render_all` of one set of values."""
        return self.render_all(name, [values])[0]

    def render_all(self, name: str, values: Sequence[Mapping[str, Any]]) -> list[str]:
        """The texts of a template with each of these sets of plain JSON values.

        Raises:
            TemplateFault: one cannot be rendered, or :data:`GROUP` of them not within :data:`SECONDS`.
        """
        texts: list[str] = []
        for start in range(0, len(values), GROUP):
            group = values[start : start + GROUP]
            reply = _worker.ask(self._head, json.dumps({"name": name, "values": group}), name)
            if "texts" not in reply:
                raise TemplateFault(str(reply["error"]), str(reply["file"]), reply["line"])
            texts += map(str, reply["texts"])
        return texts


class _Worker:
    """The process that renders, started when it is first needed and again after it had to be killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._head: str | None = None
        self._owner = 0

    def ask(self, head: str, message: str, name: str) -> dict[str, Any]:
        with self._lock:
            lines = [] if self._is_ready(head) else [head]
            try:
                reply = self._exchange([*lines, message])
            except (BrokenPipeError, EOFError):
                self.close()
                raise TemplateFault("its process ended: too much memory, or a forbidden call", name) from None
            except TimeoutError:
                self.close()
                raise TemplateFault(f"it takes longer than {SECONDS:g} s", name) from None
            except BaseException:  # an interrupt, or a time limit: the reply is still to come, and is nobody's
                self.close()
                raise
            self._head = head
        content: dict[str, Any] = json.loads(reply)
        return content

    def _is_ready(self, head: str) -> bool:
        """Whether the worker runs and has these templates."""
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return head == self._head
        # -I: nothing in the working directory can be imported. No environment: the worker needs none of our keys.
        self._child = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,  # Ctrl+C is for us
        )
        self._owner = os.getpid()
        return False

    def _exchange(self, lines: list[str]) -> bytes:
        """The worker's line for the last of ours.

        Raises:
            EOFError, BrokenPipeError: it ended.
            TimeoutError: it takes too long.
        """
        child = self._child
        if child is None or child.stdin is None or child.stdout is None:
            raise EOFError
        child.stdin.write("".join(f"{line}\n" for line in lines).encode())
        child.stdin.flush()
        reply, deadline = bytearray(), time.monotonic() + SECONDS
        ready = select.poll()
        ready.register(child.stdout, select.POLLIN | select.POLLHUP)
        while not reply.endswith(b"\n"):
            if not ready.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
                raise TimeoutError
            part = os.read(child.stdout.fileno(), 1 << 20)
            reply += part
            if not part or len(reply) > MAX_REPLY_BYTES:
                raise EOFError
        return bytes(reply)

    def close(self) -> None:
        if self._child is not None and self._owner == os.getpid():
            self._child.kill()
            self._child.communicate()
        self._child = self._head = None


_worker = _Worker()
atexit.register(_worker.close)
