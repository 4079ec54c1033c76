"""The chains that a member learns: cleaned, chosen among those of a question, and in the orders of options it wants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from stepladder.config import Member
from stepladder.mcq.answer import ANSWER_LINE
from stepladder.mcq.balance import balanced
from stepladder.mcq.chains import most_different, shortest
from stepladder.mcq.cleaning import Cleaned, clean_sample
from stepladder.mcq.language import is_written_in
from stepladder.mcq.reorder import in_orders, may_move
from stepladder.mcq.shuffle import to_shown
from stepladder.records import Question, Sample

BY_SCORE = ("likely", "fitting")
"""Ways to choose chains that the student has to compute."""


class Measures(NamedTuple):
    """How the student sees chains."""

    tokens: Callable[[str], int]
    """The length of a chain."""
    scores: Callable[[Sequence[Sample]], Sequence[float]]
    """By what chains are chosen :data:`BY_SCORE`: the lowest are learned."""


class Mixture(NamedTuple):
    """What a member learns, and what became of the rest."""

    samples: list[Sample]
    left_out: Counter[str]
    """Chains that are left out, by field of the data card."""
    flawed: Counter[str]
    """Chains that no student should learn from, by flaw (mcq/cleaning.py)."""
    cleaned: Counter[str]
    """Chains from which debris was removed, by its form."""
    in_one_order: int
    """Chains that stay in their own order, because of how they refer to options."""


def mixture(
    mix: Member,
    samples: Iterable[Sample],
    questions: Mapping[str, Question],
    measures: Measures,
    leaked: Collection[str] = (),
) -> Mixture:
    """Choose a member's chains.

    Args:
        mix: the member.
        samples: accepted samples of the teachers and problems in its mix.
        questions: their questions, by id.
        measures: how the student sees them.
        leaked: problems that it must not learn from.
    """
    left_out, flawed, cleaned = Counter[str](), Counter[str](), Counter[str]()
    usable: list[Sample] = []
    for sample in samples:
        question = questions[sample.question_id]
        if question.problem_id in leaked:
            left_out["leaked"] += 1
            continue
        if mix.learns == "letters":
            usable.append(without_chain(question, sample))
            continue
        chain = without_debris(mix, question, sample)
        if chain.flaw is not None:
            flawed[chain.flaw] += 1
        elif not is_written_in(chain.text, question.language):
            left_out["other_language"] += 1
        elif mix.max_chain is not None and measures.tokens(chain.text) > mix.max_chain:
            left_out["long_chain"] += 1
        else:
            cleaned.update(chain.forms)
            usable.append(sample.model_copy(update={"text": chain.text}))
    most = 1 if mix.learns == "letters" else mix.chains
    chosen = usable if most is None else _chosen(mix, most, usable, measures)
    left_out["same_chain"] = len(usable) - len(chosen)
    pairs = [(questions[sample.question_id], sample) for sample in chosen]
    in_one_order = sum(not may_move(*pair) for pair in pairs) if mix.orders > 1 else 0
    ordered = [(question, moved) for question, sample in pairs for moved in in_orders(question, sample, mix.orders)]
    learned = balanced(ordered) if mix.balance else [sample for _, sample in ordered]
    return Mixture(learned, left_out, flawed, cleaned, in_one_order)


def without_chain(question: Question, sample: Sample) -> Sample:
    """The sample with its letter alone; its key is another one, as a worked solution's would bring the chain back in
    another order of the options."""
    line = ANSWER_LINE[question.language].format(to_shown(str(sample.answer), sample.permutation))
    return sample.model_copy(update={"text": line, "key": f"letter:{sample.key}"})


def without_debris(mix: Member, question: Question, sample: Sample) -> Cleaned:
    """The sample's chain as the member may learn it, or why it may not."""
    if not mix.clean:
        return Cleaned(sample.text)
    return clean_sample(question, sample)


def _chosen(mix: Member, most: int, samples: Sequence[Sample], measures: Measures) -> list[Sample]:
    """The chains of each question that a member learns from, at most so many."""
    by_question: dict[str, list[Sample]] = {}
    for sample in samples:
        by_question.setdefault(sample.question_id, []).append(sample)
    groups = by_question.values()
    if mix.choose in BY_SCORE:
        contested = [sample for group in groups if len(group) > most for sample in group]
        score = dict(zip(contested, measures.scores(contested), strict=True))
        return [
            sample for group in groups for sample in sorted(group, key=lambda sample: score.get(sample, 0.0))[:most]
        ]
    choose = shortest if mix.choose == "shortest" else most_different
    return [group[index] for group in groups for index in choose([sample.text for sample in group], most)]
