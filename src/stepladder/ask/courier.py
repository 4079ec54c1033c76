"""The courier: priced requests are sent from a process of its own, so that what is in flight survives the run.

An answer that has arrived while the run is being killed is lost with the run's memory, and it is paid for. The courier
has no part in the run's fate: when its parent is gone, or interrupted, it sends nothing more, waits for what is in
flight, commits it and ends. A run that is started meanwhile finds those requests busy and waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from stepladder import models, template
from stepladder.ask.admission import PROBE, Admission
from stepladder.ask.batch import ask_in_batches, collect
from stepladder.ask.engine import Report, Tally, Teacher, ask_all
from stepladder.ask.gate import START, Gate
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.openai_http import Http
from stepladder.ask.request import Request, Response
from stepladder.ask.servers import Addresses, Endpoint, Note
from stepladder.config import Model
from stepladder.errors import AskError, BudgetError

ERRORS = {error.__name__: error for error in (AskError, BudgetError)}
WATCH = 0.1
"""Seconds between looks at whether the parent is still there."""
GRACE = 5.0
"""Seconds that a courier has for what is in flight when it must stop; only servers that cost nothing are asked so."""
TELL = 0.1
"""Seconds between two reports, at least."""


def ask(
    requests: Sequence[Request],
    name: str,
    model: Model,
    ledger: Ledger,
    scope: Scope,
    report: Report = lambda done, spent: None,
    note: Note = lambda line: None,
    *,
    batch: bool = False,
    at_once: bool = False,
    stop: threading.Event | None = None,
) -> dict[str, Response]:
    """Answer every request and return the responses by request key, truncated and refused ones too.

    With ``batch``, through the provider's batch API. With ``at_once``, from the beginning as many at a time as the
    model's ``concurrency`` allows: its servers are there for this alone. Once ``stop`` is set, nothing more is sent.

    Raises:
        BudgetError: the cap is reached; what was answered is kept, and a higher cap goes on from there.
        AskError: the key or the model is wrong, some requests got no answer, or ``stop`` was set.
    """
    known = ledger.find_all(requests)
    missing = [r for r in requests if r.key not in known or not known[r.key].settles(r)]
    here = len(requests) - len(missing)
    if here:
        with ledger.transaction():
            ledger.hit(scope, name, here)
    report(here, 0)
    if not missing:
        return known
    key = _key(name, model)  # before anything starts

    def told(done: int, spent: int) -> None:
        report(here + done, spent)

    if batch:
        ask_in_batches(missing, name, model, key, ledger, scope, told, note)
        return ledger.find_all(requests)
    if len(model.base_url) == 1:
        collect(name, model, key, ledger, told, note)
    job = {
        "name": name,
        "model": model.model_dump(mode="json", exclude_unset=True),
        "identity": missing[0].model,
        "probe": _probe_tokens(model.path) if model.is_own and model.path else None,
        "ledger": str(ledger.path),
        "scope": scope._asdict(),
        "start": model.concurrency if at_once else START,
    }
    _send(missing, job, told, note, stop)
    return ledger.find_all(requests)


def _send(
    requests: list[Request], job: dict[str, Any], report: Report, note: Note, stop: threading.Event | None
) -> None:
    """Start a courier, hand it the requests, pass on what it reports."""
    process = subprocess.Popen(  # noqa: S603 (our own module, no shell)
        [sys.executable, "-m", "stepladder.ask.courier", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # out of reach of the terminal's Ctrl-C, which its parent passes on
    )
    assert process.stdin is not None  # noqa: S101 (both are pipes)
    assert process.stdout is not None  # noqa: S101
    feeder = threading.Thread(target=_feed, args=(process.stdin, job, requests), daemon=True)
    feeder.start()
    if stop is not None:
        threading.Thread(target=_interrupt, args=(process, stop), daemon=True).start()
    failure: dict[str, str] = {}
    with process.stdout as told:
        try:
            for line in told:
                message = json.loads(line)
                if "error" in message:
                    failure = message
                elif "note" in message:
                    note(message["note"])
                else:
                    report(message["done"], message["spent"])
            process.wait()
        except BaseException:  # an interrupt, or a limit on time
            if stop is None or not stop.is_set():  # then it has been told already, and a second time is once too often
                process.send_signal(signal.SIGINT)
            process.wait()
            raise
    feeder.join()
    if stop is not None and stop.is_set():
        raise AskError("stopped before everything was answered")
    if failure:
        raise ERRORS[failure["error"]](failure["message"])
    if process.returncode:
        raise RuntimeError(f"the courier ended with code {process.returncode}")


def _interrupt(process: subprocess.Popen[str], stop: threading.Event) -> None:
    """Interrupt a courier once ``stop`` is set, and do not wait long for what it still has in flight."""
    while process.poll() is None:
        if stop.wait(WATCH):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            return


def _feed(pipe: IO[str], job: dict[str, Any], requests: list[Request]) -> None:
    with contextlib.suppress(BrokenPipeError), pipe:  # it may stop before it needs them all
        pipe.write(json.dumps(job) + "\n")
        pipe.writelines(request.model_dump_json() + "\n" for request in requests)


def _key(name: str, model: Model) -> str:
    """The API key; a server of one's own that wants none gets a word."""
    if model.api_key_env is None:
        return "none"
    if not (key := os.environ.get(model.api_key_env, "")):
        raise AskError(f"model {name!r}: environment variable {model.api_key_env} is not set; put the key there")
    return key


