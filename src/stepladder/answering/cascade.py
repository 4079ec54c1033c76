"""The rungs of a run: who is asked what, in which order, and which chains count. Used by ``samples`` and ``plan``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from stepladder.answering.client import Billing, ModelClient
from stepladder.ask.request import Request
from stepladder.config import Rung
from stepladder.context import Context
from stepladder.mcq.answer import leading
from stepladder.mcq.chains import most_different
from stepladder.mcq.prompts import ask_messages, worked_solution
from stepladder.mcq.shuffle import Permutation, fixed, orders
from stepladder.mcq.verify import judge
from stepladder.records import Question, Sample
from stepladder.workspace import digest

WORKED = "worked"
"""The model name of worked solutions."""


class Usage(NamedTuple):
    """What one model was asked on a rung, whether it was asked now or stood in the ledger."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    """How long that took now."""


class Step(NamedTuple):
    """What one rung came to."""

    rung: Rung
    reached: int
    """Questions that it was asked about."""
    samples: list[Sample]
    accepted: list[Sample]
    usage: dict[str, Usage]

    @property
    def solved(self) -> set[str]:
        """Ids of the questions that left the ladder here."""
        return {sample.question_id for sample in self.accepted}


class Cascade:
    """The rungs of a run, ready to be climbed as often as one likes; weights are loaded once each time."""

    def __init__(self, context: Context) -> None:
        self._seed = context.config.seed
        self._prompts = context.config.prompts
        self._rungs = [
            (rung, [(name, ModelClient(context, name, _account(rung))) for name in rung.models])
            for rung in context.config.rung
        ]

    def climb(self, questions: Sequence[Question]) -> Iterator[Step]:
        """Ask each rung about the questions that no rung before it solved."""
        unsolved = list(questions)
        for rung, clients in self._rungs:
            judged = OFFERS[rung.kind](rung, unsolved, self._seed) if rung.kind in OFFERS else []
            usage = {}
            for name, client in clients:
                with client:
                    samples, usage[name] = self._ask(rung, name, client, unsolved)
                judged += samples
            step = Step(rung, len(unsolved), judged, accepted_of(rung, judged), usage)
            yield step
            solved = step.solved
            unsolved = [question for question in unsolved if question.id not in solved]

    def _ask(
        self, rung: Rung, model: str, client: ModelClient, questions: Sequence[Question]
    ) -> tuple[list[Sample], Usage]:
        """Ask one model of a rung. Where all answers must be right they are asked one after the other, and only while
        all before were, since one wrong answer already keeps the question on the ladder; a majority is asked for at
        once."""
        rounds = [[index] for index in range(rung.answers)] if rung.accept == "all" else [list(range(rung.answers))]
        samples: list[Sample] = []
        usage, start = Usage(), time.monotonic()
        hopeful = {question.id: question for question in questions}
        for indices in rounds:
            round_ = [
                (question, order, request)
                for question in hopeful.values()
                for index in indices
                for order, request in self._request(rung, client.identity, question, index)
            ]
            progress = f"{indices[0] + 1} of {rung.answers}" if len(indices) == 1 else f"{len(indices)} each"
            answers = client.ask([request for _, _, request in round_], f"{model}, {progress}")
            usage = Usage(
                usage.calls + len(round_),
                usage.prompt_tokens + sum(answers[request.key].prompt_tokens for _, _, request in round_),
                usage.completion_tokens + sum(answers[request.key].completion_tokens for _, _, request in round_),
            )
            for question, order, request in round_:
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
        return samples, usage._replace(seconds=time.monotonic() - start)

    def _request(
        self, rung: Rung, identity: str, question: Question, index: int
    ) -> Iterator[tuple[Permutation, Request]]:
        """The answer with this index, unless it would be word for word one before it."""
        drawn = _orders(rung.orders, question, self._seed, rung)
        place = index % rung.orders
        order = drawn[place]
        if rung.temperature > 0 or order not in drawn[:place]:
            yield (
                order,
                Request(
                    model=identity,
                    messages=ask_messages(question, order, self._prompts),
                    temperature=rung.temperature,
                    sample_index=index,
                    max_tokens=rung.max_tokens,
                ),
            )


def _account(rung: Rung) -> Billing:
    return Billing(rung.name, rung.dollars, rung.batch)


def accepted_of(rung: Rung, judged: list[Sample]) -> list[Sample]:
    """The chains of a rung that count, by its rule. With ``trust_majority`` one that contradicts the label may."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in judged:
        groups.setdefault((sample.model, sample.question_id), []).append(sample)
    counted: dict[str, list[Sample]] = {}
    for (_, question), group in groups.items():
        right = [sample for sample in group if sample.verdict == "accepted"]
        if rung.accept == "all":
            chosen = right if len(right) == len(group) else []
        else:
            leader = leading(sample.answer for sample in group)
            voted = [sample for sample in group if leader is not None and sample.answer == leader]
            chosen = voted if rung.trust_majority else [sample for sample in voted if sample.verdict == "accepted"]
        counted.setdefault(question, []).extend(chosen)
    if rung.keep is None:
        return [sample for chains in counted.values() for sample in chains]
    return [
        chains[index] for chains in counted.values() for index in most_different([s.text for s in chains], rung.keep)
    ]


def worked(rung: Rung, questions: Sequence[Question], seed: int) -> list[Sample]:
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


OFFERS: dict[str, Callable[[Rung, Sequence[Question], int], list[Sample]]] = {"worked": worked}
"""What rungs offer that ask no model, by their kind."""


def _orders(count: int, question: Question, seed: int, rung: Rung) -> list[Permutation]:
    size = len(question.options)
    if not rung.shuffle:
        return [tuple(range(size))]
    return orders(count, size, seed, question.id, rung.name, places=fixed(question).places)
