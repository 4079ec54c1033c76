"""Position bias: whether a model's answers depend on the letter an option stands at, measured on shuffled options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from stepladder.documents import PositionBias
from stepladder.mcq.shuffle import to_shown
from stepladder.records import Question, Sample


def commonest_letters(questions: Iterable[Question]) -> dict[int, str]:
    """The letter that is right most often, by number of options. Naming it takes no reading, and beats guessing where
    letters are skewed, as where "no" comes second."""
    letters: dict[int, Counter[str]] = {}
    for question in questions:
        letters.setdefault(len(question.options), Counter())[str(question.answer)] += 1
    return {count: min(counter, key=lambda letter: (-counter[letter], letter)) for count, counter in letters.items()}


def unread_accuracy(letters: Mapping[int, str], questions: Sequence[Question]) -> float:
    """Accuracy of naming a letter by the number of options alone; A where there is none for it."""
    hits = sum(letters.get(len(question.options), "A") == question.answer for question in questions)
    return hits / len(questions)


class Positions:
    """Counts of one model's answers, added question by question.

    Consistency is biased on a rung that asks for a second order only after a right answer.
    """

    def __init__(self) -> None:
        self._answers = 0
        self._shown: Counter[str] = Counter()
        self._right: Counter[str] = Counter()
        self._chosen: Counter[str] = Counter()
        self._pairs: Counter[bool] = Counter()

    def add(self, question: Question, samples: Sequence[Sample]) -> None:
        """Count the model's answers to a question."""
        self._answers += len(samples)
        readable = [sample for sample in samples if sample.answer is not None]
        self._chosen.update(to_shown(str(sample.answer), sample.permutation) for sample in readable)
        self._pairs.update(
            first.answer == second.answer
            for first, second in combinations(readable, 2)
            if first.permutation != second.permutation
        )
        if question.answer is not None:
            for sample in samples:
                letter = to_shown(question.answer, sample.permutation)
                self._shown[letter] += 1
                self._right[letter] += sample.answer == question.answer

    def bias(self, model: str) -> PositionBias:
        """The shares computed from the counts."""
        return PositionBias(
            model=model,
            answers=self._answers,
            recall={letter: self._right[letter] / count for letter, count in sorted(self._shown.items())},
            chosen=_shares(self._chosen),
            shown=_shares(self._shown),
            consistency=self._pairs[True] / self._pairs.total() if self._pairs else None,
        )


def _shares(counts: Counter[str]) -> dict[str, float]:
    return {letter: count / counts.total() for letter, count in sorted(counts.items())}
