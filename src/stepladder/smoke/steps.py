"""The steps of the smoke run. ``python -m stepladder.smoke.steps JOB.json`` does one, in a process of its own.

None of these has run on a card yet; `answer`, `train` and `quantise` run on a CPU in the tests.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from stepladder import models
from stepladder.config import Quantise, Serve, Train
from stepladder.models import template
from stepladder.records import Example, Message

MAX_TOKENS = 32
"""Of an answer."""
SECONDS_TO_ANSWER = 300.0
"""That a server may take for an answer."""
SERVED_NAME = "student"
Figures = dict[str, float]
"""What a step measured, by name."""


class SmokeJob(NamedTuple):
    """What a step works with."""

    model: Path
    """Folder of a small model."""
    folder: Path
    """Where it may write."""
    environment: Path
    """That vLLM is installed in."""


def answer(job: SmokeJob) -> Figures:
    """Load weights and answer a batch with the embedded engine."""
    from stepladder.ask.local.engine import Local
    from stepladder.ask.request import Request

    engine = Local.load(job.model)
    questions = [Message(role="user", content=f"What is {number} plus {number}?") for number in range(8)]
    requests = [Request(model="smoke", messages=(question,), max_tokens=MAX_TOKENS) for question in questions]
    start = time.perf_counter()
    answers = [response for group in engine.plan(requests) for response in engine.answer(group)]
    tokens = sum(response.completion_tokens for response in answers)
    return {"answers": len(answers), "tokens_per_second": round(tokens / (time.perf_counter() - start), 1)}


def train(job: SmokeJob) -> Figures:
    """Two steps of LoRA."""
    return _train(job)


def qlora(job: SmokeJob) -> Figures:
    """Two steps of LoRA on a base in 4 bits."""
    return _train(job, qlora=True)


def fsdp(job: SmokeJob) -> Figures:
    """Two steps of LoRA with weights sharded over two devices, by FSDP2."""
    return _train(job, sharding="fsdp", devices=2)


def _train(job: SmokeJob, **changes: object) -> Figures:
    from stepladder.training import distributed, trl
    from stepladder.training.data import Data

    values = {"lora_rank": 8, "lora_alpha": 16, "epochs": 1, "gradient_accumulation": 4, "max_length": 256} | changes
    settings = Train.model_validate(values | {"base": str(job.model), "batch_size": 1, "gradient_checkpointing": True})
    examples = [
        Example(
            messages=(
                Message(role="user", content=f"What is {number} plus {number}? Think step by step."),
                Message(role="assistant", content=f"{number} plus {number} is {2 * number}.\nAnswer: A"),
            ),
            question_id=f"q{number}",
            teacher="smoke",
        )
        for number in range(8)
    ]
    adapter, scratch = job.folder / "adapter", job.folder / "scratch"
    for folder in (adapter, scratch):
        folder.mkdir()
    trainer = trl.train if settings.devices == 1 else distributed.train
    start = time.perf_counter()
    trainer(settings, 1, job.model, Data(examples), adapter, scratch, lambda *_: None)
    log = (adapter / "log.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = time.perf_counter() - start
    return {"steps": len(log), "loss": json.loads(log[-1])["loss"], "training_seconds": round(seconds, 1)}


def quantise(job: SmokeJob) -> Figures:
    """GPTQ in 4 bits, and its check."""
    from stepladder.quantising import gptq

    merged, out = job.folder / "merged", job.folder / "quantised"
    shutil.copytree(job.model, merged)
    tokenizer = models.load_tokenizer(merged)
    template.write(tokenizer, merged)
    settings = Quantise(group_size=32)
    calibration = [list(tokenizer(f"{number} plus {number} is {2 * number}. " * 8)["input_ids"]) for number in range(8)]
    gptq.quantise(settings, merged, calibration, out)
    gptq.inspect(out, settings, merged)
    return {"mebibytes": round(sum(path.stat().st_size for path in out.glob("*.safetensors")) / 2**20, 1)}


def serve(job: SmokeJob) -> Figures:
    """A vLLM server that answers."""
    return _serve(job, [Serve(environment=job.environment, max_length=512, kv_cache_gib=1)])


def tensor_parallel(job: SmokeJob) -> Figures:
    """A model split over two cards by vLLM."""
    return _serve(job, [Serve(environment=job.environment, max_length=512, kv_cache_gib=1, tensor_parallel=2)])


def side_by_side(job: SmokeJob) -> Figures:
    """Two servers on the same card."""
    half = Serve(environment=job.environment, max_length=512, kv_cache_gib=1, utilisation=0.4)
    return _serve(job, [half, half])


def _serve(job: SmokeJob, settings: list[Serve]) -> Figures:
    from stepladder.serving.fleet import Fleet

    start = time.perf_counter()
    with ExitStack() as stack:
        fleets = [
            stack.enter_context(Fleet(job.model, SERVED_NAME, each, job.folder / f"fleet-{number}"))
            for number, each in enumerate(settings)
        ]
        started = time.perf_counter() - start
        tokens = [
            _ask(url, fleet.key) for fleet in fleets for url in fleet.addresses.read_text(encoding="utf-8").split()
        ]
    return {"servers": len(tokens), "start_seconds": round(started, 1), "tokens": sum(tokens)}


def _ask(url: str, key: str) -> int:
    """The tokens of a server's answer."""
    question = {"model": SERVED_NAME, "max_tokens": MAX_TOKENS, "messages": [{"role": "user", "content": "Say A."}]}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(question).encode(), headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER) as reply:  # noqa: S310  (a server of ours)
        return int(json.load(reply)["usage"]["completion_tokens"])


class SmokeStep(NamedTuple):
    """A step, and what it needs."""

    do: Callable[[SmokeJob], Figures]
    minutes: float
    """That it may take."""
    cards: int = 1
    needs_vllm: bool = False


STEPS = {
    "answer": SmokeStep(answer, 3),
    "train": SmokeStep(train, 3),
    "qlora": SmokeStep(qlora, 3),
    "fsdp": SmokeStep(fsdp, 4, cards=2),
    "quantise": SmokeStep(quantise, 4),
    "serve": SmokeStep(serve, 6, needs_vllm=True),
    "tensor_parallel": SmokeStep(tensor_parallel, 6, cards=2, needs_vllm=True),
    "side_by_side": SmokeStep(side_by_side, 8, needs_vllm=True),
}
"""By name, in their order."""


def main(job_file: Path) -> None:
    """Do the step that a job file names, and write what it measured beside it."""
    settings = json.loads(job_file.read_text(encoding="utf-8"))
    job = SmokeJob(Path(settings["model"]), job_file.parent, Path(settings["environment"]))
    figures = STEPS[settings["step"]].do(job)
    figures["host_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    if models.has_cuda():
        import torch

        figures["card_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    (job_file.parent / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
