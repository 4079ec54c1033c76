"""What a student learns from the same answers in equal minutes: each switch alone, all of them, a plain loop.

    python benchmarks/learning.py CONTEST BASE OUT [--minutes 20] [--rows NAME ...] [--seeds 0] [--test]
                                  [--plain SCRIPT] [--most N] [--only-loss] [--in-4-bits]
    python benchmarks/learning.py worlds bundled OUT --minutes 5 --rows loop demo orders-2
    python benchmarks/learning.py worlds bundled OUT --steps 283 --rows neftune smoothing

CONTEST holds the contest's train.jsonl and recorded_responses.jsonl (no part of the project), BASE is the folder of a
small chat model, such as Qwen2.5-Coder-0.5B-Instruct. The 389 problems are split once, by a fixed seed, into 250 to
learn from and 139 for the test; near-duplicates of test problems are removed from the 250, and 50 problems of the 250
are set aside for choices. The recorded right answers are the teachers'. With "worlds" the demo's 144 generated problems
are learned from their worked solutions, and 100 and 2,000 fresh ones are for choices and the test.

A row's steps are counted so that they take the given minutes, from the speed of its own first steps; the time is that
of its steps, start-up and answers apart. Rows whose steps take equally long may be given so many steps instead. Each
row is kept under OUT and trained once; begun again, the script goes on.
Answers are greedy, at most 400 tokens (96 for worlds): "strict" are those right as they ended, "forced" those right
when an answer without a letter is made to name one, "cut" those that ran into the cap, "debris" those that begin with a
role or hold a tag. "loss" is that of right chains of questions for choices, in nats per token: it tells settings apart
long before letters do, but only among rows that learn such chains. Differences are against the plain loop (--plain, a
script of the usage ``TRAIN RESPONSES BASE OUT --minutes M --seed S``, whose prompt is its PROMPT) or the row "loop",
which has the plain loop's settings, with the exact McNemar test, and an interval that resamples problems. Choices look
at the questions for choices (the default), the table at the test (--test); OUT/looked counts how often that was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from fields import Field, Row, contest, examples, member, worlds

from stepladder import models
from stepladder.answering.cascade import judge
from stepladder.answering.voting import letter_logprobs, letter_request
from stepladder.ask.local import Local
from stepladder.ask.request import Request, Response
from stepladder.config import Quantise, Train
from stepladder.mcq.answer import strict
from stepladder.mcq.cleaning import clean
from stepladder.mcq.position import commonest_letters, unread_accuracy
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.shuffle import Permutation, orders, rng
from stepladder.quantising import gptq
from stepladder.records import LETTERS, Example, Message, Question, Sample
from stepladder.stages.trainset import draw_problems
from stepladder.stats import gain_interval, mcnemar
from stepladder.training import loss as training_loss
from stepladder.training import merging, trl
from stepladder.training.data import Data
from stepladder.training.loss import score_completions, validation_loss
from stepladder.training.sequences import pack, singly, tokenise
from stepladder.training.sharding import student
from stepladder.workspace import write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from replay_server import ANSWERS, QUESTIONS

WORLDS = "worlds"
NEVER = 10**6
"""Steps between checkpoints."""
OWN_ORDERS = 3
LOOP = "loop"
"""The row of worlds that others are held against."""


def train(
    field: Field, row: Row, base: Path, minutes: float, seed: int, folder: Path, steps: int | None = None
) -> dict[str, Any]:
    """Train in so many minutes, answers in rounds included, or, without rounds, for so many steps; returns what it
    took."""
    known = draw_problems(member(row, seed), sorted({question.problem_id for question in field.train.values()}))
    others = [question for question in field.train.values() if question.problem_id not in known]
    taught = [sample for sample in field.taught if field.train[sample.question_id].problem_id in known]
    left, weights, own = minutes, base, list[Sample]()
    for number in range(row.rounds + 1):
        if number:
            begun = time.monotonic()
            own = own_chains(weights, others, field.max_tokens, seed)
            left -= (time.monotonic() - begun) / 60
            if left <= 0:
                sys.exit(f"{folder.name}: the answers of round {number} took longer than all its minutes; give it more")
        part = folder if number == row.rounds else folder / f"round-{number}"
        learned = examples(row, [*taught, *own], field.train, base, seed)
        took = fit(field, row, weights, learned, left / (row.rounds + 1 - number), seed, part, steps)
        left, weights = left - took["minutes"], part / "merged"
        print(f"  round {number}: {len(own)} own chains, {took}", flush=True)
    return took | {"own chains": len(own), "minutes": round(minutes - left, 1)}


def own_chains(weights: Path, questions: Sequence[Question], cap: int, seed: int) -> list[Sample]:
    """The student's answers to questions that it gets right in every one of :data:`OWN_ORDERS` orders of options."""
    drawn = {q.id: [*dict.fromkeys(orders(OWN_ORDERS, len(q.options), seed, q.id))] for q in questions}
    requests = {
        f"{q.id} {index}": Request(model="student", messages=ask_messages(q, order), max_tokens=cap, final=True)
        for q in questions
        for index, order in enumerate(drawn[q.id])
    }
    responses = answered(Local.load(weights), requests)
    own: list[Sample] = []
    for q in questions:
        samples = [own_sample(q, index, order, responses[f"{q.id} {index}"]) for index, order in enumerate(drawn[q.id])]
        if all(sample.verdict == "accepted" for sample in samples):
            own += samples
    return own


