"""What answering through a server costs beside the model: ``stepladder predict`` against a server that answers at once.

    python benchmarks/overhead.py [--few 2000] [--many 8000] [--rounds 2]

Counted is the processor time of the command and of all processes it starts, not the server's. Two sizes tell the cost
of a question from the fixed cost (imports, mostly); a question's is given in microseconds, and as questions a second on
one core. The questions are closed-world problems of the demo's families, the tokenizer is the bundled model's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepladder import models
from stepladder.ask.remote.admission import PROBE, PROBE_TOKENS
from stepladder.closedworld.generate import generate
from stepladder.models import template

MODEL = "student"
TEXT = "Ann sits left of Bob, and Bob sits left of Cleo, so it follows that Ann is first and Cleo is last. " * 4
WORLDS = 400
"""Different problems; a number in each text tells further ones apart."""


def completion(prompts: list[list[int]]) -> Iterator[dict[str, Any]]:
    """The messages of vLLM's stream: the first token of each answer, then the rest."""
    for index, prompt in enumerate(prompts):
        for text, tokens, reason in ((TEXT[:4], 1, None), (f"{TEXT[4:]}\nAnswer: A", 100, "stop")):
            choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}
            usage = {"prompt_tokens": len(prompt), "completion_tokens": tokens, "total_tokens": len(prompt) + tokens}
            yield {
                "id": "c",
                "object": "text_completion",
                "created": 1,
                "model": MODEL,
                "choices": [choice],
                "usage": usage,
            }


def chat(body: dict[str, Any], probe: list[int]) -> dict[str, Any]:
    prompt_tokens = len(probe) if body["max_tokens"] == PROBE_TOKENS else 100
    choice = {"index": 0, "message": {"role": "assistant", "content": f"{TEXT}\nAnswer: A"}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 100}}


async def serve(probe: list[int]) -> None:
    """Answer at once, on one loop; ``probe`` holds the token ids of an admission's prompt."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with_body = b"content-length:"
        while head := await reader.readuntil(b"\r\n\r\n"):
            lower = head.lower()
            length = int(lower.split(with_body)[1].split(b"\r\n")[0]) if with_body in lower else 0
            body = json.loads(await reader.readexactly(length)) if length else {}
            path = head.split(b" ")[1]
            kind = b"application/json"
            if path == b"/v1/completions":
                kind = b"text/event-stream"
                events = [json.dumps(event).encode() for event in completion(body["prompt"])]
                content = b"".join(b"data: " + event + b"\n\n" for event in [*events, b"[DONE]"])
            elif path == b"/v1/chat/completions":
                content = json.dumps(chat(body, probe)).encode()
            elif path == b"/tokenize":
                content = json.dumps({"count": len(probe), "tokens": probe}).encode()
            else:
                content = json.dumps({"data": [{"id": MODEL}]}).encode()
            head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (kind, len(content))
            writer.write(head + content)
            await writer.drain()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=1024, limit=1 << 26)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def write_questions(count: int, path: Path) -> int:
    """Write at least ``count`` questions; returns how many."""
    worlds, written = list(generate(7, WORLDS, "en", "test")), 0
    with path.open("w", encoding="utf-8") as file:
        number = 0
        while written < count:
            world = worlds[number % len(worlds)]
            row = {**world, "id": f"p{number}", "problem": f"{world['problem']} (Case {number}.)"}
            file.write(json.dumps(row) + "\n")
            written += len(world["questions"])
            number += 1
    return written


def predict(weights: Path, questions: Path, url: str) -> float:
    """Processor seconds of one ``stepladder predict`` and its children."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "stepladder",
            "predict",
            str(weights),
            str(questions),
            f"{folder}/answers.jsonl",
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, "--language", "en", "--url", url], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=2000)
    parser.add_argument("--many", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--serve", type=json.loads, metavar="PROBE", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.serve:
        asyncio.run(serve(settings.serve))
        return
    weights = models.locate(models.BUNDLED)
    probe = template.prompt_tokens(models.load_tokenizer(weights), PROBE)
    command = [sys.executable, __file__, "--serve", json.dumps(probe)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None  # noqa: S101 (a pipe)
    with tempfile.TemporaryDirectory() as name, contextlib.closing(server.stdout), contextlib.ExitStack() as ending:
        ending.callback(server.kill)
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
        few, many = Path(name, "few.jsonl"), Path(name, "many.jsonl")
        counts = write_questions(settings.few, few), write_questions(settings.many, many)
        os.environ.pop("VLLM_API_KEY", None)
        for number in range(settings.rounds):
            seconds = predict(weights, few, url), predict(weights, many, url)
            each = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
            fixed = seconds[0] - each * counts[0]
            print(
                f"round {number + 1}: {1e6 * each:.0f} us a question ({1 / each:.0f} a second), fixed {fixed:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
