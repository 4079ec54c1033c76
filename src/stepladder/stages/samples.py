"""samples: the cascade. Each rung answers what is still unsolved; accepted chains and rejected ones are both kept."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from stepladder import records
from stepladder.ask.request import Request
from stepladder.config import Config, Rung, settings
from stepladder.mcq.prompts import ask_messages, worked_solution
from stepladder.mcq.shuffle import Permutation, fixed, orders
from stepladder.mcq.verify import judge
from stepladder.records import Question, Sample
from stepladder.stages.asking import Respondent, identity
from stepladder.stages.flow import Context, digest_of
from stepladder.workspace import Artifact, digest, write_atomic

WORKED = "worked"
"""The model name of worked solutions."""


def parts(config: Config) -> tuple[str | None, ...]:
    return (None,)


def artifact(context: Context, part: str | None) -> Artifact:
    config = context.config
    asked = sorted({model for rung in config.rung for model in rung.models})
    inputs = {"questions": digest_of(context, "questions")}
    inputs |= {f"model {name}": identity(config, name) for name in asked}
    rungs = {"seed": config.seed, "rungs": [settings(rung) for rung in config.rung]}
    return Artifact(context.workspace.path("samples"), rungs, inputs)


def build(context: Context, part: str | None, folder: Path) -> None:
    questions = records.read(context.input("questions") / "train.jsonl", Question)
    unsolved = sorted(questions, key=lambda question: question.id)
    samples: list[Sample] = []
    rows = []
    for rung in context.config.rung:
        judged = worked(rung, unsolved, context.config.seed) if rung.kind == "worked" else []
        for model in rung.models:
            judged += climb(context, rung, model, unsolved)
        samples += judged
        solved = {sample.question_id for sample in _fully_accepted(judged)}
        verdicts = Counter(sample.verdict for sample in judged)
        rows.append(
            {
                "name": rung.name,
                "kind": rung.kind,
                "asked": len(unsolved),
                "solved": len(solved),
                "wrong": verdicts["wrong"],
                "unparsed": verdicts["unparsed"],
                "truncated": verdicts["truncated"],
            }
        )
        context.progress.say(f"rung {rung.name}: {len(solved)} of {len(unsolved)} questions solved")
        unsolved = [question for question in unsolved if question.id not in solved]
    samples.sort(key=lambda sample: (sample.question_id, sample.rung, sample.model, sample.sample_index))
    accepted = {(s.rung, s.model, s.question_id) for s in _fully_accepted(samples)}
    keep = [(s.rung, s.model, s.question_id) in accepted for s in samples]
    write_atomic(folder / "accepted.jsonl", records.lines(s for s, ok in zip(samples, keep, strict=True) if ok))
    write_atomic(folder / "rejected.jsonl", records.lines(s for s, ok in zip(samples, keep, strict=True) if not ok))
    summary = {"rungs": rows, "questions": len(questions), "unsolved": len(unsolved)}
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def climb(context: Context, rung: Rung, model: str, questions: list[Question]) -> list[Sample]:
    """Ask one model of a rung, one option order after the other; an order is only asked where all before it were
    right, since one wrong answer already keeps the question on the ladder."""
    name = identity(context.config, model)
    respondent = Respondent(context, model, rung)
    samples: list[Sample] = []
    hopeful = questions
    for index in range(rung.orders):
        asked: list[tuple[Question, Permutation, Request]] = []
        passed: list[Question] = []
        for question in hopeful:
            drawn = _orders(rung.orders, question, context.config.seed, rung)
            order = drawn[index]
            if rung.temperature == 0 and order in drawn[:index]:  # there is no further one: right so far is right
                passed.append(question)
                continue
            request = Request(
                model=name,
                messages=ask_messages(question, order),
                temperature=rung.temperature,
                sample_index=index,
                max_tokens=rung.max_tokens,
            )
            asked.append((question, order, request))
        what = f"{model}, order {index + 1} of {rung.orders}"
        answers = respondent.ask([request for _, _, request in asked], what)
        hopeful = passed
        for question, order, request in asked:
            answer = answers[request.key]
            letter, verdict = judge(question, order, answer.text, finished=answer.finished)
            samples.append(
                Sample(
                    question_id=question.id,
                    rung=rung.name,
                    model=model,
                    sample_index=index,
                    permutation=order,
                    key=request.key,
                    text=answer.text,
                    answer=letter,
                    verdict=verdict,
                    micro_dollars=answer.micro_dollars,
                )
            )
            if verdict == "accepted":
                hopeful.append(question)
    return samples


def worked(rung: Rung, questions: list[Question], seed: int) -> list[Sample]:
    """Offer the worked solutions that came with the questions, each in one shuffled order, judged like any answer."""
    samples = []
    for question in questions:
        order = _orders(1, question, seed, rung)[0]
        text = worked_solution(question, order)
        if text is None:
            continue
        letter, verdict = judge(question, order, text, finished=True)
        samples.append(
            Sample(
                question_id=question.id,
                rung=rung.name,
                model=WORKED,
                sample_index=0,
                permutation=order,
                key=f"worked:{digest([question.id, order, text])}",
                text=text,
                answer=letter,
                verdict=verdict,
            )
        )
    return samples


def _orders(count: int, question: Question, seed: int, rung: Rung) -> list[Permutation]:
    return orders(count, len(question.options), seed, question.id, rung.name, places=fixed(question).places)


def _fully_accepted(samples: list[Sample]) -> list[Sample]:
    """Samples of (rung, model, question) triples that were right in every order asked."""
    failed = {(s.rung, s.model, s.question_id) for s in samples if s.verdict != "accepted"}
    return [s for s in samples if (s.rung, s.model, s.question_id) not in failed]