def own_sample(question: Question, index: int, order: Permutation, response: Response) -> Sample:
    """A student's answer, judged."""
    letter, verdict = judge(question, order, response.text, finished=response.finish == "stop")
    return Sample(
        question_id=question.id, rung="own", model="student", sample_index=index, permutation=order,
        key=f"own/{question.id}/{index}", text=response.text, answer=letter, verdict=verdict,
    )  # fmt: skip


def fit(
    field: Field,
    row: Row,
    base: Path,
    learned: list[Example],
    minutes: float,
    seed: int,
    folder: Path,
    steps: int | None,
) -> dict[str, Any]:
    """Train on conversations for so many minutes of steps, or so many steps, and merge; returns what it took."""
    settings = Train.model_validate({**field.settings, **row.train, "save_steps": NEVER})
    rows = tokenise(models.load_tokenizer(base), learned, settings.max_length)
    packs = pack(rows, settings.max_length) if settings.packing else singly(rows)
    packs_a_step = settings.batch_size * settings.gradient_accumulation
    a_step, few = packs_a_step / len(packs), max(3, math.ceil(field.speed_packs / packs_a_step))
    if steps is None:
        first = settings.model_copy(update={"epochs": few * a_step})
        times = _steps(row, first, seed, base, learned, folder / "speed")
        steps = round(60 * minutes * (len(times) - 1) / (times[-1] - times[0]))
    epochs = steps * a_step
    times = _steps(row, settings.model_copy(update={"epochs": epochs}), seed, base, learned, folder)
    (folder / "merged").mkdir()
    merging.merge(base, folder / "adapter", folder / "merged")
    took = (times[-1] - times[0]) * len(times) / (len(times) - 1)
    return {
        "chains": len(rows), "tokens an epoch": sum(len(pack_.input_ids) for pack_ in packs),
        "epochs": round(epochs, 2), "steps": len(times), "minutes": round(took / 60, 1),
    }  # fmt: skip


def _steps(row: Row, settings: Train, seed: int, base: Path, learned: list[Example], folder: Path) -> list[float]:
    """Train into a folder; returns when each step ended, seconds."""
    for name in ("adapter", "scratch"):
        (folder / name).mkdir(parents=True)
    times: list[float] = []

    def report(step: int, total: int, note: str, _: float | None) -> None:
        times.append(time.monotonic())
        if step % 10 == 0:
            print(f"  step {step} of {total}, {note}, {times[-1] - times[0]:.0f} s", flush=True)

    token_loss = LOSSES.get(row.loss, training_loss.token_loss)
    with (
        patch.object(training_loss, "token_loss", token_loss),
        patch.object(trl, "student", lambda *words: noisy(student(*words), row.noise)),
    ):
        trl.train(settings, seed, base, Data(learned), folder / "adapter", folder / "scratch", report)
    return times


