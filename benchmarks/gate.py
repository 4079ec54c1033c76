"""How often the gate of ``quantised`` decides, and rightly: simulated exports of known loss.

    python benchmarks/gate.py [--exports 500]

A contest's validation split: 210 questions of 75 problems, a third with two options (two orders, so two answers), the
others with four (``max_orders`` answers). Each answer changes sides with a given probability; a given share of a
question's flips in different orders are one and the same.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np

from stepladder.quantising.margin import Outcomes, decide

QUESTIONS, PROBLEMS, ORDERS = 210, 75, 8


class Export(NamedTuple):
    """What quantising does to answers."""

    loss: float
    """True loss of accuracy, share."""
    changed: float
    """Share of the answers that change sides."""
    shared: float = 0.0
    """Share of a question's changes that are the same in all orders."""


def decisions(export: Export, margin: float, seed: int, exports: int) -> dict[str, float]:
    """Share of exports with each decision of the gate, after the first answers and, where they do not decide, after as
    many more as the test asks for and there are orders for."""
    counts = dict.fromkeys(("lossless enough", "worse", "cannot tell"), 0)
    generator = np.random.default_rng(seed)
    chances = [(export.changed + export.loss) / 2, (export.changed - export.loss) / 2, 1 - export.changed]
    available = np.where(np.arange(QUESTIONS) % 3 == 0, 2, ORDERS)
    for _ in range(exports):
        own = generator.choice([1, -1, 0], size=(QUESTIONS, ORDERS), p=chances)
        same = generator.random((QUESTIONS, ORDERS)) < export.shared
        changes = np.where(same, own[:, :1], own)
        test = decide(_outcomes(changes, np.minimum(available, 1)), margin)
        if test.decision == "cannot tell":
            orders = 2
            while orders < ORDERS and np.minimum(available, orders).sum() < (test.needed or np.inf):
                orders += 1
            test = decide(_outcomes(changes, np.minimum(available, orders)), margin)
        counts[test.decision] += 1
    return {decision: count / exports for decision, count in counts.items()}


def _outcomes(changes: np.ndarray, asked: np.ndarray) -> Outcomes:
    """Outcomes from changes (1 lost, -1 won), shape (questions, orders), of which each question's first are asked."""
    rows = [
        (f"problem {question * PROBLEMS // QUESTIONS}", change != -1, change != 1)
        for question, count in enumerate(asked)
        for change in changes[question, :count].tolist()
    ]
    problems, before, after = zip(*rows, strict=True)
    return Outcomes(problems, before, after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exports", type=int, default=500)
    exports = parser.parse_args().exports
    print("margin  loss  changed  same in all orders | lossless enough  worse  cannot tell | refused where it can tell")
    for margin, losses in ((0.03, (0.0, 0.015, 0.03)), (0.01, (0.0, 0.03))):
        for loss in losses:
            for changed in (0.05, 0.08):
                for shared in (0.0, 0.3):
                    found = decisions(Export(loss, changed, shared), margin, 2024, exports)
                    decided = 1 - found["cannot tell"]
                    refused = f"{found['worse'] / decided:.3f}" if decided else "never"
                    print(
                        f"{margin:6} {loss:5} {changed:8} {shared:19} | {found['lossless enough']:15.3f} "
                        f"{found['worse']:6.3f} {found['cannot tell']:12.3f} | {refused}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
