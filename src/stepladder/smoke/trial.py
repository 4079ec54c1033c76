"""Run the steps one after another, each in a process of its own with a time limit, and write what came of it."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from stepladder import models
from stepladder.smoke.steps import STEPS
from stepladder.supervise import child_environment, supervised
from stepladder.workspace import write_atomic

LIBRARIES = ("stepladder", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "llmcompressor")
MAX_REASON_CHARACTERS = 300
PRIVATE = (
    (r"\b(?:sk|hf|ghp)[-_][\w-]{8,}", "<key>"),
    (r"(?i)\b(bearer|token|key|password)([\s=:]+)\S+", r"\1\2<key>"),
    (r"\w+://\S+", "<url>"),
    (r"(?<![\w<])~?(?:/[^\s:'\",;)]+)+", "<path>"),
    (r"\b\d{1,3}(?:\.\d{1,3}){3}\b", "<address>"),
)
"""What a reason may hold that is nobody else's business, and what is written instead."""


def run(
    model: Path,
    environment: Path,
    cards: int,
    report: Callable[[str, str], None],
    steps: Collection[str] = tuple(STEPS),
) -> dict[str, Any]:
    """Do the steps and return what is sent back: versions, cards, and what came of each step.

    Args:
        model: folder of a small model.
        environment: that vLLM is installed in.
        cards: number of cards, or of processes on a CPU.
        report: called with the name of each step and what came of it.
        steps: their names.
    """
    results = {}
    for name in (name for name in STEPS if name in steps):
        step = STEPS[name]
        if step.cards > cards:
            results[name] = {"outcome": "skipped", "reason": f"needs {step.cards} cards"}
        elif step.needs_vllm and not (environment / "bin" / "vllm").is_file():
            results[name] = {"outcome": "skipped", "reason": "no vLLM: run 'make serve-env'"}
        else:
            results[name] = _do(name, model, environment)
        report(name, _line(results[name]))
    return {"machine": _machine(), "steps": results}


def write(results: dict[str, Any], out: Path) -> None:
    """Write the results as JSON."""
    write_atomic(out, json.dumps(results, indent=2) + "\n")


def passed(results: dict[str, Any]) -> bool:
    """Whether every step that was done passed."""
    return all(result["outcome"] in {"passed", "skipped"} for result in results["steps"].values())


def _do(name: str, model: Path, environment: Path) -> dict[str, Any]:
    """Do a step in a process of its own."""
    limit = STEPS[name].minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        job, log = Path(folder) / "job.json", Path(folder) / "log"
        paths = {"model": str(model.resolve()), "environment": str(environment.absolute())}
        job.write_text(json.dumps({"step": name, **paths}), encoding="utf-8")
        start = time.monotonic()
        command = [sys.executable, "-m", "stepladder.smoke.steps", str(job)]
        with supervised(command, log, child_environment()) as child:
            try:
                child.wait(limit)
            except subprocess.TimeoutExpired:
                return {"outcome": "timed out", "seconds": limit, "reason": without_private(_last_line(log))}
        seconds = round(time.monotonic() - start, 1)
        figures = Path(folder) / "figures.json"
        if child.returncode or not figures.exists():
            return {"outcome": "failed", "seconds": seconds, "reason": without_private(_last_line(log))}
        return {"outcome": "passed", "seconds": seconds, "figures": json.loads(figures.read_text(encoding="utf-8"))}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(?:Error|Exception|Exit)\b", line)]
    return (errors or lines or ["no output"])[-1]


def without_private(text: str) -> str:
    """A text of bounded length without paths, addresses, keys, and the names of user and machine."""
    for pattern, instead in PRIVATE:
        text = re.sub(pattern, instead, text)
    for name in (getpass.getuser(), socket.gethostname()):
        text = re.sub(rf"\b{re.escape(name)}\b", "<name>", text) if len(name) > 2 else text
    return text[:MAX_REASON_CHARACTERS]


def _line(result: dict[str, Any]) -> str:
    text = result.get("reason") or ", ".join(f"{name} {value:g}" for name, value in result["figures"].items())
    seconds = f" in {result['seconds']:.0f} s" if "seconds" in result else ""
    return f"{result['outcome']}{seconds}: {text}"


def _machine() -> dict[str, Any]:
    """Versions and hardware, without names of the machine or its user."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "missing"
    cards = []
    if models.has_cuda():
        import torch

        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            capability = f"{card.major}.{card.minor}"
            cards.append({"name": card.name, "gib": round(card.total_memory / 2**30, 1), "capability": capability})
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return {"system": system, "versions": versions, "cards": cards}