def _dft(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy weighed by the token's own probability (dynamic fine-tuning, arXiv 2508.05629)."""
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return ((-losses).exp().detach() * losses).sum()


LOSSES = {
    "dft": _dft,
    "smoothing": partial(torch.nn.functional.cross_entropy, reduction="sum", label_smoothing=0.1),
}


def noisy(model: PreTrainedModel, alpha: float) -> PreTrainedModel:
    """Add NEFTune's noise to the embeddings whenever the model is trained."""

    def add(module: torch.nn.Module, _: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training or not alpha:
            return embedded
        size = alpha / math.sqrt(embedded.shape[1] * embedded.shape[2])
        return embedded + torch.empty_like(embedded).uniform_(-size, size)

    model.get_input_embeddings().register_forward_hook(add)
    return model


def loss(weights: Path, held_out: Sequence[Example], longest: int) -> float:
    """The mean loss of a model on chains it did not learn, in nats per token."""
    rows = tokenise(models.load_tokenizer(weights), held_out, longest)
    model = models.load(weights)
    score_completions(model)
    return validation_loss(model, pack(rows, longest), batch_size=2)


Prompt = Callable[[Question], tuple[Message, ...]]


def answer(weights: Path, questions: Sequence[Question], prompt: Prompt, cap: int) -> dict[str, Any]:
    """What a model answers: letters, forced letters, which answers were cut, and which have debris."""
    engine = Local.load(weights)
    requests = {q.id: Request(model="student", messages=prompt(q), max_tokens=cap, final=True) for q in questions}
    answers = answered(engine, requests)
    result: dict[str, Any] = {"strict": {}, "forced": {}, "cut": [], "debris": [], "texts": {}}
    begun: dict[str, Request] = {}
    for question in questions:
        response, options = answers[question.id], question.options
        letter = strict(response.text, options).letter
        result["strict"][question.id] = result["forced"][question.id] = letter
        result["texts"][question.id] = response.text
        result["cut"] += [question.id] * (response.finish == "length")
        if clean(f"{response.text}\n答案是：A", options, question.language).forms:
            result["debris"].append(question.id)
        if letter is None:
            again = letter_request(question, tuple(range(len(options))), response.text, "student")
            messages = (*prompt(question), again.messages[-1])
            begun[question.id] = again.model_copy(update={"messages": messages})
    counts = {question.id: len(question.options) for question in questions}
    for name, token in answered(engine, begun).items():
        logprobs = letter_logprobs(token, counts[name])
        result["forced"][name] = max(logprobs, key=lambda letter: logprobs[letter], default=LETTERS[0])
    return result


def answered(engine: Local, requests: Mapping[str, Request]) -> dict[str, Response]:
    """Responses in batches, by the requests' names."""
    by_key: dict[str, Response] = {}
    for group in engine.plan([*requests.values()]):
        by_key |= {request.key: response for request, response in zip(group, engine.answer(group), strict=True)}
        print(f"  {len(by_key)} of {len(requests)} answered", flush=True)
    return {name: by_key[request.key] for name, request in requests.items()}


def own_prompt(question: Question) -> tuple[Message, ...]:
    """The package's prompt, the options in their own order."""
    return ask_messages(question, tuple(range(len(question.options))))


def plain_prompt(script: Path) -> Prompt:
    """The plain loop's prompt."""
    spec = importlib.util.spec_from_file_location("plain", script)
    assert spec is not None  # noqa: S101 (a path to a file)
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def prompt(question: Question) -> tuple[Message, ...]:
        options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=False))
        text = module.PROMPT.format(p=question.problem, q=question.question, o=options)
        return (Message(role="user", content=text),)

    return prompt


