"""Replies, question files, model folders, templates and programs at random, for as long as one likes: ``make fuzz``.

    python tests/fuzz.py [--minutes 20] [--seed N]

Each is made by spoiling something whole. Allowed are an answer and an error of one line; counted are tracebacks, more
than a second of processor time for 100 kB, and escapes: a canary that a template or a program got at.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich.console import Console

from stepladder import models
from stepladder.answering.standalone import read_settings
from stepladder.ask.outcome import Delivery, judge
from stepladder.ask.remote.batch_lines import read_line
from stepladder.ask.remote.gate import reset_wait
from stepladder.ask.request import Request, worst_case
from stepladder.closedworld.prove import Unproved
from stepladder.closedworld.untrusted import prove_rules
from stepladder.commands.import_ import import_
from stepladder.config import Price
from stepladder.errors import UserError
from stepladder.forecast import model_shape
from stepladder.isolation import templates
from stepladder.isolation.templates import TemplateFault, Templates
from stepladder.mcq.answer import lenient, strict
from stepladder.mcq.answerfile import problems_in
from stepladder.mcq.formats import Columns, SourceFormat
from stepladder.mcq.questionfile import read_problems
from stepladder.mcq.shuffle import fixed
from stepladder.mcq.variant import Unfit, only_asks, read
from stepladder.mcq.votefile import read_votes
from stepladder.models import template
from stepladder.records import Message

CANARY = "canary-7c1f"
MAX_SECONDS = 1.0
"""Processor time of one case, for each 100 kB."""
NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 1, 1e308, 10**30, 10**400, float("inf"), float("nan"), "", " ", "\ud800", "A", "B",
    "\x1b]52;c;aGk=\x07", "[/red]", "<script>", "../../etc/passwd", "\x00", "\u202e", "-1", "1e999", [], {},
    [[]], [None], {"": ""},
)  # fmt: skip
TEXTS = (
    "The answer is", "Answer: A", "答案是：", "以上", "的", " ", "\n", "。", "\\boxed{A}", "<answer>", "```",
    "**", "A.", "(B)", "根据", "all of the above", "\u0301\u0316", "\ufdfa", "Question:", "Reasoning:",
    "Program:", "问题：", "推理：", "程序：",
)  # fmt: skip
REPLY = {
    "id": "x",
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "So it is.\nAnswer: A"},
            "finish_reason": "stop",
            "logprobs": {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": [{"token": "A", "logprob": -1}]}]},
        }
    ],
    "usage": {"prompt_tokens": 20, "completion_tokens": 8},
}
HEADERS = {"retry-after": "3", "x-ratelimit-reset-requests": "1m3s", "x-ratelimit-remaining-requests": "9"}
PROBLEM = {
    "id": "p1",
    "problem": "Ann is tall. 小明比小红高。",
    "questions": [{"question": "Who?", "options": ["Ann", "Bob", "以上都是"], "answer": "A", "worked": "So.\nAnn"}],
}
VOTES = {"id": "p1#0", "gold": "A", "votes": {"m": ["A", "B"], "n": ["A"]}}
BASE = "loud(bob). calm(ann). age(bob,7). age(ann,9). next(X,Y) :- age(X,A), age(Y,B), A < B."
RULES = (
    "opt(0) :- loud(bob).", "opt(1) :- loud(ann).", "opt(1) :- age(ann,X), age(bob,Y), X*Y > 60.",
    "p(X) :- age(X,_).", "opt(0) :- not p(bob).", "opt(1) :- X = 9000*9000, X*X < 0.", "p(f(X)) :- p(X).",
    "opt(0) :- #sum{X,Y : age(Y,X)} > 9.", ":- loud(bob).", "{opt(0)}.", "opt(0) :- loud(bob), not loud(bob).",
    "#script (python) import os #end.", "opt(", "opt(1..999999).", "q(X,Y,Z) :- X=1..999, Y=1..999, Z=1..999.",
    "opt(0) :- \"é\" = 1.", "#include \"/etc/passwd\".",
)  # fmt: skip
JINJA = (
    "{{ messages }}", "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{% if ", " %}", "{{ ",
    " }}", "''.__class__", "cycler.__init__.__globals__", ".os.environ", "|attr('__class__')", "range(99999)",
    "'a' * 10**9", "namespace(x=1)", "{% set x = ", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include '/etc/passwd' %}", "self", "lipsum", "{{ '%99999999d' % 1 }}", "{{ messages|tojson }}",
    "{{ raise_exception('x') }}", "{% generation %}", "{% endgeneration %}",
)  # fmt: skip


def spoilt(value: Any, draw: random.Random) -> Any:
    """The value with something nasty in a place or two."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        node, path = value, []
        while isinstance(node, dict | list) and node and draw.random() < 0.8:
            key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            path.append((node, key))
            node = node[key]
        if not path:
            return copy.deepcopy(draw.choice(NASTY))
        parent, key = path[-1]
        act = draw.random()
        if act < 0.6:
            parent[key] = copy.deepcopy(draw.choice(NASTY))
        elif act < 0.75:
            parent[key] = text(draw)
        elif act < 0.9:
            del parent[key]
        else:
            parent[key] = [copy.deepcopy(parent[key]) for _ in range(draw.choice((0, 2, 30)))]
    return value


