"""The questions that benchmarks/learning.py teaches and asks: those of the contest, and generated closed worlds."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from stepladder import models
from stepladder.answering.cascade import worked
from stepladder.closedworld.generate import generate, to_line
from stepladder.config import Member, Rung, Train
from stepladder.mcq.mixture import mixture
from stepladder.mcq.overlap import TWIN_SIMILARITY, near_duplicates, problem_text
from stepladder.mcq.questionfile import Problem, read_problems
from stepladder.records import Example, Language, Question, Sample
from stepladder.stages.trainset import example_of, measured_by

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from recorded import right_answers
from replay_server import QUESTIONS

CONTEST_SEED, CONTEST_TRAIN, CONTEST_CHOICE = 20, 250, 50
WORLDS_FILE = Path(__file__).parent.parent / "examples" / "closedworld" / "train.jsonl"
WORLDS_SEED, WORLDS_CHOICE, WORLDS_HELD_OUT, WORLDS_TEST = 20, 100, 40, 2_000
LADDER = (
    ("Meta-Llama-3.1-8B-Instruct", "Qwen2-7B-Instruct"),
    ("Meta-Llama-3.1-70B-Instruct", "Qwen2-72B-Instruct", "DeepSeek-Coder-V2-Instruct"),
    ("Meta-Llama-3.1-405B-Instruct-FP8",),
)
"""The recorded models as rungs, the cheapest first."""
STRONG = ("Qwen2-72B-Instruct", "DeepSeek-Coder-V2-Instruct", "Meta-Llama-3.1-405B-Instruct-FP8")
EVERYONE = tuple(model for rung in LADDER for model in rung)


class Row(NamedTuple):
    """A way to learn."""

    mix: Mapping[str, Any] = {}
    """Keys of ``[[member]]``."""
    train: Mapping[str, Any] = {}
    """Keys of ``[train]`` that differ from the field's."""
    teachers: tuple[str, ...] = ()
    """Whose right answers it learns from: by default those of the first rung with one."""
    loss: str = ""
    """What it learns by instead of cross-entropy, of learning.LOSSES."""
    noise: float = 0.0
    """Alpha of NEFTune's noise on embeddings (arXiv 2310.05914)."""
    letters: bool = False
    """Whether it learns each question's letter alone as well, asked for without a chain."""
    rounds: int = 0
    """How often the student then answers the training problems outside its share and learns its own right chains."""


class Field(NamedTuple):
    """Questions split into those to learn from, to choose on and of the test, and what is known about the first."""

    train: dict[str, Question]
    choice: list[Question]
    test: list[Question]
    taught: list[Sample]
    """Right chains of the training questions."""
    held_out: list[Example]
    """Right chains of questions to choose on."""
    settings: Mapping[str, Any]
    """Keys of ``[train]``."""
    rows: Mapping[str, Row]
    max_tokens: int
    """Of an answer."""
    speed_packs: int
    """Packs of a row from which its speed is taken, at least."""


