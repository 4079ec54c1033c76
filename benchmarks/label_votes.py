"""What the contest's recordings say about its labels, as one votes file for ``stepladder audit``.

    python benchmarks/label_votes.py ../shared/competition VOTES.jsonl
    stepladder audit --votes VOTES.jsonl --out SUSPECTS.jsonl

``recorded_votes.jsonl`` holds letters of 48 fine-tuned models; ``recorded_responses.jsonl`` texts of six others, read
here with the strict rule. Those were asked again until they were right, so agreeing with the label says little of them;
where twenty tries did not get there, that says something.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stepladder.mcq.answer import strict
from stepladder.mcq.questionfile import read_problems
from stepladder.records import parse_lines
from stepladder.workspace import write_atomic


def main(contest: Path, out: Path) -> None:
    problems = read_problems(contest / "train.jsonl", "zh", labelled=True)
    questions = {question.id: question for problem in problems for question in problem.questions}
    votes = {row["id"]: dict(row["votes"]) for _, row in parse_lines(contest / "recorded_votes.jsonl")}
    for _, row in parse_lines(contest / "recorded_responses.jsonl"):
        options = questions[row["id"]].options
        letters = [strict(text, options).letter or "" for text in row["responses"]]
        votes.setdefault(row["id"], {})[f"recorded {row['model']}"] = letters
    rows = ({"id": name, "gold": questions[name].answer, "votes": votes[name]} for name in questions if name in votes)
    write_atomic(out, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/label_votes.py CONTEST_FOLDER VOTES.jsonl")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
