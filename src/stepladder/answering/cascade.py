"""The rungs of a run: which models are asked what, in which order, and which chains count. Used by ``samples`` and
``plan``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from stepladder.answering.client import Billing, ModelClient
from stepladder.ask.request import Request
from stepladder.config import Rung
from stepladder.context import Context
from stepladder.mcq.answer import leading
from stepladder.mcq.chainfile import read_chains
from stepladder.mcq.chains import most_different
from stepladder.mcq.cleaning import clean_sample
from stepladder.mcq.prompts import ask_messages, worked_solution
from stepladder.mcq.reorder import WORKED_KEY_PREFIX
from stepladder.mcq.shuffle import Permutation, fixed, orders
from stepladder.mcq.verify import judge
from stepladder.records import Question, Sample
from stepladder.workspace import digest

WORKED = "worked"
"""The model name of worked solutions."""


class Usage(NamedTuple):
    """What one model was asked on a rung; answers that came from the ledger count too."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    """Wall time; answers from the ledger take next to none."""


class Step(NamedTuple):
    """The result of one rung."""

    rung: Rung
    reached: int
    """Number of questions that came to it unsolved."""
    samples: list[Sample]
    accepted: list[Sample]
    usage: dict[str, Usage]
    flawed: frozenset[str] = frozenset()
    """Keys of answers that it does not accept because of their chains (``clean``)."""
    solved_before: frozenset[str] = frozenset()
    """Ids of the questions that it was asked although rungs before it had solved them (``also_solved``)."""

    @property
    def asked(self) -> int:
        """Number of questions that it was asked."""
        return self.reached + len(self.solved_before)

    @property
    def solved(self) -> set[str]:
        """Ids of the questions that the rung solved, and none before it."""
        return {sample.question_id for sample in self.accepted} - self.solved_before


class Cascade:
    """The rungs of a run. It can be climbed more than once; weights are loaded once each time.

    Raises:
        InputError: a file of chains cannot be read.
    """

    def __init__(self, context: Context) -> None:
        self._seed = context.config.seed
        self._prompts = {name: context.config.prompts_for(name) for name in context.config.models}
        self._rungs = [
            (rung, [(name, ModelClient(context, name, _billing(rung))) for name in rung.models])
            for rung in context.config.rung
        ]
        for rung in context.config.rung:
            if rung.chains is not None:
                read_chains(rung.chains)  # a fault in it is found before anything is bought

    def climb(self, questions: Sequence[Question]) -> Iterator[Step]:
        """Ask each rung the questions that no rung before it solved; one with ``also_solved`` the others too."""
        unsolved, solved = list(questions), set[str]()
        by_id = {question.id: question for question in questions}
        for rung, clients in self._rungs:
            asked = questions if rung.also_solved else unsolved
            judged = MODEL_FREE_KINDS[rung.kind](rung, asked, self._seed) if rung.kind in MODEL_FREE_KINDS else []
            usage = {}
            for name, client in clients:
                with client:
                    samples, usage[name] = self._ask(rung, name, client, asked)
                judged += samples
            before = frozenset(solved) if rung.also_solved else frozenset()
            flawed = frozenset(s.key for s in judged if _is_flawed(rung, by_id[s.question_id], s))
            step = Step(rung, len(unsolved), judged, accepted_of(rung, judged, flawed), usage, flawed, before)
            yield step
            solved |= step.solved
            unsolved = [question for question in unsolved if question.id not in solved]

    def _ask(
        self, rung: Rung, model: str, client: ModelClient, questions: Sequence[Question]
    ) -> tuple[list[Sample], Usage]:
        """Ask one model of a rung. With ``accept = "all"`` a further answer is requested only while all before it were
        right, since one wrong answer already sends the question up; for a majority all are requested at once, or with
        ``samples_after_miss`` the first one alone, and the others where it is wrong."""
        indices_of_all = list(range(rung.answers))
        rounds = [indices_of_all]
        if rung.accept == "all":
            rounds = [[index] for index in indices_of_all]
        elif rung.samples_after_miss:
            rounds = [indices_of_all[:1], indices_of_all[1:]]
        samples: list[Sample] = []
        usage, start = Usage(), time.monotonic()
        candidates = {question.id: question for question in questions}
        for indices in rounds:
            planned = [
                (question, order, request)
                for question in candidates.values()
                for index in indices
                for order, request in self._request(rung, model, client.identity, question, index)
            ]
            label = f"{indices[0] + 1} of {rung.answers}" if len(indices) == 1 else f"{len(indices)} each"
            answers = client.ask([request for _, _, request in planned], f"{model}, {label}")
            usage = Usage(
                usage.calls + len(planned),
                usage.prompt_tokens + sum(answers[request.key].prompt_tokens for _, _, request in planned),
                usage.completion_tokens + sum(answers[request.key].completion_tokens for _, _, request in planned),
            )
            for question, order, request in planned:
                answer = answers[request.key]
                letter, verdict = judge(question, order, answer.text, finished=answer.finished)
                sample = Sample(
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
                samples.append(sample)
                is_right = verdict == "accepted"
                if rung.samples_after_miss:
                    is_settled = is_right and not _is_flawed(rung, question, sample)
                else:
                    is_settled = not is_right
                if is_settled:
                    candidates.pop(question.id, None)
        return samples, usage._replace(seconds=time.monotonic() - start)

    def _request(
        self, rung: Rung, model: str, identity: str, question: Question, index: int
    ) -> Iterator[tuple[Permutation, Request]]:
        """The request for the answer with this index; none where it would repeat an earlier request word for word."""
        drawn_orders = _orders(rung.orders, question, self._seed, rung)
        position = index % rung.orders
        order = drawn_orders[position]
        if rung.temperature > 0 or order not in drawn_orders[:position]:
            yield (
                order,
                Request(
                    model=identity,
                    messages=ask_messages(question, order, self._prompts[model]),
                    max_tokens=rung.max_tokens,
                    **rung.of_answer(index),
                ),
            )


def _billing(rung: Rung) -> Billing:
    return Billing(rung.name, rung.dollars, rung.batch)


def _is_flawed(rung: Rung, question: Question, sample: Sample) -> bool:
    """Whether a rung does not accept an answer, right or trusted, because of its chain."""
    counts = sample.verdict == "accepted" or (rung.trust_majority and sample.answer is not None)
    if not rung.clean or not counts:
        return False
    return clean_sample(question, sample).flaw is not None


def accepted_of(rung: Rung, judged: list[Sample], flawed: Collection[str] = ()) -> list[Sample]:
    """The samples of a rung that it accepts, by its rule. With ``trust_majority`` they may contradict the label. Those
    with the keys ``flawed`` vote, and are not accepted."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in judged:
        groups.setdefault((sample.model, sample.question_id), []).append(sample)
    accepted: dict[str, list[Sample]] = {}
    for (_, question), group in groups.items():
        right = [sample for sample in group if sample.verdict == "accepted"]
        if rung.accept == "all":
            chosen = right if len(right) == len(group) else []
        else:
            leader = leading(sample.answer for sample in group)
            voted = [sample for sample in group if leader is not None and sample.answer == leader]
            chosen = voted if rung.trust_majority else [sample for sample in voted if sample.verdict == "accepted"]
        accepted.setdefault(question, []).extend(sample for sample in chosen if sample.key not in flawed)
    if rung.keep is None:
        return [sample for chains in accepted.values() for sample in chains]
    return [
        chains[index] for chains in accepted.values() for index in most_different([s.text for s in chains], rung.keep)
    ]


