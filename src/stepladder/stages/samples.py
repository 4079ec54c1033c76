"""samples: the cascade. Each rung answers what is still unsolved; accepted chains and rejected ones are both kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepladder import records
from stepladder.ask.request import Request
from stepladder.config import Config, Rung, settings
from stepladder.mcq.answer import leading
from stepladder.mcq.labels import weigh
from stepladder.mcq.position import position_bias
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
    accepted: list[Sample] = []
    rows = []
    for rung in context.config.rung:
        judged = worked(rung, unsolved, context.config.seed) if rung.kind == "worked" else []
        for model in rung.models:
            judged += climb(context, rung, model, unsolved)
        kept = accepted_of(rung, judged)
        samples += judged
        accepted += kept
        solved = {sample.question_id for sample in kept}
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
    suspects = suspect_labels(questions, samples)
    if suspects:
        place = context.input("samples") / "audit.jsonl"
        context.progress.say(f"{len(suspects)} labels that models contradict train nobody: {place}")
    trusted = {rung.name for rung in context.config.rung if rung.trust_majority}
    doubted = {suspect["id"] for suspect in suspects}
    accepted = [sample for sample in accepted if sample.rung in trusted or sample.question_id not in doubted]
    names = {_name(sample) for sample in accepted}
    rejected = [sample for sample in samples if _name(sample) not in names]
    for file, chosen in (("accepted", accepted), ("rejected", rejected)):
        chosen.sort(key=_name)
        write_atomic(folder / f"{file}.jsonl", records.lines(chosen))
    write_atomic(folder / "audit.jsonl", (json.dumps(row, ensure_ascii=False) + "\n" for row in suspects))
    asked = position_bias((s for s in samples if s.model != WORKED), {question.id: question for question in questions})
    summary = {
        "rungs": rows,
        "questions": len(questions),
        "unsolved": len(unsolved),
        "suspect": len(suspects),
        "positions": [bias._asdict() for bias in asked],
    }
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def _name(sample: Sample) -> tuple[str, str, str, int]:
    return sample.question_id, sample.rung, sample.model, sample.sample_index


def climb(context: Context, rung: Rung, model: str, questions: list[Question]) -> list[Sample]:
    """Ask one model of a rung. Where all answers must be right they are asked one after the other, and only while all
    before were, since one wrong answer already keeps the question on the ladder; a majority is asked for at once."""
    respondent = Respondent(context, model, rung)
    rounds = [[at] for at in range(rung.answers)] if rung.accept == "all" else [list(range(rung.answers))]
    samples: list[Sample] = []
    hopeful = {question.id: question for question in questions}
    for indices in rounds:
        asked = [
            (question, order, request)
            for question in hopeful.values()
            for index in indices
            for order, request in _request(rung, respondent.identity, context.config.seed, question, index)
        ]
        told = f"{indices[0] + 1} of {rung.answers}" if len(indices) == 1 else f"{len(indices)} each"
        answers = respondent.ask([request for _, _, request in asked], f"{model}, {told}")
        for question, order, request in asked:
            answer = answers[request.key]
            letter, verdict = judge(question, order, answer.text, finished=answer.finished)
            samples.append(
                Sample(
                    question_id=question.id,
                    rung=rung.name,
                    model=model,
                    sample_index=request.sample_index,
                    permutation=order,
                    key=request.key,
                    text=answer.text,
                    answer=letter,
                    verdict=verdict,
                    micro_dollars=answer.micro_dollars,
                )
            )
            if verdict != "accepted":
                hopeful.pop(question.id, None)
    return samples


def _request(
    rung: Rung, identity: str, seed: int, question: Question, index: int
) -> Iterator[tuple[Permutation, Request]]:
    """The answer with this index, unless it would be word for word one before it."""
    drawn = _orders(rung.orders, question, seed, rung)
    place = index % rung.orders
    order = drawn[place]
    if rung.temperature > 0 or order not in drawn[:place]:
        yield (
            order,
            Request(
                model=identity,
                messages=ask_messages(question, order),
                temperature=rung.temperature,
                sample_index=index,
                max_tokens=rung.max_tokens,
            ),
        )


def accepted_of(rung: Rung, judged: list[Sample]) -> list[Sample]:
    """The chains of a rung that count, by its rule. With ``trust_majority`` one that contradicts the label may."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in judged:
        groups.setdefault((sample.model, sample.question_id), []).append(sample)
    kept: list[Sample] = []
    for group in groups.values():
        right = [sample for sample in group if sample.verdict == "accepted"]
        if rung.accept == "all":
            kept += right if len(right) == len(group) else []
        else:
            leader = leading(sample.answer for sample in group)
            voted = [sample for sample in group if leader is not None and sample.answer == leader]
            kept += voted if rung.trust_majority else [sample for sample in voted if sample.verdict == "accepted"]
    return kept


def suspect_labels(questions: list[Question], samples: list[Sample]) -> list[dict[str, Any]]:
    """Labels that at least two models contradict with the same letter and that the evidence speaks against
    (mcq/labels.py), the most suspect first, with the chains on either side. Confirmed labels and worked solutions
    speak for themselves."""
    votes: dict[str, dict[str, list[str | None]]] = {}
    proved = {sample.question_id for sample in samples if sample.model == WORKED and sample.verdict == "accepted"}
    for sample in samples:
        votes.setdefault(sample.question_id, {}).setdefault(sample.model, []).append(sample.answer)
    asked = {question.id: question for question in questions}
    labels = {key: str(question.answer) for key, question in asked.items() if key in votes}
    rows = []
    for suspect in weigh(votes, labels).suspects:
        against = [s for s in samples if s.question_id == suspect.id and s.answer == suspect.suggested]
        certain = asked[suspect.id].reviewed or suspect.id in proved
        same = {s.verdict for s in against} == {"accepted"}  # two options of the same text
        if suspect.score > 0 and len({s.model for s in against}) > 1 and not certain and not same:
            chains = [s for s in samples if s.question_id == suspect.id and s.answer == suspect.label]
            sides = {"for": chains, "against": against}
            found = {side: [{"model": s.model, "text": s.text} for s in some] for side, some in sides.items()}
            rows.append({**suspect._asdict(), **found})
    return rows


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