@functools.cache
def _probe_tokens(path: str) -> list[int]:
    """The probe as the weights' own tokenizer renders it."""
    return template.prompt_tokens(models.load_tokenizer(models.locate(path)), PROBE)


def teacher(
    name: str,
    model: Model,
    admission: Admission | None = None,
    note: Note = lambda line: None,
    start: int = START,
) -> Teacher:
    """A model of the configuration as the engine asks it; ``start`` is how many requests are in flight at each server
    before its first answer."""
    if model.price is None:
        raise AskError(f"model {name!r} has no price; without one no budget can be kept")
    served, key = model.served_as(name), _key(name, model)

    @functools.cache
    def endpoint(url: str) -> Endpoint:
        gate = Gate(model.concurrency, model.requests_per_minute, model.tokens_per_minute, start)
        return Endpoint(url, lambda: Http(url, served, key, model.timeout, model.cap_name), gate, admission)

    file = None if model.base_url_file is None else Addresses(model.base_url_file, note)
    return Teacher(name, model.price, lambda: [endpoint(url) for url in (model.base_url if file is None else file())])


# In the courier's own process


def main() -> None:
    """Read the job and its requests from standard input; report on standard output."""
    cast(io.TextIOWrapper, sys.stdin).reconfigure(encoding="utf-8")  # whatever the terminal's is
    with contextlib.suppress(KeyboardInterrupt):  # by then, what was in flight is settled
        _work()


def _work() -> None:
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    job = json.loads(sys.stdin.readline())
    last = 0.0

    def report(done: int, spent: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= TELL:
            last = now
            _tell({"done": done, "spent": spent})

    with Ledger(Path(job["ledger"])) as ledger:
        try:
            tally = asyncio.run(_ask(job, ledger, report))
        except (AskError, BudgetError) as error:
            _tell({"error": type(error).__name__, "message": str(error)})
        else:
            _tell({"done": tally.stored + tally.answered, "spent": tally.micro_dollars})


async def _ask(job: dict[str, Any], ledger: Ledger, report: Report) -> Tally:
    name, model, scope = job["name"], Model.model_validate(job["model"]), Scope(**job["scope"])
    admission = Admission(job["identity"], model.served_as(name), job["probe"], scope.run) if model.is_own else None
    return await ask_all(
        _requests(), teacher(name, model, admission, _note, job["start"]), ledger, scope, report, _note
    )


def _note(line: str) -> None:
    _tell({"note": line})


def _requests() -> Iterator[Request]:
    for line in sys.stdin:
        yield Request.model_validate_json(line)


def _end_with(parent: int) -> None:
    """Interrupt this process once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(WATCH)
    os.kill(os.getpid(), signal.SIGINT)


def _tell(message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody may be listening any more
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
