"""How a student answers questions: asked through the ledger like any model, at price 0, then voted.

Used by ``quantised`` (to measure) and by ``predictions`` (to keep); the second finds the first's answers stored.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stepladder import models
from stepladder.ask.local import Local
from stepladder.ask.request import Request, Response
from stepladder.config import Predict
from stepladder.mcq.answer import majority, strict, up_to_letter
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.shuffle import Permutation, fixed, orders, shown, to_original
from stepladder.mcq.voting import first_round, settled
from stepladder.records import LETTERS, Example, Message, Prediction, Question
from stepladder.stages.asking import computed_in, desk
from stepladder.stages.flow import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TOP = 20
"""Likeliest tokens among which options' letters are looked for: as many as servers tell."""


class Asked(NamedTuple):
    """One of the votes on a question."""

    order: Permutation
    request: Request


def predict(context: Context, member: str, weights: Path, questions: list[Question], what: str) -> list[Prediction]:
    """Answer every question of a run with a model folder (:func:`vote`), as any model is asked, through the ledger."""
    config = context.config
    name = models.identity(weights, computed_in(config.predict.engine, config.predict, config.serve))
    with desk(context) as at:

        def ask(requests: Sequence[Request]) -> Mapping[str, Response]:
            return at.ask(weights, requests, what, config.predict.engine)

        return vote(questions, member, name, config.predict, config.seed, ask, config.prompts)


def vote(
    questions: Sequence[Question],
    member: str,
    model: str,
    settings: Predict,
    seed: int,
    ask: Callable[[Sequence[Request]], Mapping[str, Response]],
    prompts: Path | None = None,
) -> list[Prediction]:
    """Answer every question ``[predict] votes`` times, the first time in the options' own order, then shuffled; with
    ``adaptive`` only while the vote is open, in rounds.

    Args:
        questions: what is asked, in the order of what is returned.
        member: who answers, as predictions name it.
        model: who answers, as requests name it.
        settings: votes, sampling and caps.
        seed: of the shuffled orders.
        ask: gives responses by request key.
        prompts: folder of prompts of one's own.

    Returns:
        Predictions; letters are in the original option order.
    """
    ballots = [_ballot(question, model, settings, seed, prompts) for question in questions]
    heard: list[list[Response]] = [[] for _ in questions]
    count = first_round(settings.votes) if settings.adaptive else settings.votes
    open_votes = [*range(len(questions))]
    while open_votes:
        now = {at: ballots[at][len(heard[at]) : len(heard[at]) + count] for at in open_votes}
        answers = ask([one.request for some in now.values() for one in some])
        for at, some in now.items():
            heard[at] += [answers[one.request.key] for one in some]
        open_votes = [
            at for at in open_votes if not settled(_votes(questions[at], ballots[at], heard[at]), settings.votes)
        ]
        count = 1
    return _predictions(questions, member, ballots, heard, settings, ask, prompts)


def counted(
    questions: Sequence[Question],
    member: str,
    model: str,
    settings: Predict,
    seed: int,
    known: Callable[[Sequence[Request]], Mapping[str, Response]],
    prompts: Path | None = None,
) -> list[Prediction]:
    """What :func:`vote` makes of the answers that are known already; nobody is asked. A question that nobody answered
    has no votes."""
    ballots = [_ballot(question, model, settings, seed, prompts) for question in questions]
    answers = known([one.request for ballot in ballots for one in ballot])
    ballots = [[one for one in ballot if one.request.key in answers] for ballot in ballots]
    heard = [[answers[one.request.key] for one in ballot] for ballot in ballots]
    return _predictions(questions, member, ballots, heard, settings, known, prompts)


def begun(question: Question, order: Permutation, text: str, model: str, prompts: Path | None = None) -> Request:
    """A request to go on with what a model said to a question, its options in ``order``, right where the letter
    stands."""
    so_far = up_to_letter(text, shown(question.options, order), question.language)
    messages = (*ask_messages(question, order, prompts), Message(role="assistant", content=so_far))
    return Request(model=model, messages=messages, max_tokens=1, top_logprobs=TOP, final=True)


def letters(response: Response, count: int) -> dict[str, float]:
    """How likely the first ``count`` letters are as the next token, by log-probability; those among its likeliest."""
    found: dict[str, float] = {}
    for token in response.logprobs[:1]:
        for text, logprob in token.top.items():
            if len(letter := text.strip()) == 1 and letter in LETTERS[:count]:
                found[letter] = max(logprob, found.get(letter, -math.inf))
    return found


