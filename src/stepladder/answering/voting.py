"""How a student answers questions: asked through the ledger like any model, at price 0, then by majority vote.

Used by the stages ``quantised`` and ``predictions``; the second finds the first's answers in the ledger.
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


TOP_LOGPROBS = 20
"""Likeliest tokens among which options' letters are looked for: the most that servers give."""


class Vote(NamedTuple):
    """One of the votes on a question."""

    order: Permutation
    request: Request


class Poll(NamedTuple):
    """Questions that a model votes on, and how it is asked."""

    questions: Sequence[Question]
    """In the order of the predictions."""
    member: str
    """Who answers, as predictions name it."""
    model: str
    """Who answers, as requests name it."""
    settings: Predict
    """Number of votes, sampling and caps."""
    seed: int
    """Of the shuffled orders."""
    prompts: Path | None = None
    """Folder with the user's prompts."""

    def ballot(self, question: Question) -> list[Vote]:
        """All votes that may be asked for on a question: the options in their own order first, then shuffled."""
        size, more = len(question.options), self.settings.votes - 1
        places = fixed(question).places if more else frozenset[int]()
        shuffled = orders(more, size, self.seed, question.id, "predict", places=places)
        return [
            Vote(
                order,
                Request(
                    model=self.model,
                    messages=ask_messages(question, order, self.prompts),
                    max_tokens=self.settings.max_tokens,
                    final=True,
                    **self.settings.of_answer(index),
                ),
            )
            for index, order in enumerate([tuple(range(size)), *shuffled])
        ]


Ask = Callable[[Sequence[Request]], Mapping[str, Response]]
"""Gives responses by request key."""


def predict(context: Context, member: str, weights: Path, questions: list[Question], label: str) -> list[Prediction]:
    """Answer every question of a run with a model folder (:func:`vote`), through the ledger as any model."""
    config = context.config
    model = models.identity(weights, computed_in(config.predict.engine, config.predict, config.serve))
    with folder_client(context) as client:

        def ask(requests: Sequence[Request]) -> Mapping[str, Response]:
            return client.ask(weights, requests, label, config.predict.engine)

        return vote(Poll(questions, member, model, config.predict, config.seed, config.student_prompts), ask)


def vote(poll: Poll, ask: Ask) -> list[Prediction]:
    """Ask for ``[predict] votes`` answers to every question; with ``adaptive`` only while the vote is open, in rounds.

    Letters of the predictions are in the original option order.
    """
    settings, questions = poll.settings, poll.questions
    ballots = [poll.ballot(question) for question in questions]
    responses: list[list[Response]] = [[] for _ in questions]
    letters: list[tuple[str | None, ...]] = [() for _ in questions]
    count = first_round(settings.votes) if settings.adaptive else settings.votes
    undecided = [*range(len(questions))]
    while undecided:
        next_votes = {i: ballots[i][len(responses[i]) : len(responses[i]) + count] for i in undecided}
        answers = ask([vote.request for votes in next_votes.values() for vote in votes])
        for i, votes in next_votes.items():
            new = [answers[vote.request.key] for vote in votes]
            responses[i] += new
            letters[i] += _letters(questions[i], votes, new)
        undecided = [i for i in undecided if not is_decided(letters[i], settings.votes)]
        count = 1
    return _predictions(poll, ballots, responses, letters, ask)


def count_stored(poll: Poll, stored: Ask) -> list[Prediction]:
    """The predictions of :func:`vote` from stored responses alone, of which some may be missing; no model is asked. A
    question without a response has no votes."""
    ballots = [poll.ballot(question) for question in poll.questions]
    answers = stored([vote.request for ballot in ballots for vote in ballot])
    ballots = [[vote for vote in ballot if vote.request.key in answers] for ballot in ballots]
    responses = [[answers[vote.request.key] for vote in ballot] for ballot in ballots]
    letters = [_letters(*each) for each in zip(poll.questions, ballots, responses, strict=True)]
    return _predictions(poll, ballots, responses, letters, stored)


def letter_request(
    question: Question, order: Permutation, text: str, model: str, prompts: Path | None = None
) -> Request:
    """A request for one token: that which follows an answer up to its letter, where the options are in ``order``."""
    so_far = up_to_letter(text, shown(question.options, order), question.language)
    messages = (*ask_messages(question, order, prompts), Message(role="assistant", content=so_far))
    return Request(model=model, messages=messages, max_tokens=1, top_logprobs=TOP_LOGPROBS, final=True)


