"""The cascade against its strongest model alone, on the contest's 389 problems and recorded answers of real models.

    python benchmarks/replay.py FOLDER

FOLDER holds the contest's train.jsonl and recorded_responses.jsonl, which are no part of the project. All else is real:
the command line, the engine, HTTP, the ledger. What is answered, and at which prices, says tests/replay_server.py.
Prints what each rung came to, what 405B alone comes to, and what an accepted question costs in both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from replay_server import (  # noqa: E402
    ANSWERS,
    KEY_ENV,
    LADDER,
    QUESTIONS,
    TEACHERS,
    Replayed,
    ReplayServer,
    configuration,
)

from stepladder.ask.ledger import Account, Ledger  # noqa: E402
from stepladder.records import Sample, read  # noqa: E402

STRONGEST = "llama-405b"
DEARER = 5.00
"""Dollars per million tokens of the strongest model in the second price list."""
CAVEAT = """\
What this cannot tell: the recordings are mostly the final right answers after retries, up to 20 a question. So every
model looks better here than at its first try, the cheap ones probably most, and retries cost nothing here. Where
nothing was recorded a model says that it cannot tell, which is 3 tokens and not a whole wrong answer. Tokens follow a
rule of thumb, the same for all models. Real first tries solve less on the lower rungs, and a question costs more."""


class Climb(NamedTuple):
    """What climbing one ladder came to."""

    rungs: list[dict[str, Any]]
    """The rows of the stage's summary."""
    accounts: list[Account]
    accepted: list[Sample]
    audited: int
    requests: list[Replayed]
    seconds: float

    @property
    def questions(self) -> int:
        return int(self.rungs[0]["asked"])

    @property
    def covered(self) -> int:
        """Questions with at least one accepted chain."""
        return len({sample.question_id for sample in self.accepted})

    def dollars(self, strongest: float = TEACHERS[STRONGEST].price.input) -> float:
        """What the ledger says was spent, had the strongest model cost so much per million tokens."""
        spent = sum(account.micro_dollars for account in self.accounts)
        more = strongest - TEACHERS[STRONGEST].price.input
        read_and_written = sum(a.prompt_tokens + a.completion_tokens for a in self.accounts if a.model == STRONGEST)
        return (spent + more * read_and_written) / 1e6

    def cost(self, rung: str) -> float:
        """Dollars of a rung, had every answer that was not recorded been as long as that model's others."""
        dollars = 0.0
        for account in self.accounts:
            if account.rung == rung:
                dollars += (account.micro_dollars + self._untold(account.model)) / 1e6
        return dollars

    def _untold(self, model: str) -> float:
        teacher = TEACHERS[model]
        answers = [one for one in self.requests if one.model == teacher.recorded]
        told = [one.completion_tokens for one in answers if one.recorded]
        silent = [one.completion_tokens for one in answers if not one.recorded]
        mean = sum(told) / len(told) if told else 0.0
        return teacher.price.output * sum(mean - said for said in silent)


def climb(name: str, folder: Path, server: ReplayServer, train: Path, ladder: Mapping[str, Sequence[str]]) -> Climb:
    """Run the stages in a folder of their own, so that neither climb finds the other's answers in its ledger."""
    place = folder / name
    place.mkdir()
    (place / "run.toml").write_text(configuration(name, server.url, train, ladder), encoding="utf-8")
    before, begun = len(server.replayed()), time.perf_counter()
    for stage in ("questions", "samples"):
        command = [sys.executable, "-m", "stepladder", stage, "run.toml"]
        env = os.environ | {KEY_ENV: "test-key"}
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"stepladder {stage} failed: {done.stderr.strip() or done.stdout.strip()}")
    seconds = time.perf_counter() - begun
    samples = place / "runs" / name / "samples"
    with Ledger(place / "runs" / "ledger.sqlite") as ledger:
        accounts = ledger.accounts(name)
    return Climb(
        json.loads((samples / "summary.json").read_text(encoding="utf-8"))["rungs"],
        accounts,
        read(samples / "accepted.jsonl", Sample),
        len((samples / "audit.jsonl").read_bytes().splitlines()),
        server.replayed()[before:],
        seconds,
    )


