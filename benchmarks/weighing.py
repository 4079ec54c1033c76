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
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from learning import answered

from stepladder.answering import standalone
from stepladder.answering.voting import Poll, count_stored, vote
from stepladder.ask.local import Local
from stepladder.ask.request import Request, Response
from stepladder.mcq.answer import majority
from stepladder.mcq.questionfile import read_problems
from stepladder.mcq.voting import first_round, is_decided
from stepladder.records import Prediction, Question
from stepladder.stats import mcnemar

LEADS = (0.5, 0.9, 0.99, 1.5, 1.9)
"""Probability that a letter needs more than any other, where votes stop by probability."""


def predict(arguments: argparse.Namespace) -> tuple[list[Question], list[list[Prediction]]]:
    """The questions, and for each of them the predictions from its first vote, its first two, and so on."""
    how = standalone.read_settings(arguments.model, arguments.language)
    problems = read_problems(arguments.questions, how.language, labelled=True)
    questions = [question for problem in problems for question in problem.questions][: arguments.most]
    settings = how.predict.model_copy(update={"votes": arguments.votes, "probabilities": True, "adaptive": False})
    poll = Poll(questions, "member", "student", settings, how.seed, how.prompts)
    engine, stored = Local.load(arguments.model), dict[str, Response]()

    def ask(requests: Sequence[Request]) -> Mapping[str, Response]:
        stored.update(answered(engine, {request.key: request for request in requests}))
        return stored

    vote(poll, ask)
    by_count = []
    for count in range(1, arguments.votes + 1):
        later = {each.request.key for question in questions for each in poll.ballot(question)[count:]}
        known = {key: response for key, response in stored.items() if key not in later}
        by_count.append(count_stored(poll, lambda requests, known=known: known))  # type: ignore[misc]
    return questions, [list(each) for each in zip(*by_count, strict=True)]


def likeliest(prediction: Prediction) -> tuple[str | None, float]:
    """The letter with the most probability over a prediction's votes, and by how much it leads."""
    ranked = sorted(prediction.likely.items(), key=lambda pair: -pair[1])
    readable = sum(letter is not None for letter in prediction.votes)
    first, second = [share for _, share in ranked[:2]] + [0.0] * (2 - len(ranked[:2]))
    return (ranked[0][0] if ranked else prediction.answer), readable * (first - second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--votes", type=int, default=5)
    parser.add_argument("--most", type=int, help="questions, the first ones; by default all")
    parser.add_argument("--language")
    arguments = parser.parse_args()
    questions, predictions = predict(arguments)
    most = arguments.votes
    letters = [each[-1].votes for each in predictions]
    counted = [each[-1].answer == question.answer for question, each in zip(questions, predictions, strict=True)]

    def show(name: str, answers: Sequence[str | None], stops: Sequence[int]) -> None:
        right = [answer == question.answer for question, answer in zip(questions, answers, strict=True)]
        gain = 100 * (np.mean(right) - np.mean(counted))
        share = np.mean(stops) / most
        p = mcnemar(counted, right).p
        print(f"{name:44}{np.mean(right):7.1%}  {gain:+5.1f} (p = {p:.2g})  {share:6.1%} of the votes")

    every = [most] * len(questions)
    print(f"\n{len(questions)} questions, {most} votes each")
    show("the most frequent letter", [each[-1].answer for each in predictions], every)
    show("the first vote", [votes[0] for votes in letters], [1] * len(questions))
    show("the most probability", [likeliest(each[-1])[0] for each in predictions], every)
    show("the most probability, first vote", [likeliest(each[0])[0] for each in predictions], [1] * len(questions))
    stops = [next(n for n in range(first_round(most), most + 1) if is_decided(votes[:n], most)) for votes in letters]
    show("adaptive, a lead of two votes", [majority(v[:n]) for v, n in zip(letters, stops, strict=True)], stops)
    show(
        "the same votes, by probability",
        [likeliest(each[n - 1])[0] for each, n in zip(predictions, stops, strict=True)],
        stops,
    )
    for lead in LEADS:
        stops = [next((n for n in range(1, most) if likeliest(each[n - 1])[1] >= lead), most) for each in predictions]
        answers = [likeliest(each[n - 1])[0] for each, n in zip(predictions, stops, strict=True)]
        show(f"adaptive, a lead of {lead} in probability", answers, stops)


if __name__ == "__main__":
    main()