def text(draw: random.Random) -> str:
    count = draw.choice((1, 3, 30, 3_000))
    return "".join(draw.choice(TEXTS) * draw.choice((1, 1, 9)) for _ in range(count))[:100_000]


def encoded(value: Any, draw: random.Random) -> bytes:
    """The value as JSON, sometimes with spoilt bytes."""
    content = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    act = draw.random()
    if act < 0.05:
        return b"[" * draw.choice((10, 100_000)) + content
    if act < 0.2 and content:
        place = draw.randrange(len(content))
        return content[:place] + draw.randbytes(draw.choice((0, 1, 9))) + content[place + draw.choice((0, 1, 50)) :]
    return content


def replies(draw: random.Random, _: Path) -> int:
    body = encoded(spoilt(REPLY, draw), draw)
    headers = {name: str(draw.choice((value, *NASTY))) for name, value in HEADERS.items()}
    status = draw.choice((200, 200, 200, 200, 400, 401, 429, 500, 502, 302, 100, 999, None))
    request = Request(model="m", messages=(Message(role="user", content="x"),), max_tokens=draw.choice((1, 64)))
    price = Price(input=Decimal(1), output=Decimal(2))
    outcome = judge(request, Delivery(status, body, headers), price, 1_700_000_000.0)
    reset_wait(headers, 1_700_000_000.0)
    read_line(body)
    if outcome.response is not None:
        outcome.response.text.encode()
    if outcome.charge is not None and not 0 <= outcome.charge <= 2 * worst_case(request, price):
        raise AssertionError(f"charged {outcome.charge}")
    return len(body)


def question_files(draw: random.Random, folder: Path) -> int:
    path = folder / f"questions{draw.choice(('.jsonl', '.json', '.csv', '.parquet', '.txt'))}"
    content = b"\n".join(encoded(spoilt(PROBLEM, draw), draw) for _ in range(draw.choice((1, 1, 3))))
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        for problem in read_problems(path, draw.choice(("en", "zh")), labelled=draw.random() < 0.5):
            for question in problem.questions:
                fixed(question)
    with contextlib.suppress(UserError):
        import_(str(path), folder / "out.jsonl", SourceFormat(Columns()), None, Console(quiet=True))
    votes = folder / "votes.jsonl"
    votes.write_bytes(encoded(spoilt(VOTES, draw), draw))
    with contextlib.suppress(UserError):
        read_votes(votes)
    problems_in(content)
    return len(content)


def answers(draw: random.Random, _: Path) -> int:
    written = text(draw)
    options = ("Ann", draw.choice(TEXTS) * draw.choice((1, 20)))
    strict(written, options)
    lenient(written, options)
    return len(written)


def variants(draw: random.Random, _: Path) -> int:
    written = f"Question: x{text(draw)}\nA. 1\nB. 2{text(draw)}\nReasoning: y\nAnswer: A\nProgram: {draw.choice(RULES)}"
    with contextlib.suppress(Unfit):
        read(written, QUESTION, "new")
    only_asks(BASE, written, 2)
    return len(written)