def letter_logprobs(response: Response, count: int) -> dict[str, float]:
    """Log-probability of each of the first ``count`` letters as the next token, as far as they are among its
    likeliest."""
    logprobs: dict[str, float] = {}
    for token in response.logprobs[:1]:
        for text, logprob in token.top.items():
            if len(letter := text.strip()) == 1 and letter in LETTERS[:count]:
                logprobs[letter] = max(logprob, logprobs.get(letter, -math.inf))
    return logprobs


def _letters(question: Question, ballot: Sequence[Vote], responses: Sequence[Response]) -> tuple[str | None, ...]:
    """The letter of every response, in the original option order."""
    read = []
    for (order, _), response in zip(ballot, responses, strict=False):
        letter = strict(response.text, shown(question.options, order)).letter
        read.append(None if letter is None else to_original(letter, order))
    return tuple(read)


def _predictions(
    poll: Poll,
    ballots: Sequence[Sequence[Vote]],
    responses: Sequence[Sequence[Response]],
    votes: Sequence[tuple[str | None, ...]],
    ask: Ask,
) -> list[Prediction]:
    """One prediction a question, from its responses, those to the first votes of its ballot, and their letters."""
    questions = poll.questions
    follow_ups = [
        _follow_ups(poll, question, list(zip(ballot, answers, read, strict=False)))
        for question, ballot, answers, read in zip(questions, ballots, responses, votes, strict=True)
    ]
    tokens = ask([vote.request for group in follow_ups for vote in group]) if any(follow_ups) else {}
    predictions = []
    for question, read, answers, group in zip(questions, votes, responses, follow_ups, strict=True):
        likely = _likely([(order, tokens[request.key]) for order, request in group if request.key in tokens])
        answer = majority(read)
        predictions.append(
            Prediction(
                question_id=question.id,
                member=poll.member,
                votes=read,
                answer=answer,
                forced=max(likely, key=lambda letter: likely[letter], default=None) if answer is None else None,
                texts=tuple(response.text for response in answers),
                tokens=tuple(response.completion_tokens for response in answers),
                likely={} if answer is None else likely,
            )
        )
    return predictions


def _follow_ups(poll: Poll, question: Question, votes: Sequence[tuple[Vote, Response, str | None]]) -> list[Vote]:
    """The requests for the one token that is the letter: of the votes that name one, where probabilities are wanted; of
    the first vote, where none names one."""
    if all(letter is None for _, _, letter in votes):
        wanted = votes[:1]
    else:
        wanted = [row for row in votes if row[2] is not None and poll.settings.probabilities]
    return [
        Vote(order, letter_request(question, order, response.text, request.model, poll.prompts))
        for (order, request), response, _ in wanted
    ]


def _likely(letter_tokens: Sequence[tuple[Permutation, Response]]) -> dict[str, float]:
    """The letters' mean probability over answers, in the original option order."""
    sums: defaultdict[str, float] = defaultdict(float)
    for order, response in letter_tokens:
        logprobs = letter_logprobs(response, len(order))
        probabilities = {letter: math.exp(logprob) for letter, logprob in logprobs.items()}
        total = sum(probabilities.values())
        for letter, probability in probabilities.items():
            if probability > 0:  # a server may report log-probabilities so low that exp gives 0
                sums[to_original(letter, order)] += probability / total
    total = sum(sums.values())
    return {letter: probability / total for letter, probability in sorted(sums.items())}


def conversation(context: Context, question: Question, text: str, teacher: str) -> Example:
    """A question with its options in their own order, answered with ``text``."""
    messages = ask_messages(question, tuple(range(len(question.options))), context.config.student_prompts)
    answer = Message(role="assistant", content=text)
    return Example(messages=(*messages, answer), question_id=question.id, teacher=teacher)


def correct(questions: list[Question], predictions: list[Prediction]) -> list[bool]:
    """Whether each prediction equals the label; an unparsed answer is wrong."""
    return [q.answer == p.answer for q, p in zip(questions, predictions, strict=True)]


def examine(
    context: Context,
    questions: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedModel,
    watch: Callable[[int, int], None],
) -> float:
    """Share of the questions that a student in training answers rightly, greedily, in the options' own order. The
    answers are not kept in the ledger, since the weights still change. ``watch`` is called with (questions answered,
    all questions) after each batch."""
    engine = Local(tokenizer, student)
    requests = {
        question.id: Request(
            model="in training",
            messages=ask_messages(question, tuple(range(len(question.options))), context.config.student_prompts),
            max_tokens=context.config.predict.max_tokens,
        )
        for question in questions
    }
    texts: dict[str, str] = {}
    for group in engine.plan([*requests.values()]):
        texts |= {request.key: answer.text for request, answer in zip(group, engine.answer(group), strict=True)}
        watch(len(texts), len(requests))
    right = [strict(texts[requests[q.id].key], q.options).letter == q.answer for q in questions]
    return sum(right) / len(right)
