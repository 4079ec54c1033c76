"""``stepladder export``: a member as a GGUF file, measured through llama.cpp's server."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from stepladder.context import Context
from stepladder.documents import GgufVerdict
from stepladder.errors import UserError
from stepladder.exporting import gguf, llama_cpp, modelfile
from stepladder.reporting.words import interval, percent
from stepladder.terminal import say


def export(config: Path, runs: Path, member: str, out: Path, kind: str, folder: Path) -> None:
    """Make the folder of a member's GGUF file (:func:`stepladder.exporting.gguf.export`) and print what was measured.

    Raises:
        UserError: there is no such member or kind, llama.cpp is not there, or one of its programs failed.
        GateError: the file answers worse than ``[quantise]`` allows.
    """
    context = Context.open(config, runs)
    if member not in (names := [each.name for each in context.config.member]):
        raise UserError(f"there is no member {member!r}; the members are {', '.join(names)}")
    if kind not in gguf.KINDS:
        raise UserError(f"--gguf {kind!r}: is none of {', '.join(gguf.KINDS)}")
    programs = llama_cpp.find(folder)
    with context.workspace.locked(), context.progress.stage(f"{member} as {kind}"):
        measured = gguf.export(context, member, kind, out, programs)
    console = context.progress.console
    _summary(measured, context.config.quantise.bits, console)
    say(console, f"Wrote {out}: {measured.file}; for Ollama: ollama create {member} -f {out / modelfile.FILE}")


def _summary(measured: GgufVerdict, bits: int, console: Console) -> None:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(f"{measured.n:,} validation questions")
    for header in ("accuracy", "95 % interval", "MB"):
        table.add_column(header, justify="right")
    systems = {"merged": measured.merged, f"{bits}-bit": measured.quantised, measured.kind: measured.gguf}
    for name, system in systems.items():
        limits = interval(system.interval.low, system.interval.high, 1)
        table.add_row(name, percent(system.accuracy, 1), limits, f"{system.bytes / 1e6:,.0f}")
    console.print(table)
    flips, speed = measured.flips, measured.tokens_per_second
    speed_words = "" if speed is None else f"; {speed:,.0f} tokens/s"
    say(
        console,
        f"Against merged: {flips.right_to_wrong} answers from right to wrong, {flips.wrong_to_right} from wrong to "
        f"right (p = {flips.p:.2g}){speed_words}",
    )