def _votes(question: Question, ballot: Sequence[Asked], heard: Sequence[Response]) -> tuple[str | None, ...]:
    """The letters of as many answers as there are, in the original option order."""
    votes = []
    for (order, _), response in zip(ballot, heard, strict=False):
        letter = strict(response.text, shown(question.options, order)).letter
        votes.append(None if letter is None else to_original(letter, order))
    return tuple(votes)


def _predictions(
    questions: Sequence[Question],
    member: str,
    ballots: Sequence[Sequence[Asked]],
    heard: Sequence[Sequence[Response]],
    settings: Predict,
    ask: Callable[[Sequence[Request]], Mapping[str, Response]],
    prompts: Path | None,
) -> list[Prediction]:
    """What questions' first answers come to, however many of them there are."""
    votes = [_votes(*one) for one in zip(questions, ballots, heard, strict=True)]
    places: list[list[tuple[Permutation, Request]]] = [[] for _ in questions]
    if settings.probabilities:
        for some, question, ballot, responses, cast in zip(places, questions, ballots, heard, votes, strict=True):
            for (order, request), response, letter in zip(ballot, responses, cast, strict=False):
                if letter is not None:
                    some.append((order, begun(question, order, response.text, request.model, prompts)))
    told = ask([request for some in places for _, request in some]) if any(places) else {}
    return [
        Prediction(
            question_id=question.id,
            member=member,
            votes=cast,
            answer=majority(cast),
            texts=tuple(response.text for response in responses),
            tokens=tuple(response.completion_tokens for response in responses),
            likely=_likely([(order, told[request.key]) for order, request in some if request.key in told]),
        )
        for question, cast, responses, some in zip(questions, votes, heard, places, strict=True)
    ]


def _likely(told: Sequence[tuple[Permutation, Response]]) -> dict[str, float]:
    """The letters' mean probability over answers, in the original option order."""
    chances: defaultdict[str, float] = defaultdict(float)
    for order, response in told:
        found = {letter: math.exp(logprob) for letter, logprob in letters(response, len(order)).items()}
        whole = sum(found.values())
        for letter, chance in found.items():
            if chance > 0:  # a server's log-probability may stand for none
                chances[to_original(letter, order)] += chance / whole
    whole = sum(chances.values())
    return {letter: chance / whole for letter, chance in sorted(chances.items())}


def _ballot(question: Question, model: str, settings: Predict, seed: int, prompts: Path | None) -> list[Asked]:
    """All votes that may be asked for on a question."""
    size = len(question.options)
    shuffled = orders(settings.votes - 1, size, seed, question.id, "predict", places=fixed(question).places)
    return [
        Asked(
            order,
            Request(
                model=model,
                messages=ask_messages(question, order, prompts),
                temperature=settings.temperature,
                sample_index=index,
                max_tokens=settings.max_tokens,
                final=True,
            ),
        )
        for index, order in enumerate([tuple(range(size)), *shuffled])
    ]


def conversation(context: Context, question: Question, text: str, teacher: str) -> Example:
    """A question with its options in their own order, and what somebody says to it."""
    messages = ask_messages(question, tuple(range(len(question.options))), context.config.prompts)
    answer = Message(role="assistant", content=text)
    return Example(messages=(*messages, answer), question_id=question.id, teacher=teacher)


def correct(questions: list[Question], predictions: list[Prediction]) -> list[bool]:
    """Whether each prediction equals the label; an unparsed answer is wrong."""
    return [q.answer == p.answer for q, p in zip(questions, predictions, strict=True)]


def examine(
    context: Context, questions: list[Question], tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel
) -> float:
    """Share of the questions that a student in training answers rightly, greedily, in the options' own order. Nothing
    is kept: tomorrow it is another."""
    model = Local(tokenizer, student)
    asked = {
        question.id: Request(
            model="in training",
            messages=ask_messages(question, tuple(range(len(question.options))), context.config.prompts),
            max_tokens=context.config.predict.max_tokens,
        )
        for question in questions
    }
    told: dict[str, str] = {}
    for group in model.plan([*asked.values()]):
        told |= {request.key: answer.text for request, answer in zip(group, model.answer(group), strict=True)}
    right = [strict(told[asked[q.id].key], q.options).letter == q.answer for q in questions]
    return sum(right) / len(right)
