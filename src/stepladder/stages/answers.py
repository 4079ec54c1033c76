"""How a student answers questions: asked through the ledger like any model, at price 0, then voted.

Used by ``quantised`` (to measure) and by ``predictions`` (to keep); the second finds the first's answers stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stepladder import models
from stepladder.ask.local import Local
from stepladder.ask.request import Request
from stepladder.mcq.answer import majority, strict
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.shuffle import Permutation, fixed, orders, shown, to_original
from stepladder.records import Example, Message, Prediction, Question
from stepladder.stages.asking import ask_weights
from stepladder.stages.flow import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def predict(context: Context, member: str, weights: Path, questions: list[Question], what: str) -> list[Prediction]:
    """Answer every question ``[predict] votes`` times, the first time in the options' own order, then shuffled.

    Returns predictions in the order of the questions; letters are in the original option order.
    """
    settings = context.config.predict
    name = models.content_digest(weights)
    asked: list[tuple[Question, Permutation, Request]] = []
    for question in questions:
        size = len(question.options)
        seed = (context.config.seed, question.id, "predict")
        shuffled = orders(settings.votes - 1, size, *seed, places=fixed(question).places)
        for index, order in enumerate([tuple(range(size)), *shuffled]):
            request = Request(
                model=name,
                messages=ask_messages(question, order, context.config.prompts),
                temperature=settings.temperature,
                sample_index=index,
                max_tokens=settings.max_tokens,
            )
            asked.append((question, order, request))
    answers = ask_weights(context, weights, [request for _, _, request in asked], what)
    predictions = []
    for at in range(0, len(asked), settings.votes):
        question = asked[at][0]
        votes, texts = [], []
        for _, order, request in asked[at : at + settings.votes]:
            text = answers[request.key].text
            letter = strict(text, shown(question.options, order)).letter
            votes.append(None if letter is None else to_original(letter, order))
            texts.append(text)
        predictions.append(
            Prediction(
                question_id=question.id,
                member=member,
                votes=tuple(votes),
                answer=majority(tuple(votes)),
                texts=tuple(texts),
            )
        )
    return predictions


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
