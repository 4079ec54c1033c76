"""Balance the answer letters of training samples by showing the options of some in another order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stepladder.mcq.reorder import in_order, may_move
from stepladder.mcq.shuffle import fixed, to_shown
from stepladder.records import LETTERS, Question, Sample


def balanced(pairs: Sequence[tuple[Question, Sample]]) -> list[Sample]:
    """The samples, some with the right option moved to the letter that has been right least often so far.

    It is moved only where the chain stays right (:func:`stepladder.mcq.reorder.in_order`). Fixed options keep their
    places. Letters are counted per number of options, so that questions with two do not use up A and B for the others.
    Samples with the fewest possible letters come first; the others make up for the imbalance they leave.
    """
    possible = [_possible_letters(question, sample) for question, sample in pairs]
    balanced_samples = [sample for _, sample in pairs]
    counts: dict[int, Counter[str]] = {}
    for index in sorted(range(len(pairs)), key=lambda index: len(possible[index])):
        question, sample = pairs[index]
        uses = counts.setdefault(len(question.options), Counter())
        rarest = min(possible[index], key=lambda letter: (uses[letter], letter))
        uses[rarest] += 1
        balanced_samples[index] = _with_answer_at(question, sample, rarest)
    return balanced_samples


def _possible_letters(question: Question, sample: Sample) -> list[str]:
    """The letters that the sample's answer may be moved to; its own alone where it must stay."""
    places = fixed(question).places
    if LETTERS.index(str(sample.answer)) in places or not may_move(question, sample):
        return [to_shown(str(sample.answer), sample.permutation)]
    return [LETTERS[index] for index in range(len(question.options)) if index not in places]


def _with_answer_at(question: Question, sample: Sample, letter: str) -> Sample:
    """The sample with the options in an order that shows its answer at a letter."""
    current, target = (LETTERS.index(name) for name in (to_shown(str(sample.answer), sample.permutation), letter))
    order = list(sample.permutation)
    order[current], order[target] = order[target], order[current]
    return in_order(question, sample, tuple(order)) or sample