CONTEST_LENGTH = 768
AT_ONCE = "不写推理过程，只写最后一行。"
"""Added to a contest question where the letter alone is wanted."""
SHORT = {"clean": True, "chains": 1, "choose": "shortest"}
SMALL_STEPS = {"batch_size": 1, "gradient_accumulation": 2}
CONTEST_SETTINGS = {
    "lora_rank": 32, "lora_alpha": 64, "learning_rate": 3e-4, "batch_size": 2, "gradient_accumulation": 4,
    "max_length": CONTEST_LENGTH, "schedule": "linear", "warmup": 0.0,
}  # fmt: skip
CONTEST_ROWS = {
    "ladder": Row({"clean": False, "chains": 1}),
    "clean": Row({"clean": True, "chains": 1}),
    "shortest": Row(SHORT, teachers=STRONG),
    "orders": Row({"clean": False, "chains": 1, "orders": 3}),
    "small-steps": Row(SHORT, SMALL_STEPS, STRONG),
    "small-steps-1e-3": Row(SHORT, SMALL_STEPS | {"learning_rate": 1e-3}, STRONG),
    "likely": Row(SHORT | {"choose": "likely"}, SMALL_STEPS, STRONG),
    "fitting": Row(SHORT | {"choose": "fitting"}, SMALL_STEPS, STRONG),
    "brief": Row(SHORT | {"max_chain": 128}, SMALL_STEPS, STRONG),
    "chains-4": Row(SHORT | {"chains": 4, "max_chain": 160}, SMALL_STEPS, STRONG),
    "chains-4-letters": Row(SHORT | {"chains": 4, "max_chain": 160}, SMALL_STEPS, STRONG, letters=True),
    "together": Row(SHORT | {"chains": 2, "max_chain": 200}, SMALL_STEPS, EVERYONE, letters=True),
    "letters": Row({"learns": "letters"}, SMALL_STEPS),
    "letters-orders": Row({"learns": "letters", "orders": 3}, SMALL_STEPS),
    "unpacked": Row({"clean": False, "chains": 1}, {"packing": False}),
    "short-unpacked": Row(SHORT, {"packing": False}, STRONG),
    "all": Row(SHORT | {"orders": 3}, {"packing": False}, STRONG),
    "all-chains-2": Row(SHORT | {"orders": 2, "chains": 2}, {"packing": False}, STRONG),
}

WORLDS_SETTINGS = {
    "lora_rank": 32, "lora_alpha": 64, "learning_rate": 1e-3, "batch_size": 1, "gradient_accumulation": 1,
    "max_length": 512,
}  # fmt: skip
"""Those of examples/demo.toml."""
THIRD = {"share": 1 / 3}
THREE = {"packing": False, "batch_size": 3}
SWIFT = {"lora_dropout": 0.05, "adam_beta2": 0.95}
"""What ms-swift does otherwise, with 0.1 of weight decay."""
WORLDS_ROWS = {
    "loop": Row(
        {}, {"packing": False, "batch_size": 2, "gradient_accumulation": 4, "learning_rate": 3e-4, "schedule": "linear"}
    ),
    "demo": Row(),
    "orders-2": Row({"orders": 2}),
    "orders-4": Row({"orders": 4}),
    "two-packs": Row({}, {"batch_size": 2}),
    "three": Row({}, THREE),
    "three-orders-2": Row({"orders": 2}, THREE),
    "rate-2e-3": Row({}, {"learning_rate": 2e-3}),
    "rate-5e-4": Row({}, {"learning_rate": 5e-4}),
    "linear": Row({}, {"schedule": "linear"}),
    "rank-64": Row({}, {"lora_rank": 64, "lora_alpha": 128}),
    "rank-8": Row({}, {"lora_rank": 8, "lora_alpha": 16}),
    "swift": Row({}, SWIFT),
    "beta2": Row({}, {"adam_beta2": 0.95}),
    "dft": Row(loss="dft"),
    "smoothing": Row(loss="smoothing"),
    "neftune": Row(noise=5.0),
    "letters": Row({"learns": "letters"}),
    "third": Row(THIRD),
    "third-1-round": Row(THIRD, rounds=1),
    "third-2-rounds": Row(THIRD, rounds=2),
}


