"""What is the same bytes, what the same letters, and how far apart the rest is: a table for docs/determinism.md.

    python benchmarks/determinism.py MODEL QUESTIONS [--first 60] [--dtype bfloat16 float32]

MODEL is a folder, such as runs/demo/quantised/full, or 'bundled'; QUESTIONS a file in the contest's form, of which the
first so many are asked, greedily. Every situation is a process of its own, held against one that asks everything at
once. Then an adapter is trained on the worked solutions of a few questions, in as many ways.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stepladder import models
from stepladder.ask.local.engine import Local
from stepladder.ask.request import Request
from stepladder.config import Train
from stepladder.mcq.answer import strict
from stepladder.mcq.prompts import ask_messages, worked_solution
from stepladder.mcq.questionfile import read_problems
from stepladder.records import Example, Message, Question
from stepladder.training import distributed, loss, trl
from stepladder.training.data import Data
from stepladder.training.sequences import singly, tokenise

CAP = 64
"""Tokens of an answer."""
LEVELS = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "SSE4": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
"""What makes libraries choose the kernels of an older CPU."""
OLDER = "AVX2" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "SSE4"


class Situation(NamedTuple):
    """A way to answer the same questions."""

    name: str
    way: str = "at once"
    environment: dict[str, str] | None = None
    moved: bool = False


SITUATIONS = (
    Situation("again, in another process (rerun)"),
    Situation("half of the answers known already (resume)", "every second"),
    Situation("one question at a time (no batch, no shared prefix)", "alone"),
    Situation("seven at a time, at random (other batches, padding, prefixes)", "sevens"),
    Situation("the first eight, weights in another folder (package)", "first eight", None, True),
    Situation("one thread instead of two", "at once", {"OMP_NUM_THREADS": "1"}),
    Situation(f"kernels of a CPU that has only {OLDER}", "at once", LEVELS[OLDER]),
    Situation("transformers' own generate, one at a time", "generate"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("--first", type=int, default=60)
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        job = json.loads(given.child)
        done = losses_apart(job) if "losses" in job else trained(job) if "train" in job else answered(job)
        print(json.dumps(done))
        return
    model = models.locate(given.model)
    job = {"model": str(model), "questions": str(given.questions), "first": given.first}
    whole = {}
    for dtype in given.dtype:
        print(f"\n{dtype}\n")
        whole[dtype] = child(job | {"dtype": dtype, "way": "at once"})
        with tempfile.TemporaryDirectory() as folder:
            for situation in SITUATIONS:
                moved = Path(folder, "moved")
                if situation.moved:
                    shutil.copytree(model, moved)
                where = {"model": str(moved)} if situation.moved else {}
                found = child(job | where | {"dtype": dtype, "way": situation.way}, situation.environment)
                say(situation.name, whole[dtype], found)
            train_all(job | {"dtype": dtype}, Path(folder))
    if len(whole) == 2:
        print()
        say("one format against the other", *whole.values())


def child(job: dict[str, Any], environment: dict[str, str] | None = None, code: int = 0) -> Any:
    """Do a job in a process of its own."""
    command = [sys.executable, __file__, job["model"], job["questions"], "--child", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | (environment or {}))
    if done.returncode != code:
        sys.exit(done.stderr[-2000:])
    return None if code else json.loads(done.stdout.splitlines()[-1])


def say(name: str, whole: dict[str, list[str]], found: dict[str, list[str]]) -> None:
    same = [sum(whole[key][at] == found[key][at] for key in found) for at in (0, 1)]
    print(f"  {name:<66} answers {same[0]:>3} of {len(found)}, letters {same[1]:>3}", flush=True)


def asked(job: dict[str, Any]) -> list[Question]:
    problems = read_problems(Path(job["questions"]), "en", labelled=False)
    return [question for problem in problems for question in problem.questions][: job["first"]]


def answered(job: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    """Text and letter of every answer, by the question's id."""
    questions = asked(job)
    engine = Local.load(Path(job["model"]), job["dtype"])
    requests = {
        question.id: Request(
            model="model", messages=ask_messages(question, tuple(range(len(question.options))), None), max_tokens=CAP
        )
        for question in questions
    }
    names = {
        "every second": [*requests][::2],
        "first eight": [*requests][:8],
        "sevens": random.Random(7).sample([*requests], len(requests)),
    }.get(job["way"], [*requests])
    size = {"alone": 1, "sevens": 7, "generate": 1}.get(job["way"], len(names))
    texts: dict[str, str] = {}
    for at in range(0, len(names), size):
        some = [requests[name] for name in names[at : at + size]]
        if job["way"] == "generate":
            told = {some[0].key: generated(engine, some[0])}
        else:
            told = {
                request.key: response.text
                for group in engine.plan(some)
                for request, response in zip(group, engine.answer(group), strict=True)
            }
        texts |= {name: told[requests[name].key] for name in names[at : at + size]}
    options = {question.id: question.options for question in questions}
    return {name: (text, strict(text, options[name]).letter) for name, text in texts.items()}


