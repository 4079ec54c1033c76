"""Adaptive voting on recorded votes: what five votes gain over one, and what stopping early keeps of it.

    python benchmarks/adaptive.py VOTES.jsonl

Of models that were asked five times about at least 800 questions; models that voted alike everywhere (recorded twice
under two names) count once. A vote stops by the product's rule (mcq/voting.py). Prints for every model and for all, by
size, accuracy with one vote, five, and adaptive ones, and the share of the five that those took. Intervals resample
problems.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np

from stepladder.mcq.answer import majority
from stepladder.mcq.votefile import read_votes
from stepladder.mcq.voting import first_round, is_decided

VOTES, ENOUGH = 5, 800
RESAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("votes", type=Path)
    said, labels = read_votes(parser.parse_args().votes)
    rows: dict[str, list[tuple[str, float, float, int]]] = {"14B and more": [], "less than 14B": []}
    seen = set()
    print("one vote  five votes  adaptive     share of the votes")
    for name in sorted({name for votes in said.values() for name in votes}):
        full = {q: tuple(votes[name]) for q, votes in said.items() if len(votes.get(name, ())) == VOTES}
        if len(full) < ENOUGH or (alike := hash(tuple(full.items()))) in seen:
            continue
        seen.add(alike)
        mine = []
        for question, votes in full.items():
            stop = next(n for n in range(first_round(VOTES), VOTES + 1) if is_decided(votes[:n], VOTES))
            five, early = (majority(some) == labels[question] for some in (votes, votes[:stop]))
            mine.append((question, float(five), float(early), stop))
        size = int(max(re.findall(r"(\d+)B", name) or ["9"], key=int))  # glm-4-9b writes a small b
        rows["14B and more" if size >= 14 else "less than 14B"] += mine
        one = sum(votes[0] == labels[q] for q, votes in full.items()) / len(full)
        _, five, early, stops = (np.array(column) for column in zip(*mine, strict=True))
        five, early = five.astype(float), early.astype(float)
        share = stops.astype(int).mean() / VOTES
        gain = 100 * (early.mean() - five.mean())
        print(f"{one:7.1%}  {five.mean():9.1%}  {early.mean():8.1%} ({gain:+.2f})  {share:5.1%}  {name}")
    for name, some in [*rows.items(), ("all", [row for part in rows.values() for row in part])]:
        groups = np.unique([row[0].rpartition("#")[0] for row in some], return_inverse=True)[1]
        gains = np.array([early - five for _, five, early, _ in some])
        sums, sizes = np.bincount(groups, weights=gains), np.bincount(groups)
        drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
        low, high = 100 * np.quantile((drawn @ sums) / (drawn @ sizes), [0.025, 0.975])
        share = sum(row[3] for row in some) / VOTES / len(some)
        print(f"{name}: {100 * gains.mean():+.2f} points [{low:+.2f}, {high:+.2f}] at {share:.1%} of the votes")


if __name__ == "__main__":
    main()