def worked(rung: Rung, questions: Sequence[Question], seed: int) -> list[Sample]:
    """Samples from the questions' own worked solutions, each in one shuffled order, judged as any answer."""
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
                key=f"{WORKED_KEY_PREFIX}{digest([question.id, order, text])}",
                text=text,
                answer=letter,
                verdict=verdict,
            )
        )
    return samples


def written(rung: Rung, questions: Sequence[Question], seed: int) -> list[Sample]:
    """Samples from the chains of the rung's file, with the options in their own order, judged as any answer."""
    assert rung.chains is not None  # noqa: S101 (the configuration requires it)
    chains = read_chains(rung.chains)
    samples = []
    for question in questions:
        order = tuple(range(len(question.options)))
        indices = Counter[str]()
        for chain in chains.get(question.id, ()):
            writer = chain.writer or rung.name
            letter, verdict = judge(question, order, chain.text, finished=True)
            samples.append(
                Sample(
                    question_id=question.id,
                    rung=rung.name,
                    model=writer,
                    sample_index=indices[writer],
                    permutation=order,
                    key=f"chains:{digest([question.id, chain.text])}",
                    text=chain.text,
                    answer=letter,
                    verdict=verdict,
                )
            )
            indices[writer] += 1
    return samples


MODEL_FREE_KINDS: dict[str, Callable[[Rung, Sequence[Question], int], list[Sample]]] = {
    "worked": worked,
    "chains": written,
}
"""The kinds of rung that ask no model, with what makes their samples."""


def _orders(count: int, question: Question, seed: int, rung: Rung) -> list[Permutation]:
    size = len(question.options)
    if not rung.shuffle:
        return [tuple(range(size))]
    return orders(count, size, seed, question.id, rung.name, places=fixed(question).places)