def contest(folder: Path, base: Path) -> Field:
    """The contest's 389 problems: 250 to learn from, less near-duplicates of test problems and 50 to choose on."""
    problems = read_problems(folder / QUESTIONS, "zh", labelled=True)
    order = random.Random(CONTEST_SEED).sample(problems, len(problems))
    learned, test = order[:CONTEST_TRAIN], order[CONTEST_TRAIN:]
    texts = [[problem_text(problem.questions) for problem in part] for part in (learned, test)]
    twins = {left for left, _, _ in near_duplicates(*texts, TWIN_SIMILARITY)}
    kept = [problem for index, problem in enumerate(learned) if index not in twins]
    choice, train = _questions(kept[:CONTEST_CHOICE]), _by_id(kept[CONTEST_CHOICE:])
    one_each = {question.problem_id: question for question in reversed(choice)}
    by_id = {question.id: question for question in [*one_each.values()][: CONTEST_CHOICE // 2]}
    samples = [*recorded(folder, train | by_id)]
    taught = [sample for sample in samples if sample.question_id in train]
    others = [sample for sample in samples if sample.question_id in by_id]
    held_out = examples(CONTEST_ROWS["shortest"], others, by_id, base)
    return Field(
        train, choice, _questions(test), taught, held_out, CONTEST_SETTINGS, CONTEST_ROWS, max_tokens=400,
        speed_packs=16,
    )  # fmt: skip


def recorded(folder: Path, questions: dict[str, Question]) -> Iterator[Sample]:
    """The right recorded answers to these questions."""
    for model, index, question, text in right_answers(folder, questions):
        yield Sample(
            question_id=question.id, rung="recorded", model=model, sample_index=index,
            permutation=tuple(range(len(question.options))), key=f"{model}/{question.id}/{index}", text=text,
            answer=question.answer, verdict="accepted",
        )  # fmt: skip


def worlds(base: Path, *, tested: bool) -> Field:
    """The demo's 144 problems with their worked solutions, and fresh problems of whose worlds it has none: 100 to
    choose on and, where it is ``tested``, 2,000 more."""
    train = _by_id(read_problems(WORLDS_FILE, "en", labelled=True))
    fresh = _generated(WORLDS_CHOICE + WORLDS_TEST * tested, "en")
    choice, test = _questions(fresh[:WORLDS_CHOICE]), _questions(fresh[WORLDS_CHOICE:])
    rung = Rung(name="worked", kind="worked")
    taught = worked(rung, [*train.values()], WORLDS_SEED)
    some = _by_id(fresh[:WORLDS_HELD_OUT])
    held_out = examples(Row(), worked(rung, [*some.values()], WORLDS_SEED), some, base)
    return Field(train, choice, test, taught, held_out, WORLDS_SETTINGS, WORLDS_ROWS, max_tokens=96, speed_packs=12)


def _generated(count: int, language: Language) -> list[Problem]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fresh.jsonl"
        file.write_text("".join(to_line(row) for row in generate(WORLDS_SEED, count, language, "test")), "utf-8")
        return read_problems(file, language, labelled=True)


def climbed(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of the first rung that has one, for each question; of a model on no rung, all."""
    rung_of = {model: number for number, rung in enumerate(LADDER) for model in rung}
    first: dict[str, int] = {}
    for sample in samples:
        rung = rung_of.get(sample.model, 0)
        first[sample.question_id] = min(first.get(sample.question_id, rung), rung)
    return [sample for sample in samples if rung_of.get(sample.model, 0) == first[sample.question_id]]


def member(row: Row, seed: int) -> Member:
    """The row as a member of a run."""
    return Member(name="row", seed=seed, **row.mix)


def examples(
    row: Row, samples: Sequence[Sample], questions: Mapping[str, Question], base: Path, seed: int = 0
) -> list[Example]:
    """The conversations of a row."""
    mix, tokenizer = member(row, seed), models.load_tokenizer(base)
    taught = [sample for sample in samples if sample.model in row.teachers] if row.teachers else climbed(samples)
    measures = measured_by(base, tokenizer, mix, Train(max_length=CONTEST_LENGTH), questions)
    learned = mixture(mix, taught, questions, measures)
    chains = [example_of(questions[sample.question_id], sample) for sample in learned.samples]
    if not row.letters:
        return chains
    alone = mixture(mix.model_copy(update={"learns": "letters"}), taught, questions, measures)
    return chains + [at_once(example_of(questions[sample.question_id], sample)) for sample in alone.samples]


def at_once(example: Example) -> Example:
    """The conversation with a request for the answer without a chain."""
    *before, asking, answer = example.messages
    asking = asking.model_copy(update={"content": f"{asking.content}\n{AT_ONCE}"})
    return example.model_copy(update={"messages": (*before, asking, answer)})


def _questions(problems: Sequence[Problem]) -> list[Question]:
    return [*chain.from_iterable(problem.questions for problem in problems)]


def _by_id(problems: Sequence[Problem]) -> dict[str, Question]:
    return {question.id: question for question in _questions(problems)}
