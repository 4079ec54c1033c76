"""Predict against bare vLLM, one-at-a-time generate and the embedded engine; and what prefix caching gains.

    python benchmarks/serving.py MODEL QUESTIONS [--environment .venv-serve] [--dtype bfloat16] [--alone 16]

MODEL is a finished model folder, QUESTIONS a file in the contest's form. In one run, each in a process of its own, none
beside another: vLLM's ``LLM.chat``; ``stepladder predict --engine vllm``; transformers' ``generate``, one question at a
time, on the first few; ``stepladder predict --engine local``. Start-up is left out everywhere: predict's time is from
the moment its server is healthy to the moment it may go. Then vLLM's counters with the questions in the order they are
asked in, shuffled, and without prefix caching, each on a fresh server with little room.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest.mock import patch

from rich.console import Console

from stepladder import models
from stepladder.answering import client, standalone
from stepladder.ask import RemoteModel, ask_remote
from stepladder.ask.ledger import Ledger, Scope
from stepladder.ask.remote.admission import FREE
from stepladder.ask.request import Request
from stepladder.commands.predict import predict as predict_command
from stepladder.config import Dtype, Model, Serve
from stepladder.forecast.memory import MAX_SEQUENCES
from stepladder.mcq.answer import strict
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.questionfile import read_problems
from stepladder.models import template
from stepladder.records import Question
from stepladder.serving import fleet as fleets
from stepladder.serving.cards import visible_cards
from stepladder.serving.fleet import Fleet
from stepladder.serving.server import ServerJob
from stepladder.serving.vllm import CPU_BLOCK_TOKENS, MAX_BATCHED_TOKENS, server_environment
from stepladder.supervise import child_environment

ROOM = 0.08
"""GiB of KV cache where prefix caching is measured: what is shared must still be there when it is asked for again."""


class Timed(Fleet):
    """Servers that say when they were ready and when they were let go."""

    seconds = 0.0

    def __enter__(self) -> Timed:
        super().__enter__()
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *given: type[BaseException] | BaseException | TracebackType | None) -> None:
        Timed.seconds += time.perf_counter() - self._begun
        super().__exit__(*given)


def questions_of(asked: argparse.Namespace) -> list[Question]:
    language = standalone.read_settings(asked.model, asked.language).language
    return [question for one in read_problems(asked.questions, language, labelled=False) for question in one.questions]


def bare(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """``LLM.chat`` in vLLM's own environment."""
    how = standalone.read_settings(asked.model, asked.language)
    told = {
        "model": str(asked.model), "dtype": asked.dtype, "max_length": asked.max_length,
        "max_tokens": how.predict.max_tokens, "kv_cache_bytes": round(asked.kv_cache * 2**30),
        "sequences": MAX_SEQUENCES, "batch": MAX_BATCHED_TOKENS, "block": CPU_BLOCK_TOKENS,
        "conversations": [
            [message.model_dump() for message in ask_messages(q, tuple(range(len(q.options))), how.prompts)]
            for q in questions_of(asked)
        ],
    }  # fmt: skip
    (folder / "chat.json").write_text(json.dumps(told), encoding="utf-8")
    program, said = asked.environment / "bin" / "python", folder / "said.json"
    words = [program, Path(__file__).with_name("bare_chat.py"), folder / "chat.json", said]
    cards = visible_cards()[:1]
    named = {"CUDA_VISIBLE_DEVICES": cards[0]} if cards else {}
    subprocess.run(
        list(map(str, words)),
        env=server_environment(len(cards), child_environment() | named),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return dict(json.loads(said.read_text(encoding="utf-8")))


def predict(asked: argparse.Namespace, folder: Path, engine: str) -> dict[str, Any]:
    """``stepladder predict``, and what it was told, from its ledger."""
    client.Fleet = Timed  # type: ignore[misc]
    load, loading = client.Local.load, []

    def timed(weights: Path, dtype: Dtype) -> client.Local:
        begun = time.perf_counter()
        found = load(weights, dtype)
        loading.append(time.perf_counter() - begun)
        return found

    client.Local.load = staticmethod(timed)  # type: ignore[method-assign, assignment]
    out = folder / f"{engine}.jsonl"
    served = {
        "environment": asked.environment, "dtype": asked.dtype, "max_length": asked.max_length,
        "kv_cache_gib": asked.kv_cache,
    }  # fmt: skip
    begun = time.perf_counter()
    predict_command(
        str(asked.model), asked.questions, out, Console(stderr=True), language=asked.language,
        predict_settings={"engine": engine}, serve_settings=served,
    )  # fmt: skip
    seconds = Timed.seconds or time.perf_counter() - begun - sum(loading)
    how = standalone.read_settings(asked.model, asked.language)
    how = how._replace(
        predict=how.predict.model_copy(update={"engine": engine}), serve=how.serve.model_copy(update=served)
    )
    known = standalone.so_far(Path(f"{out}.ledger.sqlite"), asked.model, questions_of(asked), how)
    return {
        "seconds": seconds,
        "tokens": sum(sum(one.tokens) for one in known),
        "texts": [one.texts[0] for one in known],
    }


def generate(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """transformers' ``generate``, one question at a time, as the winning entry did before it had vLLM."""
    import torch

    how = standalone.read_settings(asked.model, asked.language)
    tokenizer, model = models.load_tokenizer(asked.model), models.load(asked.model)
    ends = [template.closing_token(tokenizer), tokenizer.eos_token_id]
    tokens, begun = 0, time.perf_counter()
    for question in questions_of(asked)[: asked.alone]:
        messages = ask_messages(question, tuple(range(len(question.options))), how.prompts)
        ids = torch.tensor([template.prompt_tokens(tokenizer, messages)], device=model.device)
        said = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=how.predict.max_tokens,
            eos_token_id=ends, pad_token_id=ends[0],
        )  # fmt: skip
        tokens += said.shape[1] - ids.shape[1]
    return {"seconds": time.perf_counter() - begun, "tokens": tokens, "texts": []}


COUNTING = """
import sys
from stepladder.serving import server
made = server.server_command
server.server_command = lambda *words: [word for word in made(*words) if word != "--disable-log-stats"]
sys.exit(server.run(server.ServerJob.model_validate_json(sys.argv[1])))
"""


def counting(job: ServerJob) -> list[str]:
    """The command of a server that counts what its cache gives."""
    return [sys.executable, "-c", COUNTING, job.model_dump_json()]


def prefixes(asked: argparse.Namespace, folder: Path, order: str) -> dict[str, Any]:
    """One pass over the questions on a fresh server, and vLLM's counters after it."""
    how = standalone.read_settings(asked.model, asked.language)
    asks = questions_of(asked)
    if order == "shuffled":
        random.Random(1).shuffle(asks)
    wanted = [
        Request(
            model="student", messages=ask_messages(q, tuple(range(len(q.options))), how.prompts),
            max_tokens=how.predict.max_tokens, final=True,
        )
        for q in asks
    ]  # fmt: skip
    serve = Serve(
        environment=asked.environment, dtype=asked.dtype, max_length=asked.max_length, kv_cache_gib=ROOM,
        prefix_caching=order != "none",
    )  # fmt: skip
    with (
        patch.object(fleets, "command", counting),
        Fleet(asked.model, "student", serve, folder / order) as fleet,
        Ledger(folder / f"{order}.sqlite") as ledger,
    ):
        path = str(asked.model)
        model = Model(engine="openai", base_url_file=fleet.addresses, model="student", path=path, price=FREE)
        begun = time.perf_counter()
        found = ask_remote(wanted, RemoteModel("student", model, key=fleet.key), ledger, Scope("run", "all"))
        seconds = time.perf_counter() - begun
        address = fleet.addresses.read_text().split()[0].removesuffix("/v1")
        with urllib.request.urlopen(f"{address}/metrics") as reply:  # noqa: S310
            said = reply.read().decode().splitlines()
    counted = {
        name: sum(float(line.split()[-1]) for line in said if line.startswith(f"vllm:prefix_cache_{name}_total"))
        for name in ("queries", "hits")
    }
    tokens = sum(one.completion_tokens for one in found.values())
    return {"seconds": seconds, "tokens": tokens, **counted}


def alone(kind: str, folder: Path) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    words = [sys.executable, __file__, *sys.argv[1:], "--one", kind, "--folder", str(folder)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--environment", type=Path, default=Path(".venv-serve"))
    parser.add_argument("--language")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--kv-cache", type=float, default=2.0)
    parser.add_argument("--alone", type=int, default=16)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        measures = {
            "bare": lambda: bare(asked, asked.folder),
            "vllm": lambda: predict(asked, asked.folder, "vllm"),
            "local": lambda: predict(asked, asked.folder, "local"),
            "generate": lambda: generate(asked, asked.folder),
        }
        measured = measures[asked.one]() if asked.one in measures else prefixes(asked, asked.folder, asked.one)
        print(json.dumps(measured))
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {kind: alone(kind, folder) for kind in ("bare", "vllm", "generate", "local")}
        rate = {kind: one["tokens"] / one["seconds"] for kind, one in found.items()}
        print(f"\n{len(found['vllm']['texts'])} questions, {found['vllm']['tokens']:,} tokens written\n")
        for kind, title in {
            "bare": "LLM.chat", "vllm": "stepladder predict, vLLM", "local": "stepladder predict, this process",
            "generate": f"generate, one at a time ({asked.alone})",
        }.items():  # fmt: skip
            print(
                f"{title:36}{found[kind]['seconds']:8.1f} s {rate[kind]:8.0f} tokens/s {rate['vllm'] / rate[kind]:8.2f}"
            )
        compare(questions_of(asked), found["vllm"]["texts"], found["local"]["texts"])
        print(f"\nprefix caching, {ROOM} GiB of KV cache, by the order that questions are asked in")
        for order in ("grouped", "shuffled", "none"):
            one = alone(order, folder)
            share = one["hits"] / one["queries"] if one["queries"] else 0.0
            print(f"{order:36}{one['seconds']:8.1f} s {one['tokens'] / one['seconds']:8.0f} tokens/s {share:8.1%} hits")


def compare(questions: list[Question], served: list[str], here: list[str]) -> None:
    """Letters through vLLM and in this process, and where texts that lead to other letters part."""
    pairs = list(zip(questions, served, here, strict=True))
    letters = [(strict(one, q.options).letter, strict(other, q.options).letter) for q, one, other in pairs]
    texts = sum(one == other for _, one, other in pairs)
    same = sum(one == other for one, other in letters)
    print(f"\nthe same letter {same} of {len(pairs)} ({same / len(pairs):.1%}), word for word {texts}")
    for (question, one, other), (left, right) in zip(pairs, letters, strict=True):
        if left != right:
            at = next(
                (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
            )
            print(f"  {question.id}: vLLM {left}, here {right}; after {one[max(0, at - 40) : at]!r}")
            print(f"    vLLM {one[at : at + 40]!r}, here {other[at : at + 40]!r}")


if __name__ == "__main__":
    main()