def model_folders(draw: random.Random, folder: Path) -> int:
    bundled = models.locate(models.BUNDLED)
    for path in bundled.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    (folder / "model.safetensors").touch()
    settings = {"language": "en", "seed": 1, "predict": {"engine": "local"}, "serve": {"max_length": 99}}
    (folder / "stepladder.json").write_text(json.dumps(settings))
    name = f"{draw.choice(('config', 'tokenizer_config', 'generation_config', 'stepladder', 'tokenizer'))}.json"
    content = encoded(spoilt(json.loads((folder / name).read_text()), draw), draw)
    (folder / name).write_bytes(content)
    with contextlib.suppress(UserError):
        models.locate(str(folder))
        models.content_digest(folder)
        read_settings(folder, None)
        model_shape.read(folder)
        tokenizer = models.load_tokenizer(folder)
        template.check_folder(tokenizer, folder)
        template.prompt_tokens(tokenizer, [Message(role="user", content="<|im_end|>x")])
    return len(content)


def jinja(draw: random.Random, _: Path) -> int:
    source = "".join(draw.choice(JINJA) for _ in range(draw.choice((1, 3, 8))))
    values = {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": True}
    with contextlib.suppress(TemplateFault):
        if CANARY in (rendered := Templates({"x": source}, chat=draw.random() < 0.5).render("x", values)):
            raise PermissionError(rendered[:200])
    return len(source)


def programs(draw: random.Random, _: Path) -> int:
    rules = " ".join(draw.choice(RULES) for _ in range(draw.choice((1, 2, 4))))
    with contextlib.suppress(Unproved):
        prove_rules(BASE, rules, 2, seconds=2, mebibytes=256)
    return len(rules)


KINDS: dict[str, Callable[[random.Random, Path], int]] = {
    "replies": replies,
    "question files": question_files,
    "answers": answers,
    "variants": variants,
    "model folders": model_folders,
    "templates": jinja,
    "programs": programs,
}
ROUND = {
    "replies": 20,
    "question files": 10,
    "answers": 5,
    "variants": 2,
    "model folders": 1,
    "templates": 5,
    "programs": 1,
}
"""Cases of each kind in a round: what is quick is tried more often."""


def _question() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "q.jsonl")
        path.write_text(json.dumps(PROBLEM), encoding="utf-8")
        return read_problems(path, "en", labelled=True)[0].questions[0]


QUESTION = _question()


def cases(minutes: float, seed: int) -> Iterator[tuple[str, int]]:
    """Kinds in turn with a seed each, until the time is up."""
    end = time.monotonic() + 60 * minutes
    number = seed
    while time.monotonic() < end:
        for kind, count in ROUND.items():
            for _ in range(count):
                yield kind, number
                number += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS, help="one kind")
    settings = parser.parse_args()
    os.environ["FUZZ_API_KEY"] = CANARY
    templates.SECONDS = 1.0
    counts: Counter[tuple[str, str]] = Counter()
    for kind, seed in cases(settings.minutes, settings.seed):
        if settings.only not in (None, kind):
            continue
        counts[kind, "tried"] += 1
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            try:
                size = KINDS[kind](random.Random(seed), Path(folder))
            except PermissionError:
                counts[kind, "escapes"] += 1
                print(f"escape: {kind}, --seed {seed}", flush=True)
            except Exception:  # noqa: BLE001
                counts[kind, "tracebacks"] += 1
                print(f"traceback: {kind}, --seed {seed}\n{traceback.format_exc(limit=-6)}", flush=True)
            else:
                is_text = kind != "model folders"  # whose tokenizer takes a second to load, whatever is in it
                if is_text and time.process_time() - start > MAX_SECONDS * max(1.0, size / 100_000):
                    counts[kind, "slow"] += 1
                    print(f"slow: {kind}, --seed {seed}", flush=True)
    columns = ("tried", "tracebacks", "slow", "escapes")
    print(f"{'':16}" + "".join(f"{name:>12}" for name in columns))
    for kind in KINDS:
        print(f"{kind:16}" + "".join(f"{counts[kind, name]:12,}" for name in columns))
    return int(any(counts[kind, name] for kind in KINDS for name in columns[1:]))


if __name__ == "__main__":
    sys.exit(main())
