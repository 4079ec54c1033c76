"""The embedded engine's decoder against continuous batching of transformers: same weights, questions and processor.

    python benchmarks/decoding.py examples/closedworld/test.jsonl [--model bundled] [--first 48] [--tokens 64]

Prints for each the processor time (of all threads), tokens and the greedy answers that differ when the first quarter of
the questions is asked without the others. Both take turns, so that what else the machine does hits both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepladder import models
from stepladder.ask.local.engine import Local
from stepladder.ask.request import Request
from stepladder.mcq.prompts import ask_messages
from stepladder.mcq.questionfile import read_problems
from stepladder.models import template


class EmbeddedEngine:
    """The embedded engine."""

    def __init__(self, folder: Path) -> None:
        self._engine = Local.load(folder, "float32")

    def answer(self, requests: Sequence[Request]) -> dict[str, str]:
        texts = {}
        for batch in self._engine.plan(requests):
            for request, response in zip(batch, self._engine.answer(batch), strict=True):
                texts[request.key] = response.text
        return texts


class ContinuousBatching:
    """``generate_batch`` of transformers with its defaults."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = models.load_tokenizer(folder)
        self._model: Any = models.load(folder, "float32")

    def answer(self, requests: Sequence[Request]) -> dict[str, str]:
        from transformers import GenerationConfig

        settings = GenerationConfig(
            max_new_tokens=requests[0].max_tokens, do_sample=False, eos_token_id=template.closing_token(self._tokenizer)
        )
        prompts = [list(template.prompt_tokens(self._tokenizer, request.messages)) for request in requests]
        outputs = self._model.generate_batch(prompts, generation_config=settings)
        by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        return {
            request.key: self._tokenizer.decode(by_prompt[tuple(prompt)], skip_special_tokens=True).strip()
            for request, prompt in zip(requests, prompts, strict=True)
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--model", default=models.BUNDLED)
    parser.add_argument("--language", default="en")
    parser.add_argument("--first", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    settings = parser.parse_args()
    folder = models.locate(settings.model)
    problems = read_problems(settings.questions, settings.language, labelled=False)
    questions = [question for problem in problems for question in problem.questions][: settings.first]
    requests = [
        Request(
            model="benchmark",
            messages=ask_messages(question, tuple(range(len(question.options))), None),
            max_tokens=settings.tokens,
        )
        for question in questions
    ]
    engines = {"embedded engine": EmbeddedEngine(folder), "continuous batching": ContinuousBatching(folder)}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    answers: dict[str, dict[str, str]] = {}
    for _ in range(settings.turns):
        for name, engine in engines.items():
            start = time.process_time()
            answers[name] = engine.answer(requests)
            seconds[name].append(time.process_time() - start)
    few = requests[: len(requests) // 4]
    for name, engine in engines.items():
        alone = engine.answer(few)
        differ = sum(alone[request.key] != answers[name][request.key] for request in few)
        print(
            f"{name}: {statistics.median(seconds[name]):.1f} s of processor time for {len(requests)} questions; "
            f"{differ} of {len(few)} answers differ without the others"
        )
    ratio = statistics.median(seconds["continuous batching"]) / statistics.median(seconds["embedded engine"])
    same = sum(
        answers["embedded engine"][key] == answers["continuous batching"][key] for key in answers["embedded engine"]
    )
    print(
        f"continuous batching takes {ratio:.2f} times the processor time; {same} of {len(requests)} answers are equal"
    )


if __name__ == "__main__":
    main()
