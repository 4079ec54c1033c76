"""How a student answers questions: asked through the ledger like any model, at price 0, then voted.

Used by ``quantised`` (to measure) and by ``predictions`` (to keep); the second finds the first's answers stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stepladder import models
from stepladder.ask.local import Local
from stepladder.ask.request import Request, Response
from stepladder.config import Predict
from stepladder.mcq.answer import majority, strict
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.shuffle import Permutation, fixed, orders, shown, to_original
from stepladder.mcq.voting import first_round, settled
from stepladder.records import Example, Message, Prediction, Question
from stepladder.stages.asking import desk
from stepladder.stages.flow import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Asked(NamedTuple):
    """One of the votes on a question."""

    order: Permutation
    request: Request


def predict(context: Context, member: str, weights: Path, questions: list[Question], what: str) -> list[Prediction]:
    """Answer every question of a run with a model folder (:func:`vote`), as any model is asked, through the ledger."""
    config = context.config

    def ask(requests: Sequence[Request]) -> Mapping[str, Response]:
        return desk(context).ask(weights, requests, what, config.predict.engine)

    name = models.content_digest(weights)
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
    return [
        _prediction(question, member, ballot, responses)
        for question, ballot, responses in zip(questions, ballots, heard, strict=True)
    ]


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
    found = []
    for question, ballot in zip(questions, ballots, strict=True):
        heard = [one for one in ballot if one.request.key in answers]
        found.append(_prediction(question, member, heard, [answers[one.request.key] for one in heard]))
    return found


def _votes(question: Question, ballot: Sequence[Asked], heard: Sequence[Response]) -> tuple[str | None, ...]:
    """The letters of as many answers as there are, in the original option order."""
    votes = []
    for (order, _), response in zip(ballot, heard, strict=False):
        letter = strict(response.text, shown(question.options, order)).letter
        votes.append(None if letter is None else to_original(letter, order))
    return tuple(votes)


def _prediction(question: Question, member: str, ballot: Sequence[Asked], heard: Sequence[Response]) -> Prediction:
    votes = _votes(question, ballot, heard)
    return Prediction(
        question_id=question.id,
        member=member,
        votes=votes,
        answer=majority(votes),
        texts=tuple(response.text for response in heard),
        tokens=tuple(response.completion_tokens for response in heard),
    )


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