def generated(engine: Local, request: Request) -> str:
    ids = torch.tensor([engine._prompt(request).tokens])
    out = engine._model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=CAP, do_sample=False, eos_token_id=[*engine._ends]
    )
    return str(engine._tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def train_all(job: dict[str, Any], folder: Path) -> None:
    """Train in several ways, each held against the first."""

    def run(name: str, code: int = 0, **settings: Any) -> tuple[list[float], str]:
        where = folder / name
        for part in ("adapter", "scratch"):
            (where / part).mkdir(parents=True, exist_ok=True)
        dies = settings.pop("dies", 0)
        child(job | {"train": settings, "where": str(where), "dies": dies}, code=code)
        if code:
            return [], ""
        rows = [json.loads(line) for line in (where / "adapter" / "log.jsonl").read_text().splitlines()]
        weights = (where / "adapter" / "adapter_model.safetensors").read_bytes()
        return [row["loss"] for row in rows if "loss" in row], hashlib.sha256(weights).hexdigest()

    whole = run("whole")
    run("killed", -signal.SIGKILL, dies=3)
    ways = {
        "trained again": run("again"),
        "trained, killed at a step and gone on": run("killed"),
        "trained by two processes instead of one": run("two", devices=2),
    }
    for name, (losses, weights) in ways.items():
        apart = max(abs(a - b) for a, b in zip(whole[0], losses, strict=True))
        same = "same bytes" if weights == whole[1] else f"losses at most {apart:.5f} apart"
        print(f"  {name:<66} {same}", flush=True)
    apart = float(child(job | {"losses": True}))
    print(f"  {'loss of the same examples, four at a time instead of one':<66} {apart:.1g} apart", flush=True)


def losses_apart(job: dict[str, Any]) -> float:
    """How far the mean loss of examples is from itself when they are computed four at a time, with padding."""
    base = models.locate(models.BUNDLED)
    packs = singly(tokenise(models.load_tokenizer(base), examples_of(job), 512))
    model = models.load(base, job["dtype"])
    loss.score_completions(model)
    alone, together = (loss.validation_loss(model, packs, size) for size in (1, 4))
    return abs(alone - together)


def trained(job: dict[str, Any]) -> None:
    """Train an adapter on worked solutions, four a step, which the questions must have."""
    usual = {"batch_size": 1, "gradient_accumulation": 4, "packing": False, "save_steps": 2, "max_length": 512}
    settings = Train.model_validate(
        {"lora_rank": 8, "lora_alpha": 16, "epochs": 1, "learning_rate": 1e-3, "dtype": job["dtype"]}
        | usual | job["train"]
    )  # fmt: skip
    where = Path(job["where"])

    def report(step: int, *_: object) -> None:
        if step == job["dies"]:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = trl.train if settings.devices == 1 else distributed.train
    base = models.locate(models.BUNDLED)
    trainer(settings, 1, base, Data(examples_of(job)), where / "adapter", where / "scratch", report)


def examples_of(job: dict[str, Any]) -> list[Example]:
    return [example for question in asked(job)[:32] if (example := solved(question)) is not None]


def solved(question: Question) -> Example | None:
    order = tuple(range(len(question.options)))
    text = worked_solution(question, order)
    if text is None:
        return None
    messages: Sequence[Message] = (*ask_messages(question, order, None), Message(role="assistant", content=text))
    return Example(messages=tuple(messages), question_id=question.id, teacher="worked")


if __name__ == "__main__":
    main()
