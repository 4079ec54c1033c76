"""Benchmarks of the asking engine against the test server, each a ratio or a count within one run.

python benchmarks/asking.py kill         SIGKILL at random moments under load and faults: what was lost or billed
python benchmarks/asking.py budget       a cap of one dollar at 512 in flight: how near the bill comes
python benchmarks/asking.py full         a small disk (tmpfs, as root) filled at random moments: what was lost or bought
python benchmarks/asking.py queue        1,355 requests through a batch queue of 90,000 tokens, killed five times
python benchmarks/asking.py throughput   5,000 requests at 50 ms against a bare asyncio.gather over the same SDK
python benchmarks/asking.py scale        10,000 and 100,000 requests at no latency: time, memory, ledger size, rerun
python benchmarks/asking.py ledger       256,000 answers into a ledger, without servers: time, what is written, its size
python benchmarks/asking.py many         --count requests (a million) of 400 words to eight servers, killed half-way

``--hostile 0.1`` makes a tenth of all replies hostile ones (tests/api_hostile.py), for kill, budget and full.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from api_server import ApiServer  # noqa: E402
from asker import FAULTS, PRICE, Numbered, answers, finish, request, rows, start  # noqa: E402

from stepladder.ask.ledger import Grant, Ledger, Scope  # noqa: E402
from stepladder.ask.outcome import Delivery, judge  # noqa: E402
from stepladder.ask.request import worst_case  # noqa: E402

WRONG_USAGE = {"kind": "wrong_usage", "share": 0.01}
DISK_BYTES = 64_000_000
SERVERS = 8
CHAIN = "{last}\n" + " ".join(f"Step {n}: {n * n} of {n * n * n}." for n in range(60)) + "\nAnswer: A"
"""An answer of some 1,400 characters, most of them the same each time."""


def hostile(settings: argparse.Namespace) -> list[dict[str, object]]:
    """The fault of the test server that is asked for."""
    return [{"kind": "hostile", "share": settings.hostile}] if settings.hostile else []


def tell(line: str, sound: bool | None = None) -> None:
    """Print a line at once, and whether what it says is as it must be."""
    print(line if sound is None else f"{line}  {'ok' if sound else 'BROKEN'}", flush=True)


def kill(folder: Path, rounds: int, settings: argparse.Namespace) -> None:
    """What the server delivered whole is counted against what the ledger holds, after every kill."""
    ledger, draw, count = folder / "ledger.sqlite", random.Random(), 40_000
    cap = 30_000 * worst_case(request("question 1"), PRICE)
    script = {"latency_s": [0.2, 0.8], "faults": [*FAULTS, WRONG_USAGE, *hostile(settings)]}
    with ApiServer(folder, script) as api:
        for number in range(rounds):
            before = api.billing()["billed"]
            process = start(api.url, ledger, "--count", count, "--cap", cap)
            while api.billing()["billed"] == before:
                time.sleep(0.01)
            time.sleep(draw.uniform(0.5, 4.5))
            process.kill()
            process.communicate()
            with Ledger(ledger) as opened:  # what it had in flight is still taken in by its worker
                while any(attempt.alive for attempt in opened.unsettled("run")):
                    time.sleep(0.05)
            billing = api.settled()
            with Ledger(ledger) as opened:
                spent, open_, kept = opened.spent("run"), len(opened.unsettled("run")), answers(opened)
                bought = Counter(row["key"] for row in opened.export() if row["outcome"] == "answered")
            twice = sum(times > 1 for times in bought.values())
            delivered, bill = len(api.log("delivered")), billing["micro_dollars"]
            tell(
                f"kill {number + 1:2}: delivered whole {delivered:5}, on record {kept:5}, open {open_}, bought twice "
                f"{twice}, at most {billing['max_in_flight']} in flight, bill {bill} <= spent {spent} <= cap {cap}",
                bill <= spent <= cap and not twice and delivered == kept,
            )


def budget(folder: Path, rounds: int, settings: argparse.Namespace) -> None:
    cap = 1_000_000
    for number in range(rounds):
        place = folder / str(number)
        place.mkdir()
        script = {"latency_s": 1.0, "completion_tokens": [1, 500], "faults": hostile(settings)}
        with ApiServer(place, script, seed=number) as api:
            asked = ("--count", 20_000, "--cap", cap, "--concurrency", 512, "--max-tokens", 500)
            figures = finish(start(api.url, place / "ledger.sqlite", *asked))
            billing = api.settled()
        bill = billing["micro_dollars"]
        tell(
            f"run {number + 1:2}: bill ${bill / 1e6:.4f}, ledger ${figures['spent'] / 1e6:.4f}, most in flight "
            f"{billing['max_in_flight']}, {figures['answered']} answers in {figures['seconds']:.0f} s",
            # A reply without a readable usage is charged at its worst case, which is more than was billed.
            (0.9 - settings.hostile) * cap <= bill <= figures["spent"] <= cap,
        )


def full(folder: Path, rounds: int, settings: argparse.Namespace) -> None:
    """A ledger on a disk of its own, which another file fills at a random moment and leaves again 2 to 4 s later; in
    every other round the run is killed while the disk is full, and started again once there is room."""
    draw = random.Random()
    for number in range(rounds):
        place, disk = folder / str(number), folder / f"disk {number}"
        place.mkdir()
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], check=True)  # noqa: S607
        try:
            script = {"latency_s": [0.2, 0.8], "faults": [*FAULTS, *hostile(settings)]}
            with ApiServer(place, script, seed=number) as api:
                _fill_once(api, disk, draw, killed=number % 2 == 1, label=f"full {number + 1:2}")
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)  # noqa: S607


def _fill_once(api: ApiServer, disk: Path, draw: random.Random, *, killed: bool, label: str) -> None:
    ledger, filler, count = disk / "ledger.sqlite", disk / "filler", 4000
    command = (api.url, ledger, "--count", count, "--concurrency", 128)
    process = start(*command)
    while not api.billing()["billed"]:
        time.sleep(0.01)
    time.sleep(draw.uniform(0.0, 12.0))
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    before = api.billing()["billed"]
    time.sleep(draw.uniform(2.0, 4.0))
    during = api.settled()["billed"] - before
    if killed:
        process.kill()
        process.communicate()
    filler.unlink()
    figures = {} if killed else finish(process)
    while True:  # what the killed run had in flight is still taken in by its worker
        with Ledger(ledger) as opened:
            if not any(attempt.alive for attempt in opened.unsettled("run")):
                break
        time.sleep(0.05)
    first = len(api.log("delivered"))
    with Ledger(ledger) as opened:
        kept = answers(opened)
    figures = finish(start(*command)) if killed else figures
    billing = api.settled()
    with Ledger(ledger) as opened:
        spent, open_, stored = opened.spent("run"), len(opened.unsettled("run")), answers(opened)
        bought = Counter(row["key"] for row in opened.export() if row["outcome"] == "answered")
    twice, delivered = sum(times > 1 for times in bought.values()), len(api.log("delivered"))
    tell(
        f"{label}{', killed' if killed else ''}: {before} billed before it was full, {during} while it was; delivered "
        f"whole {first}, on record {kept}; at the end {delivered} and {stored} of {count}, open {open_}, bought twice "
        f"{twice}, bill {billing['micro_dollars']} <= spent {spent}  {figures['said']}",
        delivered == stored and first == kept and not twice and billing["micro_dollars"] <= spent,
    )


def queue(folder: Path, rounds: int, settings: argparse.Namespace) -> None:
    """The hard rung of the contest on an account of the first tier: prompts of 600 words, which the provider counts as
    604 tokens each, 9 times what its queue takes. Killed five times, at random moments."""
    count, limit_tokens, kills, draw = 1_355, 90_000, 5, random.Random()
    for number in range(rounds):
        place = folder / str(number)
        place.mkdir()
        ledger, refused = place / "ledger.sqlite", "did not fit into the queue"
        with ApiServer(place, {"batch_queue_tokens": limit_tokens, "batch_polls": 4}, seed=number) as api:
            command = (api.url, ledger, "--count", count, "--words", 600, "--batch")
            killed_at = []
            for kill_number in range(kills):
                process, until = start(*command), kill_number * count * draw.uniform(0.8, 1.0) / kills
                while process.poll() is None and api.billing()["billed"] < until:
                    time.sleep(0.01)
                time.sleep(draw.uniform(0.0, 0.5 if until else 3.0))
                process.kill()
                process.communicate()
                killed_at.append(api.billing()["billed"])
            figures = finish(start(*command))
            billing = api.settled()
        with Ledger(ledger) as opened:
            ended = Counter(how for (how,) in rows(opened, "SELECT ended FROM batches"))
            spent, kept = opened.spent("run"), answers(opened)
            bought = Counter(row["key"] for row in opened.export() if row["outcome"] == "answered")
        twice = sum(times > 1 for times in bought.values())
        tell(
            f"run {number + 1:2}: killed at {killed_at} billed; {kept} of {count} answers, bought twice "
            f"{twice}, billed twice {billing['duplicates']}, bill {billing['micro_dollars']} = spent {spent}; batches: "
            f"{ended['completed']} completed, {ended[refused]} refused by the queue  {figures['said']}",
            kept == billing["billed"] == count and not twice and billing["micro_dollars"] == spent,
        )


def throughput(folder: Path, rounds: int, settings: argparse.Namespace) -> None:
    """Wall time of whole processes, interpreter and imports included, since the worker brings a second one."""
    count = 5000
    for number in range(rounds):
        place = folder / str(number)
        place.mkdir()
        wall = {}
        with ApiServer(place, {"latency_s": 0.05, "models": ["test-model", "gpt-4o-mini"]}) as api:
            engine = (api.url, place / "engine.sqlite", "--count", count, "--in-process")
            worker = (api.url, place / "worker.sqlite", "--count", count)
            work = {
                "bare gather": lambda api=api: start(api.url, count, script=HERE / "bare_gather.py"),
                "engine alone": lambda engine=engine: start(*engine),
                "with worker": lambda worker=worker: start(*worker),
            }
            if (python := settings.curator) is not None:
                work["curator"] = lambda api=api: start(api.url, count, script=HERE / "curator_ask.py", python=python)
            for name, command in work.items():
                begun = time.perf_counter()
                f = finish(command())
                wall[name] = time.perf_counter() - begun
                tell(
                    f"{name:12} {wall[name]:5.1f} s, {count / wall[name]:4.0f} requests/s, "
                    f"{f['cpu_seconds']:5.1f} CPU s, peak {f['peak_mib']:.0f} MiB, {f['answered']} answers, "
                    f"ratio {wall['bare gather'] / wall[name]:.2f}"
                )


def scale(folder: Path, rounds: int, settings: argparse.Namespace) -> None:
    took = {}
    with ApiServer(folder, {}) as api:
        for count in (10_000, 100_000):
            ledger = folder / f"{count}.sqlite"
            for what in ("asked", "again"):
                f = finish(start(api.url, ledger, "--count", count, "--in-process"))
                took[count, what] = f["seconds"]
                tell(
                    f"{count:7,} {what}: {f['seconds']:6.1f} s, {count / f['seconds']:7.0f} requests/s, "
                    f"peak {f['peak_mib']:.0f} MiB, ledger {ledger.stat().st_size / count:.0f} bytes a request"
                )
    tell(f"100,000 took {took[100_000, 'asked'] / took[10_000, 'asked']:.1f} times as long as 10,000")


def ledger(folder: Path, rounds: int, settings: argparse.Namespace) -> None:
    """Requests of 400 words, reserved and settled in groups of 64, each in a transaction of its own."""
    count, group, scope = 256_000, 64, Scope("run")
    wanted, file, process = Numbered(count, words=400, max_tokens=64), folder / "ledger.sqlite", psutil.Process()
    with Ledger(file) as opened:
        opened.begin_session()
        begun, busy, written = time.perf_counter(), time.process_time(), process.io_counters().write_bytes
        for first in range(0, count, group):
            requests = [wanted[number] for number in range(first, first + group)]
            with opened.transaction():
                grants = [opened.reserve(each, PRICE, scope, "test-model") for each in requests]
            with opened.transaction():
                for number, (each, grant) in enumerate(zip(requests, grants, strict=True), first):
                    assert isinstance(grant, Grant)  # noqa: S101 (none was asked before)
                    delivery = Delivery(200, _reply(number))
                    opened.settle(grant, each, scope, delivery, judge(each, delivery, PRICE), 0.1)
        seconds, busy = time.perf_counter() - begun, time.process_time() - busy
        written = process.io_counters().write_bytes - written
    tell(
        f"{count:,} answers: {count / seconds:,.0f} a second, {busy / count * 1e6:.0f} us of CPU, "
        f"{written / count / 1024:.1f} KiB written and {file.stat().st_size / count:,.0f} bytes kept an answer"
    )


def _reply(number: int) -> bytes:
    message = {"role": "assistant", "content": CHAIN.format(last=number)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 400, "completion_tokens": 300}
    return json.dumps({"id": f"chat-{number}", "choices": [choice], "usage": usage}).encode()


def many(folder: Path, rounds: int, settings: argparse.Namespace) -> None:
    """One driver and eight servers. What is measured after the kill is how long the driver takes until a server gets a
    request that the ledger cannot answer; and how long the commands take that a user looks with. With ``--folder``,
    the ledger stays there, and the same command goes on from what it holds."""
    count, draw, folder = settings.count, random.Random(), settings.folder or folder
    folder.mkdir(exist_ok=True)
    ledger = folder / "ledger.sqlite"
    with Ledger(ledger) as opened:
        held = opened.calls("run")
    with contextlib.ExitStack() as stack:
        apis = [stack.enter_context(ApiServer(folder, {"content": CHAIN})) for _ in range(SERVERS)]

        def billed() -> int:
            return sum(api.billing()["billed"] for api in apis)

        urls = ",".join(api.url for api in apis)
        command = (urls, ledger, "--count", count, "--words", 400, "--in-process", "--concurrency", 32)
        kill_at = int((count - held) * draw.uniform(0.3, 0.7))
        process = start(*command)
        watch = Watch(process, billed, held, count)
        watch.until(lambda billed: billed >= kill_at)
        process.kill()
        process.communicate()
        before = billed()
        tell(f"killed at {held + before:,} of {count:,}; {watch.memory()}")
        begun, process = time.perf_counter(), start(*command)
        watch = Watch(process, billed, held, count)
        watch.until(lambda billed: billed > before)
        tell(f"the next one was asked {time.perf_counter() - begun:.1f} s after the same command was given again")
        watch.until(lambda billed: False)
        figures, twice = finish(process), held + billed() - count
    size = sum(file.stat().st_size for file in folder.glob("ledger.sqlite*"))
    tell(f"{figures['answered']:,} answers, {twice:,} asked twice; {watch.memory()}", figures["answered"] == count)
    tell(f"ledger: {size / count:,.0f} bytes an answer")
    begun = time.perf_counter()
    with Ledger(ledger, read_only=True) as opened:
        looked = (opened.calls("run"), opened.spent("run"), opened.accounts("run"), opened.unsettled("run"))
    tell(f"calls, spend, accounts and what is open: {time.perf_counter() - begun:.3f} s", looked[0] == count)


class Watch:
    """A process that asks, looked at twice a second: its memory, and a line for every hundredth of its requests."""

    def __init__(self, process: subprocess.Popen[str], billed: Callable[[], int], held: int, count: int) -> None:
        self.process, self.billed, self.held, self.count = process, billed, held, count
        self.resident: list[float] = []
        self.last, self.since = billed(), time.perf_counter()

    def until(self, reached: Callable[[int], bool]) -> None:
        """Look until so many requests have been billed as the function wants, or the process has ended."""
        while not reached(billed := self.billed()) and self.process.poll() is None:
            with contextlib.suppress(psutil.Error):
                self.resident.append(psutil.Process(self.process.pid).memory_info().rss / 2**20)
            if billed - self.last >= self.count / 100:
                speed, self.since = (billed - self.last) / (time.perf_counter() - self.since), time.perf_counter()
                self.last = billed
                tell(f"  {self.held + billed:,} of {self.count:,}, {speed:,.0f} a second, {self.resident[-1]:.0f} MiB")
            time.sleep(0.5)

    def memory(self) -> str:
        """Memory early on and at the end."""
        if not self.resident:  # it was over before it was looked at
            return "no memory"
        early = self.resident[: max(1, len(self.resident) // 4)]
        return f"memory {max(early):.0f} MiB in the first quarter, {max(self.resident):.0f} at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = {
        "kill": (kill, 20),
        "budget": (budget, 20),
        "full": (full, 20),
        "queue": (queue, 3),
        "throughput": (throughput, 3),
        "scale": (scale, 1),
        "ledger": (ledger, 1),
        "many": (many, 1),
    }
    parser.add_argument("what", choices=work)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--curator", help="throughput: the Python of an environment with bespokelabs-curator 0.1.31")
    parser.add_argument("--hostile", type=float, default=0.0, help="kill, budget, full: share of hostile replies")
    parser.add_argument("--count", type=int, default=1_000_000, help="many")
    parser.add_argument("--folder", type=Path, help="many: where the ledger stays, to go on later")
    settings = parser.parse_args()
    function, rounds = work[settings.what]
    with tempfile.TemporaryDirectory() as folder:
        function(Path(folder), settings.rounds or rounds, settings)


if __name__ == "__main__":
    main()
