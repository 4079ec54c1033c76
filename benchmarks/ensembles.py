"""Every ensemble rule, and the choice among them, on votes recorded from 48 models: nested cross-validation.

    python benchmarks/ensembles.py VOTES.jsonl [--sets 40] [--seed 7]

Members are drawn by fours from the models that answer at least half of the questions rightly; of models that answered
alike everywhere (recorded twice under two names) one is kept. A member's answer is the most frequent of its samples.
Gains are means over the sets; their intervals resample problems, since all sets share the questions. The best single
member is the best in hindsight, on all questions, which nobody knows beforehand.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepladder.ensembling.rules import Ballot, ballot
from stepladder.ensembling.selection import select
from stepladder.mcq.votefile import read_votes

SIZE = 4
RESAMPLES = 10_000


def pool(path: Path) -> tuple[Ballot, NDArray[np.int64], list[str]]:
    """Distinct usable models as one ballot, the right letters, and each question's problem."""
    said, labels = read_votes(path)
    names = sorted({name for votes in said.values() for name in votes})
    letters = "".join(
        sorted({*labels.values()} | {x for votes in said.values() for v in votes.values() for x in v if x})
    )
    cast = ballot(names, [[votes.get(name, ()) for votes in said.values()] for name in names], letters)
    right = np.array([letters.index(label) for label in labels.values()])
    kept: dict[bytes, int] = {}
    for at, answers in enumerate(cast.answers):
        if (answers == right).mean() >= 0.5:
            kept.setdefault(answers.tobytes(), at)
    return members(cast, sorted(kept.values())), right, [question.rpartition("#")[0] for question in said]


def members(cast: Ballot, at: list[int]) -> Ballot:
    return Ballot(tuple(cast.members[one] for one in at), cast.answers[at], cast.shares[at])


def interval(gains: NDArray[np.float64], problems: list[str]) -> str:
    """Mean gain in points with a 95 % interval over problems; ``gains`` is by question."""
    groups = np.unique(problems, return_inverse=True)[1]
    sums, sizes = np.bincount(groups, weights=gains), np.bincount(groups)
    drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
    low, high = 100 * np.quantile((drawn @ sums) / (drawn @ sizes), [0.025, 0.975])
    return f"{100 * gains.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("votes", type=Path)
    parser.add_argument("--sets", type=int, default=40)
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()
    cast, right, problems = pool(asked.votes)
    draw = random.Random(asked.seed)
    print(f"{len(cast.members)} models, {len(right):,} questions, {asked.sets} sets of {SIZE}")
    hits: dict[str, list[NDArray[np.float64]]] = {}
    best, oracle, choices, correlations = [], [], [], []
    for _ in range(asked.sets):
        some = members(cast, draw.sample(range(len(cast.members)), SIZE))
        found = select(some, right, problems, seed=0)
        for name, scored in [*found.rules.items(), ("chosen", found.chosen)]:
            hits.setdefault(name, []).append(np.array(scored.right, dtype=np.float64))
        correct = some.answers == right
        best.append(correct[correct.mean(1).argmax()].astype(np.float64))
        oracle.append(correct.any(0).astype(np.float64))
        choices.append(found.choice)
        correlations += [value for value in found.correlation.values() if value is not None]
    alone = np.array(best)  # (sets, questions)
    print(f"best single in hindsight {100 * alone.mean():.2f} %, oracle {100 * np.array(oracle).mean():.2f} %")
    print(f"correlation of two members' errors {np.mean(correlations):.2f}")
    print("rule       accuracy  gain over the best single     worst set  gain over the winning entry's rule")
    follow = np.array(hits["leader"])
    for name, rows in hits.items():
        given = np.array(rows)
        gain = given - alone
        worst, over = 100 * gain.mean(1).min(), interval((given - follow).mean(0), problems)
        print(f"{name:9}  {100 * given.mean():6.2f} %  {interval(gain.mean(0), problems):26}  {worst:+7.2f}    {over}")
    print(
        "chosen: "
        + ", ".join(f"{name} {choices.count(name)}" for name in sorted(set(choices), key=choices.count)[::-1])
    )


if __name__ == "__main__":
    main()
