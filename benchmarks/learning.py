"""What a student learns from the same recorded answers in equal minutes: each switch alone, all of them, a plain loop.

    python benchmarks/learning.py CONTEST BASE OUT [--minutes 20] [--rows NAME ...] [--seeds 0] [--test]
                                  [--plain SCRIPT] [--most N] [--only-loss]

CONTEST holds the contest's train.jsonl and recorded_responses.jsonl (no part of the project), BASE is the folder of a
small chat model, such as Qwen2.5-Coder-0.5B-Instruct. The 389 problems are split once, by a fixed seed, into 250 to
learn from and 139 for the test; near-duplicates of test problems are removed from the 250, and 50 problems of the 250
are set aside for choices. The recorded right answers are the teachers'. A row's steps are counted so that they take the
given minutes, from the speed of eight steps before the first row; the time is that of its steps, start-up and answers
apart.

Each row is kept under OUT and trained once; begun again, the script goes on. Answers are greedy, at most 400 tokens:
"strict" are those right as they ended, "forced" those right when an answer without a letter is made to name one, "cut"
those that ran into the cap, "debris" those that begin with a role or hold a tag. "loss" is that of the shortest strong
chain for one question of each of 25 of the 50 problems, in nats per token: it tells settings apart long before letters
do, but only among rows that learn such chains. Differences are against the plain loop
(--plain, a script of the usage ``TRAIN RESPONSES BASE OUT --minutes M --seed S``, whose prompt is its PROMPT), with the
exact McNemar test, and an interval that resamples problems. Choices look at the 50 (the default), the table at the 139
(--test); OUT/looked counts how often that was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from stepladder import models
from stepladder.answering.voting import letter_logprobs, letter_request
from stepladder.ask.local import Local
from stepladder.ask.request import Request, Response
from stepladder.config import Member, Train
from stepladder.mcq.answer import strict
from stepladder.mcq.cleaning import clean
from stepladder.mcq.mixture import mixture
from stepladder.mcq.overlap import TWIN_SIMILARITY, near_duplicates, problem_text
from stepladder.mcq.position import commonest_letters, unread_accuracy
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.questionfile import read_problems
from stepladder.models import template
from stepladder.records import LETTERS, Example, Message, Question, Sample
from stepladder.stages.trainset import example_of
from stepladder.stats import gain_interval, mcnemar
from stepladder.training import merging, trl
from stepladder.training.data import Data
from stepladder.training.loss import score_completions, validation_loss
from stepladder.training.sequences import pack, singly, tokenise
from stepladder.workspace import write_atomic

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from recorded import right_answers
from replay_server import ANSWERS, QUESTIONS

SPLIT_SEED, TRAIN_PROBLEMS, CHOICE_PROBLEMS = 20, 250, 50
MAX_TOKENS = 400
LOSS_QUESTIONS = 25
LADDER = (
    ("Meta-Llama-3.1-8B-Instruct", "Qwen2-7B-Instruct"),
    ("Meta-Llama-3.1-70B-Instruct", "Qwen2-72B-Instruct", "DeepSeek-Coder-V2-Instruct"),
    ("Meta-Llama-3.1-405B-Instruct-FP8",),
)
"""The recorded models as rungs, the cheapest first."""
STRONG = ("Qwen2-72B-Instruct", "DeepSeek-Coder-V2-Instruct", "Meta-Llama-3.1-405B-Instruct-FP8")
TRAIN = {
    "lora_rank": 32, "lora_alpha": 64, "learning_rate": 3e-4, "batch_size": 2, "gradient_accumulation": 4,
    "max_length": 768, "schedule": "linear", "warmup": 0.0, "save_steps": 10_000,
}  # fmt: skip
SPEED_STEPS = 8
SPEED_TEST = {"batch_size": 1, "gradient_accumulation": 1, "packing": False, "epochs": 1.0}
"""A training that tells how fast this machine is."""


class Row(NamedTuple):
    """A way to learn."""

    mix: Mapping[str, Any]
    """Keys of ``[[member]]``."""
    train: Mapping[str, Any] = MappingProxyType({})
    """Keys of ``[train]``."""
    teachers: tuple[str, ...] = ()
    """Whose right answers it learns from: by default those of the first rung with one."""
    longest: int | None = None
    """Tokens of the longest chain that is learned."""


SHORT = {"clean": True, "chains": 1, "choose": "shortest"}
SMALL_STEPS = {"batch_size": 1, "gradient_accumulation": 2}
ROWS = {
    "ladder": Row({"clean": False, "chains": 1}),
    "clean": Row({"clean": True, "chains": 1}),
    "shortest": Row(SHORT, teachers=STRONG),
    "orders": Row({"clean": False, "chains": 1, "orders": 3}),
    "small-steps": Row(SHORT, SMALL_STEPS, STRONG),
    "small-steps-1e-3": Row(SHORT, SMALL_STEPS | {"learning_rate": 1e-3}, STRONG),
    "brief": Row(SHORT, SMALL_STEPS, STRONG, longest=128),
    "unpacked": Row({"clean": False, "chains": 1}, {"packing": False}),
    "short-unpacked": Row(SHORT, {"packing": False}, STRONG),
    "all": Row(SHORT | {"orders": 3}, {"packing": False}, STRONG),
    "all-chains-2": Row(SHORT | {"orders": 2, "chains": 2}, {"packing": False}, STRONG),
}


class Field(NamedTuple):
    """The questions of one split of the problems."""

    train: dict[str, Question]
    choice: list[Question]
    test: list[Question]


def split(contest: Path) -> Field:
    """The questions to learn from, to choose on and of the test."""
    problems = read_problems(contest / QUESTIONS, "zh", labelled=True)
    order = random.Random(SPLIT_SEED).sample(range(len(problems)), len(problems))
    learned, test = ([problems[index] for index in part] for part in (order[:TRAIN_PROBLEMS], order[TRAIN_PROBLEMS:]))
    texts = [[problem_text(problem.questions) for problem in part] for part in (learned, test)]
    twins = {left for left, _, _ in near_duplicates(*texts, TWIN_SIMILARITY)}
    kept = [problem for index, problem in enumerate(learned) if index not in twins]
    choice, train = kept[:CHOICE_PROBLEMS], kept[CHOICE_PROBLEMS:]
    flat = [[question for problem in part for question in problem.questions] for part in (train, choice, test)]
    return Field({question.id: question for question in flat[0]}, flat[1], flat[2])


def recorded(contest: Path, questions: dict[str, Question]) -> Iterator[Sample]:
    """The right recorded answers to these questions."""
    for model, index, question, text in right_answers(contest, questions):
        yield Sample(
            question_id=question.id, rung="recorded", model=model, sample_index=index,
            permutation=tuple(range(len(question.options))), key=f"{model}/{question.id}/{index}", text=text,
            answer=question.answer, verdict="accepted",
        )  # fmt: skip


def climbed(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of the first rung that has one, for each question."""
    rung_of = {model: number for number, rung in enumerate(LADDER) for model in rung}
    first: dict[str, int] = {}
    for sample in samples:
        first[sample.question_id] = min(first.get(sample.question_id, len(LADDER)), rung_of[sample.model])
    return [sample for sample in samples if rung_of[sample.model] == first[sample.question_id]]


