"""Near-duplicates between 100,000 training texts and 10,000 held-out ones, with twins planted among them.

    python benchmarks/overlap.py [--left 100000] [--right 10000]

Texts are made of the same stock phrases with other names, as problems of one family are. Every hundredth held-out text
has a twin in training in which so many of ten sentences say something else. Prints time, peak memory, how many twins
are found at each degree of change, and how many pairs are found that were not planted.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections import Counter

from stepladder.mcq.overlap import near_duplicates

NAMES = [a + b for a in ("An", "Bo", "Cle", "Da", "El", "Fin", "Gus", "Hal") for b in ("na", "rik", "o", "sa")]
THINGS = ("the red box", "the old key", "a green lamp", "the tall vase", "a blue coat", "the long rope", "a small bell")
VERBS = ("sits left of", "is taller than", "owns more books than", "arrived before", "lives next to", "is a friend of")
END = "What is not stated and does not follow is false. Based on the above, answer the following questions:"
CHANGES = (0, 1, 2, 3)


def sentence(dice: random.Random) -> str:
    one, other = dice.sample(NAMES, 2)
    return f"{one} {dice.choice(VERBS)} {other}, who keeps {dice.choice(THINGS)} since {dice.randint(1900, 2020)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--left", type=int, default=100_000)
    parser.add_argument("--right", type=int, default=10_000)
    asked = parser.parse_args()
    dice = random.Random(1)
    bodies = [[sentence(dice) for _ in range(10)] for _ in range(asked.left + asked.right)]
    left, right = bodies[: asked.left], bodies[asked.left :]
    planted = {}
    for number, at in enumerate(range(0, asked.right, 100)):
        changes, place = CHANGES[number % len(CHANGES)], dice.randrange(asked.left)
        twin = list(right[at])
        for line in dice.sample(range(10), changes):
            twin[line] = sentence(dice)
        left[place] = twin
        planted[place, at] = changes
    texts = [[" ".join([*lines, END]) for lines in side] for side in (left, right)]
    begun = time.perf_counter()
    pairs = near_duplicates(*texts, threshold=0.2)
    seconds = time.perf_counter() - begun
    found = Counter(planted[pair[:2]] for pair in pairs if pair[:2] in planted)
    meant = Counter(planted.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{asked.left:,} against {asked.right:,}: {seconds:.1f} s, peak {peak:.1f} GiB")
    for changes in CHANGES:
        print(f"  {changes} of 10 sentences changed: {found[changes]} of {meant[changes]} twins found")
    print(f"  not planted: {sum(pair[:2] not in planted for pair in pairs)} pairs")


if __name__ == "__main__":
    main()
