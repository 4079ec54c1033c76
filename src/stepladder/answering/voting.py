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
from stepladder.answering.client import computed_in, folder_client
from stepladder.ask.local.engine import Local
from stepladder.ask.request import Request, Response
from stepladder.config import Predict
from stepladder.context import Context
from stepladder.mcq.answer import majority, strict, up_to_letter
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.shuffle import Permutation, fixed, orders, shown, to_original
from stepladder.mcq.voting import first_round, is_decided
from stepladder.records import LETTERS, Example, Message, Prediction, Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TOP = 20
"""Likeliest tokens among which options' letters are looked for: as many as servers tell."""


class Vote(NamedTuple):
    """One of the votes on a question."""

    order: Permutation
    request: Request


def predict(context: Context, member: str, weights: Path, questions: list[Question], what: str) -> list[Prediction]:
    """Answer every question of a run with a model folder (:func:`vote`), as any model is asked, through the ledger."""
    config = context.config
    name = models.identity(weights, computed_in(config.predict.engine, config.predict, config.serve))
    with folder_client(context) as client:

        def ask(requests: Sequence[Request]) -> Mapping[str, Response]:
            return client.ask(weights, requests, what, config.predict.engine)

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
    responses: list[list[Response]] = [[] for _ in questions]
    count = first_round(settings.votes) if settings.adaptive else settings.votes
    undecided = [*range(len(questions))]
    while undecided:
        next_votes = {i: ballots[i][len(responses[i]) : len(responses[i]) + count] for i in undecided}
        answers = ask([vote.request for votes in next_votes.values() for vote in votes])
        for i, votes in next_votes.items():
            responses[i] += [answers[vote.request.key] for vote in votes]
        undecided = [
            i for i in undecided if not is_decided(_letters(questions[i], ballots[i], responses[i]), settings.votes)
        ]
        count = 1
    return _predictions(questions, member, ballots, responses, settings, ask, prompts)


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
    answers = known([vote.request for ballot in ballots for vote in ballot])
    ballots = [[vote for vote in ballot if vote.request.key in answers] for ballot in ballots]
    responses = [[answers[vote.request.key] for vote in ballot] for ballot in ballots]
    return _predictions(questions, member, ballots, responses, settings, known, prompts)


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


def _letters(question: Question, ballot: Sequence[Vote], responses: Sequence[Response]) -> tuple[str | None, ...]:
    """The letters of as many answers as there are, in the original option order."""
    read = []
    for (order, _), response in zip(ballot, responses, strict=False):
        letter = strict(response.text, shown(question.options, order)).letter
        read.append(None if letter is None else to_original(letter, order))
    return tuple(read)


def _predictions(
    questions: Sequence[Question],
    member: str,
    ballots: Sequence[Sequence[Vote]],
    responses: Sequence[Sequence[Response]],
    settings: Predict,
    ask: Callable[[Sequence[Request]], Mapping[str, Response]],
    prompts: Path | None,
) -> list[Prediction]:
    """What questions' first answers come to, however many of them there are."""
    votes = [_letters(*each) for each in zip(questions, ballots, responses, strict=True)]
    follow_ups: list[list[Vote]] = [[] for _ in questions]
    if settings.probabilities:
        rows = zip(follow_ups, questions, ballots, responses, votes, strict=True)
        for follow_up, question, ballot, answers, read in rows:
            for (order, request), response, letter in zip(ballot, answers, read, strict=False):
                if letter is not None:
                    follow_up.append(Vote(order, begun(question, order, response.text, request.model, prompts)))
    tokens = ask([vote.request for group in follow_ups for vote in group]) if any(follow_ups) else {}
    return [
        Prediction(
            question_id=question.id,
            member=member,
            votes=read,
            answer=majority(read),
            texts=tuple(response.text for response in answers),
            tokens=tuple(response.completion_tokens for response in answers),
            likely=_likely([(order, tokens[request.key]) for order, request in group if request.key in tokens]),
        )
        for question, read, answers, group in zip(questions, votes, responses, follow_ups, strict=True)
    ]


def _likely(letter_tokens: Sequence[tuple[Permutation, Response]]) -> dict[str, float]:
    """The letters' mean probability over answers, in the original option order."""
    chances: defaultdict[str, float] = defaultdict(float)
    for order, response in letter_tokens:
        found = {letter: math.exp(logprob) for letter, logprob in letters(response, len(order)).items()}
        whole = sum(found.values())
        for letter, chance in found.items():
            if chance > 0:  # a server's log-probability may stand for none
                chances[to_original(letter, order)] += chance / whole
    whole = sum(chances.values())
    return {letter: chance / whole for letter, chance in sorted(chances.items())}


def _ballot(question: Question, model: str, settings: Predict, seed: int, prompts: Path | None) -> list[Vote]:
    """All votes that may be asked for on a question."""
    size = len(question.options)
    shuffled = orders(settings.votes - 1, size, seed, question.id, "predict", places=fixed(question).places)
    return [
        Vote(
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
    engine = Local(tokenizer, student)
    requests = {
        question.id: Request(
            model="in training",
            messages=ask_messages(question, tuple(range(len(question.options))), context.config.prompts),
            max_tokens=context.config.predict.max_tokens,
        )
        for question in questions
    }
    texts: dict[str, str] = {}
    for group in engine.plan([*requests.values()]):
        texts |= {request.key: answer.text for request, answer in zip(group, engine.answer(group), strict=True)}
    right = [strict(texts[requests[q.id].key], q.options).letter == q.answer for q in questions]
    return sum(right) / len(right)
