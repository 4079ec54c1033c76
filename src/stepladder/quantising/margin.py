"""Whether quantising lost accuracy: a test of non-inferiority on paired answers, and how many answers it needs.

Merged and quantised model answer the same questions; the margin is ``[quantise] max_loss``. Where the answers are too
few to decide, the questions are asked again with their options in other orders, once, as many as the changes seen so
far call for. Each of the two looks has half of :data:`LEVEL`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stepladder.documents import AccuracyTest, Decision
from stepladder.mcq.shuffle import Permutation, fixed, orders, shown, to_shown
from stepladder.records import Question
from stepladder.stats import (
    PairedCounts,
    answers_needed,
    design_effect,
    effective,
    excludes_loss,
    largest_loss,
    sign_flip_test,
)

LEVEL = 0.05
"""Most probability that an export which loses nothing is called worse, or one that loses the margin lossless enough."""
POWER = 0.8
"""Probability of a decision, right in either case, that the number of answers is chosen for."""
LOOKS = 2


class Outcomes(NamedTuple):
    """Answers to the same questions before and after quantising."""

    problems: tuple[str, ...]
    """Of each answer."""
    before: tuple[bool, ...]
    """Whether the merged model was right."""
    after: tuple[bool, ...]
    """Whether the quantised model was right."""

    def joined(self, other: Outcomes) -> Outcomes:
        """These answers and others."""
        return Outcomes(self.problems + other.problems, self.before + other.before, self.after + other.after)


Ask = Callable[[list[Question]], Outcomes]
"""Asks both models."""


def check_accuracy(
    first: Outcomes, questions: Sequence[Question], margin: float, most: int, seed: int, ask: Ask
) -> AccuracyTest:
    """Decide from the answers there are; where they are too few, from more.

    Args:
        first: answers to the questions with their options in their own order.
        questions: all of them.
        margin: share of the accuracy that may be lost.
        most: orders of the options in which a question is asked at most, its own included.
        seed: of the other orders.
        ask: asks both models the questions it is given.
    """
    test = decide(first, margin)
    more = further_questions(questions, test.needed, most, seed) if test.decision == "cannot tell" else []
    return decide(first.joined(ask(more)), margin) if more else test


def decide(outcomes: Outcomes, margin: float) -> AccuracyTest:
    """What the answers say, at one look's share of :data:`LEVEL`.

    ``lossless enough``: a loss of the margin is excluded (Tango 1998), the answers about a problem counting for as many
    independent ones as their design effect leaves. ``worse``: that is not so, and more was lost than a lossless export
    loses by chance (sign flips over problems, exact). Otherwise ``cannot tell``.
    """
    changes: dict[str, list[int]] = {}
    for problem, before, after in zip(*outcomes, strict=True):
        changes.setdefault(problem, []).append(before - after)
    every = [change for group in changes.values() for change in group]
    counts = PairedCounts(every.count(1), every.count(-1), len(every))
    design, level = design_effect(changes), LEVEL / LOOKS
    independent = effective(counts, design)
    p = sign_flip_test([sum(group) for group in changes.values()])
    decision: Decision
    if margin >= 1 or excludes_loss(independent, margin, level):
        decision = "lossless enough"
    else:
        decision = "worse" if p < level else "cannot tell"
    changed = (counts.lost + counts.won) / counts.n
    needed = None if margin == 0 else math.ceil(design * answers_needed(changed, margin, level, POWER))
    return AccuracyTest(
        decision=decision,
        margin=margin,
        level=LEVEL,
        power=POWER,
        answers=len(every),
        lost=every.count(1),
        won=every.count(-1),
        loss=counts.loss,
        p=p,
        largest_loss=largest_loss(independent, level),
        design_effect=design,
        needed=needed,
    )


def further_questions(questions: Sequence[Question], needed: int | None, most: int, seed: int) -> list[Question]:
    """The questions with their options in other orders, as many orders of each as bring the answers to ``needed``
    (None: all); at least one where there is one, and none that was asked before."""
    others = [_other_orders(question, most, seed) for question in questions]
    chosen: list[Question] = []
    for number in range(most - 1):
        if chosen and needed is not None and len(questions) + len(chosen) >= needed:
            break
        pairs = zip(questions, others, strict=True)
        chosen += [reordered(question, each[number]) for question, each in pairs if len(each) > number]
    return chosen


def _other_orders(question: Question, most: int, seed: int) -> list[Permutation]:
    """Up to ``most - 1`` different orders of a question's options, none of them its own."""
    size, places = len(question.options), fixed(question).places
    count = min(most, math.factorial(size - len(places)))
    drawn = orders(count, size, seed, question.id, "gate", places=places)
    return [order for order in drawn if order != tuple(range(size))][: most - 1]


def reordered(question: Question, order: Permutation) -> Question:
    """The question with its options, and its label, in another order."""
    answer = None if question.answer is None else to_shown(question.answer, order)
    return question.model_copy(update={"options": tuple(shown(question.options, order)), "answer": answer})


def sentence(test: AccuracyTest, most: int) -> str:
    """What the test says, for people."""
    counted = f"{test.lost} answers lost and {test.won} won of {test.answers}"
    if test.decision == "worse":
        return (
            f"validation accuracy fell by {test.loss:.3f} ({counted}; one that loses nothing comes to this with "
            f"p = {test.p:.2g}), and a loss of max_loss = {test.margin} is not excluded"
        )
    if test.decision == "lossless enough":
        return f"a loss of max_loss = {test.margin} is excluded ({counted}, so at most {test.largest_loss:.3f})"
    more = "more" if test.needed is None else f"{max(1, test.needed - test.answers)} more"
    return (
        f"cannot tell whether validation accuracy fell by max_loss = {test.margin} ({counted}: as much as "
        f"{test.largest_loss:.3f} is possible); it takes about {more} validation answers: raise max_orders (now "
        f"{most}), or [questions] validation"
    )