def plain_loop(arguments: argparse.Namespace, field: Field, seed: int, folder: Path) -> dict[str, Any]:
    """Train the plain loop on the problems that the rows learn from."""
    folder.mkdir(parents=True)
    known = {name.rpartition("#")[0] for name in field.train}
    lines = (arguments.contest / QUESTIONS).read_text(encoding="utf-8").splitlines(keepends=True)
    write_atomic(folder / "train.jsonl", "".join(line for line in lines if json.loads(line)["id"] in known))
    words = [folder / "train.jsonl", arguments.contest / ANSWERS, arguments.base, folder / "merged"]
    begun = time.monotonic()
    subprocess.run(
        [sys.executable, arguments.plain, *words, "--minutes", str(arguments.minutes), "--seed", str(seed)], check=True
    )
    return {"minutes": round((time.monotonic() - begun) / 60, 1)}


def table(results: dict[str, dict[str, Any]], questions: Sequence[Question]) -> None:
    """Print a line for every row."""

    def right(name: str, kind: str) -> list[bool]:
        return right_of(results[name], kind, questions)

    problems = {question.problem_id for question in questions}
    print(f"\n{len(questions)} questions about {len(problems)} problems, %, and points against the plain loop")
    print("| row | minutes | steps | chains | loss | strict | forced | cut | debris | strict against plain |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---|")
    for name, result in results.items():
        took = result["took"]
        cells = [name, took["minutes"], took.get("steps", ""), took.get("chains", "")]
        cells.append(f"{result['loss']:.4f}" if "loss" in result else "")
        against = ""
        if "answers" in result:
            share = {kind: 100 * float(np.mean(right(name, kind))) for kind in ("strict", "forced")}
            rest = {kind: 100 * len(result["answers"][kind]) / len(questions) for kind in ("cut", "debris")}
            cells += [f"{value:.1f}" for value in (*share.values(), *rest.values())]
            seed = name.rpartition("-")[2]
            plain = f"{LOOP}-{seed}" if f"{LOOP}-{seed}" in results else f"plain-{seed}"
            if "answers" in results.get(plain, {}) and name != plain:
                against = difference(right(plain, "strict"), right(name, "strict"), questions)
        else:
            cells += [""] * 4
        print(f"| {' | '.join(map(str, cells))} | {against} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contest", type=Path)
    parser.add_argument("base")
    parser.add_argument("out", type=lambda text: Path(text).resolve())
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--steps", type=int, help="optimiser steps, instead of minutes")
    parser.add_argument("--rows", nargs="*", help="by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--plain", type=lambda text: Path(text).resolve(), help="the plain loop's script")
    parser.add_argument("--test", action="store_true", help="answer the test instead of the questions for choices")
    parser.add_argument("--only-loss", action="store_true", help="no answers")
    parser.add_argument("--most", type=int, help="questions to answer, the first ones; by default all")
    parser.add_argument("--in-4-bits", action="store_true", help="ask the rows' weights in 4 bits as well")
    arguments = parser.parse_args()
    arguments.base = models.locate(arguments.base)
    is_worlds = str(arguments.contest) == WORLDS
    field = worlds(arguments.base, tested=arguments.test) if is_worlds else contest(arguments.contest, arguments.base)
    names = arguments.rows or [*field.rows]
    if unknown := [name for name in names if name not in field.rows]:
        parser.error(f"no row {unknown[0]}; there are {', '.join(field.rows)}")
    questions = (field.test if arguments.test else field.choice)[: arguments.most]
    if arguments.test:
        count_look(arguments.out)
    results: dict[str, dict[str, Any]] = {}
    lossy: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        for name in [*(["plain"] if arguments.plain else []), *names]:
            length = f"{arguments.minutes:g}" if arguments.steps is None else f"{arguments.steps}-steps"
            folder = arguments.out / f"{name}-{length}-{seed}"
            print(f"== {folder.name}", flush=True)
            if not (folder / "took.json").exists():
                if folder.exists():
                    sys.exit(f"{folder} was not finished; remove it")
                if name == "plain":
                    took = plain_loop(arguments, field, seed, folder)
                else:
                    row = field.rows[name]
                    took = train(field, row, arguments.base, arguments.minutes, seed, folder, arguments.steps)
                write_atomic(folder / "took.json", json.dumps(took))
            results[f"{name}-{seed}"] = measured(arguments, folder / "merged", field, questions)
            if arguments.in_4_bits and name != "plain":
                weights = in_4_bits(field, field.rows[name], arguments.base, seed, folder)
                lossy[f"{name}-{seed}"] = measured(arguments, weights, field, questions)
    table(results, questions)
    for name, result in lossy.items():
        print_difference(f"{name} in 4 bits", results[name], result, questions)
    without = unread_accuracy(commonest_letters(field.train.values()), questions)
    print(
        f"\nnaming the letter that is right most often in training, without reading a question: {100 * without:.1f} %"
    )