def examples(row: Row, samples: list[Sample], questions: dict[str, Question], seed: int) -> list[Example]:
    """The conversations of a row."""
    taught = [sample for sample in samples if sample.model in row.teachers] if row.teachers else climbed(samples)
    learned = mixture(Member(name="row", seed=seed, **row.mix), taught, questions)
    return [example_of(questions[sample.question_id], sample) for sample in learned.samples]


def train(row: Row, base: Path, learned: list[Example], minutes: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train for so many minutes of steps and merge; returns what it took."""
    settings, tokenizer = Train.model_validate(TRAIN | dict(row.train)), models.load_tokenizer(base)
    if row.longest is not None:
        learned = [
            example
            for example in learned
            if len(template.conversation_tokens(tokenizer, example.messages)[1]) <= row.longest
        ]
    rows = tokenise(tokenizer, learned, settings.max_length)
    packs = pack(rows, settings.max_length) if settings.packing else singly(rows)
    tokens = sum(len(pack_.input_ids) for pack_ in packs)
    speed = _seconds_a_token(base, learned, folder.parent)
    chosen = settings.model_copy(update={"epochs": 60 * minutes / (speed * tokens)})
    begun: list[float] = []

    def report(step: int, total: int, loss: float) -> None:
        begun.append(time.monotonic())
        if step % 10 == 0:
            print(f"  step {step} of {total}, loss {loss:.3f}, {begun[-1] - begun[0]:.0f} s", flush=True)

    for name in ("adapter", "scratch", "merged"):
        (folder / name).mkdir(parents=True)
    trl.train(chosen, seed, base, Data(learned), folder / "adapter", folder / "scratch", report)
    merging.merge(base, folder / "adapter", folder / "merged")
    seconds = (begun[-1] - begun[0]) * len(begun) / max(1, len(begun) - 1)
    return {
        "chains": len(rows), "tokens an epoch": tokens, "epochs": round(chosen.epochs, 2), "steps": len(begun),
        "minutes": round(seconds / 60, 1),
    }  # fmt: skip


def _seconds_a_token(base: Path, learned: list[Example], out: Path) -> float:
    """Seconds of training a token of a pack takes here, measured once and kept in a folder: that of one row predicts
    the others' within a few percent, and each row's minutes are printed."""
    file = out / "speed.json"
    if not file.exists():
        settings = Train.model_validate(TRAIN | SPEED_TEST)
        folder = out / "speed"
        for name in ("adapter", "scratch"):
            (folder / name).mkdir(parents=True)
        times: list[float] = []
        few = Data(random.Random(0).sample(learned, SPEED_STEPS))
        trl.train(
            settings, 0, base, few, folder / "adapter", folder / "scratch", lambda *_: times.append(time.monotonic())
        )
        lines = (folder / "adapter" / "log.jsonl").read_text(encoding="utf-8").splitlines()
        tokens = [json.loads(line)["tokens"] for line in lines]
        write_atomic(file, json.dumps((times[-1] - times[0]) / (tokens[-1] - tokens[0])))
    return float(json.loads(file.read_text(encoding="utf-8")))


def loss(weights: Path, chosen: list[Example]) -> float:
    """The mean loss of a model on chains it did not learn, in nats per token."""
    rows = tokenise(models.load_tokenizer(weights), chosen, TRAIN["max_length"])
    model = models.load(weights)
    score_completions(model)
    return validation_loss(model, pack(rows, TRAIN["max_length"]), TRAIN["batch_size"])


Prompt = Callable[[Question], tuple[Message, ...]]


def answer(weights: Path, questions: Sequence[Question], prompt: Prompt) -> dict[str, Any]:
    """What a model answers: letters, forced letters, which answers were cut, and which have debris."""
    engine, cap = Local.load(weights), MAX_TOKENS
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


def plain_train(arguments: argparse.Namespace, field: Field, seed: int, folder: Path) -> dict[str, Any]:
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
    problems = [question.problem_id for question in questions]

    def right(name: str, kind: str) -> list[bool]:
        return [results[name]["answers"][kind][question.id] == question.answer for question in questions]

    print(f"\n{len(questions)} questions about {len(set(problems))} problems, %, and points against the plain loop")
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
            if (plain := f"plain-{name.rpartition('-')[2]}") in results and name != plain:
                before, after = right(plain, "strict"), right(name, "strict")
                gain, p = 100 * float(np.mean(after) - np.mean(before)), mcnemar(before, after).p
                low, high = (100 * limit for limit in gain_interval(before, after, problems, seed=0))
                against = f"{gain:+.1f} ({low:+.1f} to {high:+.1f}), p = {p:.2g}"
        else:
            cells += [""] * 4
        print(f"| {' | '.join(map(str, cells))} | {against} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("contest", "base", "out"):
        parser.add_argument(name, type=lambda text: Path(text).resolve())
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--rows", nargs="*", default=[*ROWS], choices=[*ROWS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--plain", type=lambda text: Path(text).resolve(), help="the plain loop's script")
    parser.add_argument("--test", action="store_true", help="answer the 139 problems instead of the 50")
    parser.add_argument("--only-loss", action="store_true", help="no answers")
    parser.add_argument("--most", type=int, help="questions to answer, the first ones; by default all")
    arguments = parser.parse_args()
    field = split(arguments.contest)
    taught = list(recorded(arguments.contest, field.train))
    questions = (field.test if arguments.test else field.choice)[: arguments.most]
    if arguments.test:
        count_look(arguments.out)
    results: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        for name in [*(["plain"] if arguments.plain else []), *arguments.rows]:
            folder = arguments.out / f"{name}-{arguments.minutes:g}-{seed}"
            print(f"== {folder.name}", flush=True)
            if not (folder / "took.json").exists():
                if folder.exists():
                    sys.exit(f"{folder} was not finished; remove it")
                if name == "plain":
                    took = plain_train(arguments, field, seed, folder)
                else:
                    learned = examples(ROWS[name], taught, field.train, seed)
                    took = train(ROWS[name], arguments.base, learned, arguments.minutes, seed, folder)
                write_atomic(folder / "took.json", json.dumps(took))
            results[f"{name}-{seed}"] = measured(arguments, folder, field, questions)
    table(results, questions)
    without = unread_accuracy(commonest_letters(field.train.values()), questions)
    print(
        f"\nnaming the letter that is right most often in training, without reading a question: {100 * without:.1f} %"
    )


def measured(
    arguments: argparse.Namespace, folder: Path, field: Field, questions: Sequence[Question]
) -> dict[str, Any]:
    """What a row took, its answers and its loss, from its folder where they are there."""
    result: dict[str, Any] = {"took": json.loads((folder / "took.json").read_text(encoding="utf-8"))}
    is_plain = folder.name.startswith("plain-")
    prompt = plain_prompt(arguments.plain) if is_plain else own_prompt
    which = f"{'test' if arguments.test else 'choice'}-{len(questions)}"

    def once(name: str, measure: Callable[[], Any]) -> Any:
        file = folder / f"{name}.json"
        if not file.exists():
            write_atomic(file, json.dumps(measure(), ensure_ascii=False))
        return json.loads(file.read_text(encoding="utf-8"))

    if not arguments.test and not is_plain:
        result["loss"] = once("loss", lambda: loss(folder / "merged", held_out(arguments.contest, field)))
    if not arguments.only_loss:
        result["answers"] = once(f"answers-{which}", lambda: answer(folder / "merged", questions, prompt))
    return result


def held_out(contest: Path, field: Field) -> list[Example]:
    """The conversations that the loss is measured on."""
    chosen = {question.problem_id: question for question in reversed(field.choice)}
    by_id = {question.id: question for question in [*chosen.values()][:LOSS_QUESTIONS]}
    return examples(ROWS["shortest"], list(recorded(contest, by_id)), by_id, 0)


def count_look(out: Path) -> None:
    """Count a look at the test's problems."""
    out.mkdir(parents=True, exist_ok=True)
    looked = out / "looked"
    count = int(looked.read_text(encoding="utf-8")) if looked.exists() else 0
    write_atomic(looked, f"{count + 1}\n")


if __name__ == "__main__":
    main()
