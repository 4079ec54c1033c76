"""What votes weighed by their letters' probabilities gain over votes that count alike, and how early they may stop.

    python benchmarks/weighing.py MODEL QUESTIONS [--votes 5] [--most N] [--language en]

MODEL is a finished model folder, QUESTIONS a labelled file in the contest's form. Every question is answered in as many
orders of its options as there are votes, greedily; after each answer one more token tells how likely every letter was
where the answer's letter stands ([predict] probabilities). Compared with all votes, the most frequent letter: the first
vote; the letter with the most probability over all votes; adaptive votes as the product stops them (mcq/voting.py); and
votes that stop once a letter leads by so much probability. Differences are in points, with the exact McNemar test.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from learning import answered

from stepladder.answering import standalone
from stepladder.answering.voting import Poll, letter_logprobs, letter_request
from stepladder.ask.local import Local
from stepladder.mcq.answer import majority, strict
from stepladder.mcq.questionfile import read_problems
from stepladder.mcq.shuffle import shown, to_original
from stepladder.mcq.voting import first_round, is_decided
from stepladder.records import Question
from stepladder.stats import mcnemar

LEADS = (0.5, 0.9, 0.99, 1.5, 1.9)
"""Probability that a letter needs more than any other, where votes stop by probability."""

Weights = Mapping[str, float]
"""Probability of each letter, in the original option order."""


def read_votes(
    arguments: argparse.Namespace,
) -> tuple[list[Question], list[list[str | None]], list[list[Weights]]]:
    """The questions, and the letters and probabilities of their votes."""
    how = standalone.read_settings(arguments.model, arguments.language)
    problems = read_problems(arguments.questions, how.language, labelled=True)
    questions = [question for problem in problems for question in problem.questions][: arguments.most]
    settings = how.predict.model_copy(update={"votes": arguments.votes})
    poll = Poll(questions, "member", "student", settings, how.seed, how.prompts)
    engine = Local.load(arguments.model)
    ballots = [poll.ballot(question) for question in questions]
    texts = answered(
        engine,
        {f"{i} {k}": vote.request for i, ballot in enumerate(ballots) for k, vote in enumerate(ballot)},
    )
    tokens = answered(
        engine,
        {
            f"{i} {k}": letter_request(questions[i], vote.order, texts[f"{i} {k}"].text, "student", how.prompts)
            for i, ballot in enumerate(ballots)
            for k, vote in enumerate(ballot)
        },
    )
    letters: list[list[str | None]] = []
    weights: list[list[Weights]] = []
    for i, (question, ballot) in enumerate(zip(questions, ballots, strict=True)):
        letters.append([])
        weights.append([])
        for k, (order, _) in enumerate(ballot):
            letter = strict(texts[f"{i} {k}"].text, shown(question.options, order)).letter
            logprobs = letter_logprobs(tokens[f"{i} {k}"], len(order))
            total = sum(np.exp([*logprobs.values()])) or 1.0
            letters[-1].append(letter and to_original(letter, order))
            weights[-1].append({to_original(name, order): float(np.exp(p)) / total for name, p in logprobs.items()})
    return questions, letters, weights


def weighed(weights: Sequence[Weights]) -> tuple[str | None, float]:
    """The letter with the most probability, and by how much it leads."""
    sums = Counter[str]()
    for vote in weights:
        sums.update(vote)
    ranked = [*sums.most_common(2), ("", 0.0), ("", 0.0)]
    return ranked[0][0] or None, ranked[0][1] - ranked[1][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--votes", type=int, default=5)
    parser.add_argument("--most", type=int, help="questions, the first ones; by default all")
    parser.add_argument("--language")
    arguments = parser.parse_args()
    questions, letters, weights = read_votes(arguments)
    most = arguments.votes
    counted = [majority(tuple(votes)) == question.answer for question, votes in zip(questions, letters, strict=True)]

    def show(name: str, answers: Sequence[str | None], stops: Sequence[int]) -> None:
        right = [answer == question.answer for question, answer in zip(questions, answers, strict=True)]
        gain = 100 * (np.mean(right) - np.mean(counted))
        share = np.mean(stops) / most
        p = mcnemar(counted, right).p
        print(f"{name:44}{np.mean(right):7.1%}  {gain:+5.1f} (p = {p:.2g})  {share:6.1%} of the votes")

    every = [most] * len(questions)
    print(f"\n{len(questions)} questions, {most} votes each")
    show("the most frequent letter", [majority(tuple(votes)) for votes in letters], every)
    show("the first vote", [votes[0] for votes in letters], [1] * len(questions))
    show("the most probability", [weighed(votes)[0] for votes in weights], every)
    show("the most probability, first vote", [weighed(votes[:1])[0] for votes in weights], [1] * len(questions))
    stops = [next(n for n in range(first_round(most), most + 1) if is_decided(votes[:n], most)) for votes in letters]
    show("adaptive, a lead of two votes", [majority(tuple(v[:n])) for v, n in zip(letters, stops, strict=True)], stops)
    show("the same votes, by probability", [weighed(v[:n])[0] for v, n in zip(weights, stops, strict=True)], stops)
    for lead in LEADS:
        stops = [next((n for n in range(1, most) if weighed(votes[:n])[1] >= lead), most) for votes in weights]
        answers = [weighed(votes[:n])[0] for votes, n in zip(weights, stops, strict=True)]
        show(f"adaptive, a lead of {lead} in probability", answers, stops)


if __name__ == "__main__":
    main()