def measured(
    arguments: argparse.Namespace, weights: Path, field: Field, questions: Sequence[Question]
) -> dict[str, Any]:
    """What a row took, its answers and its loss, from its folder, in which its weights are, where they are there."""
    folder = weights.parent
    result: dict[str, Any] = {"took": json.loads((folder / "took.json").read_text(encoding="utf-8"))}
    is_plain = folder.name.startswith("plain-")
    prompt = plain_prompt(arguments.plain) if is_plain else own_prompt
    which = f"{'test' if arguments.test else 'choice'}-{len(questions)}"
    form = "" if weights.name == "merged" else f"-{weights.name}"

    def once(name: str, measure: Callable[[], Any]) -> Any:
        file = folder / f"{name}{form}.json"
        if not file.exists():
            write_atomic(file, json.dumps(measure(), ensure_ascii=False))
        return json.loads(file.read_text(encoding="utf-8"))

    if not arguments.test and not is_plain:
        result["loss"] = once("loss", lambda: loss(weights, field.held_out, field.settings["max_length"]))
    if not arguments.only_loss:
        result["answers"] = once(f"answers-{which}", lambda: answer(weights, questions, prompt, field.max_tokens))
    return result


def in_4_bits(field: Field, row: Row, base: Path, seed: int, folder: Path) -> Path:
    """A row's weights by GPTQ, calibrated on conversations that it learned from."""
    made, partial = folder / "in-4-bits", folder / "partial"
    if not made.exists():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        learned = examples(row, field.taught, field.train, base, seed)
        rows = tokenise(models.load_tokenizer(base), learned, field.settings["max_length"])
        settings = Quantise()
        drawn = rng("calibration", seed).sample(rows, min(len(rows), settings.samples))
        gptq.quantise(settings, folder / "merged", [row.ids for row in drawn], partial)
        partial.rename(made)
    return made


def print_difference(name: str, before: dict[str, Any], after: dict[str, Any], questions: Sequence[Question]) -> None:
    """Print how many answers of one model another one of the same row has right as well."""
    for kind in ("strict", "forced"):
        old, new = (right_of(result, kind, questions) for result in (before, after))
        print(f"{name}, {kind}: {100 * np.mean(new):.1f} %, {difference(old, new, questions)}")


def right_of(result: dict[str, Any], kind: str, questions: Sequence[Question]) -> list[bool]:
    """Which questions a model has right, ``strict`` or ``forced``."""
    return [result["answers"][kind][question.id] == question.answer for question in questions]


def difference(before: list[bool], after: list[bool], questions: Sequence[Question]) -> str:
    """Points between two models' right answers, with an interval that resamples problems and the exact McNemar test."""
    gain, p = 100 * float(np.mean(after) - np.mean(before)), mcnemar(before, after).p
    problems = [question.problem_id for question in questions]
    low, high = (100 * limit for limit in gain_interval(before, after, problems, seed=0))
    return f"{gain:+.1f} ({low:+.1f} to {high:+.1f}), p = {p:.2g}"


def count_look(out: Path) -> None:
    """Count a look at the test's problems."""
    out.mkdir(parents=True, exist_ok=True)
    looked = out / "looked"
    count = int(looked.read_text(encoding="utf-8")) if looked.exists() else 0
    write_atomic(looked, f"{count + 1}\n")


if __name__ == "__main__":
    main()