def show(name: str, done: Climb) -> None:
    """A line for each rung, then what it came to."""
    print(f"\n{name}")
    print("  rung     asked  solved  share of all  calls  tokens in  tokens out  dollars  accepted chains")
    for row in done.rungs:
        accounts = [account for account in done.accounts if account.rung == row["name"]]
        calls = sum(sum(account.outcomes.values()) for account in accounts)
        tokens_in = sum(account.prompt_tokens for account in accounts)
        tokens_out = sum(account.completion_tokens for account in accounts)
        dollars = sum(account.micro_dollars for account in accounts) / 1e6
        chains = sum(sample.rung == row["name"] for sample in done.accepted)
        print(
            f"  {row['name']:7} {row['asked']:6,}  {row['solved']:6,}  {row['solved'] / done.questions:12.1%}  "
            f"{calls:5,}  {tokens_in:9,}  {tokens_out:10,}  {dollars:7.4f}  {chains:15,}"
        )
    silent = sum(not one.recorded for one in done.requests)
    billed = sum(one.micro_dollars for one in done.requests) / 1e6
    print(
        f"  {len(done.accepted):,} chains of {done.covered:,} questions accepted, {done.audited} labels in the audit\n"
        f"  ${done.dollars():.4f} by the ledger, ${billed:.4f} billed by the server\n"
        f"  {silent} of {len(done.requests):,} calls had no recording; {done.seconds:.1f} s in all"
    )


def compare(ladder: Climb, alone: Climb) -> None:
    """Dollars per accepted question of both, under both price lists, and how far the result may be trusted."""
    print(f"\n{'':48}cascade  405B alone  ratio")
    print(f"{'coverage (accepted questions / all)':48}{ladder.covered / ladder.questions:7.1%}", end="")
    print(f"  {alone.covered / alone.questions:10.1%}")
    for price in (TEACHERS[STRONGEST].price.input, DEARER):
        label = f"$ per accepted question, 405B at {price:.2f}/{price:.2f}"
        show_costs(label, ladder.dollars(price) / ladder.covered, alone.dollars(price) / alone.covered)
    print(f"\n{CAVEAT}\n\nHad every unrecorded answer been as long as that model's others:")
    full = [sum(done.cost(row["name"]) for row in done.rungs) / done.covered for done in (ladder, alone)]
    show_costs("$ per accepted question, 405B at 3.00/3.00", *full)
    easy, medium = (ladder.cost(row["name"]) / row["asked"] for row in ladder.rungs[:2])
    hard = alone.cost("hard") / alone.questions
    print(
        f"Asking about one question costs ${easy:.6f} on the easy rung, ${medium:.6f} on the medium one, "
        f"${hard:.6f} of 405B.\nSo even if the easy rung solved nothing, the cascade would be cheaper once the "
        f"medium one solved {(easy + medium) / hard:.0%};\nand if the "
        f"medium one solved nothing, once the easy one solved {(easy + medium) / (medium + hard):.0%}."
    )


def show_costs(label: str, cascade: float, alone: float) -> None:
    print(f"{label:48}{cascade:7.6f}  {alone:9.6f}  {cascade / alone:6.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contest", type=Path, help="the folder of the contest's data")
    asked = parser.parse_args()
    contest = asked.contest.resolve()
    for name in (QUESTIONS, ANSWERS):
        if not (contest / name).is_file():
            sys.exit(f"error: {contest / name}: no such file; give the folder of the contest's data")
    train = contest / QUESTIONS
    with tempfile.TemporaryDirectory() as folder, ReplayServer(Path(folder), contest) as server:
        ladder = climb("cascade", Path(folder), server, train, LADDER)
        alone = climb("alone", Path(folder), server, train, {"hard": [STRONGEST]})
    problems = [json.loads(line) for line in train.read_bytes().splitlines()]
    questions = sum(len(problem["questions"]) for problem in problems)
    print(
        f"{len(problems)} problems, {questions:,} questions, {questions - ladder.questions} of them held out as "
        f"validation (a run must hold out some); the other {ladder.questions:,} are asked"
    )
    show("cascade", ladder)
    show("405B alone (one model cannot put a label in the audit, so it keeps every question that it solves)", alone)
    compare(ladder, alone)


if __name__ == "__main__":
    main()
