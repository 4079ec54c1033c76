"""Peak memory of what handles whole models, as a multiple of their weights, on this machine.

    python benchmarks/peaks.py [--base FOLDER ...] [--tasks NAME ...]

Each task runs in a process of its own, forked from one that has the libraries. Its peak is of memory that no file backs
(RssAnon, read every 10 ms): pages of weight files that are only read are the system's cache, and given back when memory
is short. What the process held before the task is subtracted. Weights and layers are counted in the number format that
is computed in (STEPLADDER_DTYPE); a layer is a decoder layer or the embeddings, whichever is larger.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from memory import larger
from training import examples

from stepladder import models
from stepladder.config import Quantise, Train
from stepladder.forecast import model_shape
from stepladder.models import template
from stepladder.quantising import gptq, repair
from stepladder.training import distributed, merging
from stepladder.training.data import Data
from stepladder.training.distance import next_token_log_probabilities
from stepladder.training.sequences import tokenise

SAMPLES, LENGTH, RANK = 16, 512, 8
INTERVAL_SECONDS = 0.01
TASKS = ("merge", "prove", "distance", "gptq", "rounding", "misfits", "mixed", "recovery", "two ranks")


def resident(pid: int | str) -> int:
    """Bytes of a process that no file backs; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    held = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(held[1]) * 1024 if held else 0


class Peak:
    """Context manager that measures the highest memory of this process, and of its children's sum, above the start."""

    def __enter__(self) -> Peak:
        self.start, self.own, self.children = resident("self"), 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_SECONDS):
            self.own = max(self.own, resident("self") - self.start)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def prepare(base: Path, root: Path, *, whole: bool) -> None:
    """The folders that tasks start from: base, and if ``whole`` adapter, merged and four."""
    import torch
    from peft import LoraConfig, get_peft_model

    shutil.copytree(base, root / "base", symlinks=False)
    template.write(models.load_tokenizer(base), root / "base")
    if not whole:
        return
    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(models.load(base, "bfloat16"), config)
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.005)
    tuned.save_pretrained(str(root / "adapter"))
    template.write(models.load_tokenizer(base), root / "adapter")
    (root / "merged").mkdir()
    merging.merge(root / "base", root / "adapter", root / "merged")
    (root / "four").mkdir()
    gptq.quantise(Quantise(group_size=32, method="rtn"), root / "merged", [], root / "four")


def run(task: str, root: Path) -> int:
    """Do a task; returns its peak, bytes."""
    chains = examples(root, SAMPLES, 1)
    tokenizer = models.load_tokenizer(root / "base")
    rows = tokenise(tokenizer, chains, LENGTH)[:SAMPLES]
    ids = [row.ids for row in rows]
    base, adapter, merged, four = (root / name for name in ("base", "adapter", "merged", "four"))
    out = Path(tempfile.mkdtemp(dir=root))
    models.require("compressed_tensors", "datasets", "llmcompressor", "peft", "trl")
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    scales = {} if task != "misfits" else read_scales(four)
    if task == "recovery":
        out.rmdir()
        shutil.copytree(four, out)
    tasks: dict[str, Callable[[], object]] = {
        "merge": lambda: merging.merge(base, adapter, out),
        "prove": lambda: merging.prove(base, adapter, merged, chains, LENGTH),
        "distance": lambda: next_token_log_probabilities(four, rows[:4]),
        "gptq": lambda: gptq.quantise(Quantise(group_size=32), merged, ids, out),
        "rounding": lambda: gptq.quantise(Quantise(group_size=32, method="rtn"), merged, ids, out),
        "misfits": lambda: gptq.misfits(merged, four, scales),
        "mixed": lambda: repair.worst_layers(merged, four, ids),
        "recovery": lambda: repair.recover(merged, out, rows),
    }
    with Peak() as peak:
        tasks[task]()
    return peak.own


def read_scales(folder: Path) -> dict[str, object]:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    return {name.removesuffix(".weight_scale"): t for name, t in tensors.items() if name.endswith(".weight_scale")}


def tiny(folder: Path) -> Path:
    """A model whose weights take next to nothing, to measure what the libraries take."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = models.load_tokenizer(models.locate(models.BUNDLED))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def two_ranks(base: Path, root: Path) -> list[int]:
    """Highest memory of each of two processes that train one step with FSDP, bytes, libraries included."""
    folder, scratch = Path(tempfile.mkdtemp(dir=root)), Path(tempfile.mkdtemp(dir=root))
    settings = Train(
        lora_rank=RANK, batch_size=1, gradient_accumulation=2, max_length=LENGTH, epochs=1, devices=2, sharding="fsdp",
        save_steps=10_000, gradient_checkpointing=True,
    )  # fmt: skip
    chains = [chain for chain in examples(root, 4, 1) if len(str(chain.messages)) < 600][:2] or examples(root, 4, 1)[:2]
    peaks: dict[int, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL_SECONDS):
            for path in Path("/proc").glob("[0-9]*"):
                try:
                    words = (path / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if (
                    b"stepladder.training.distributed" in words
                    and str(scratch).encode() in words[-2]
                    and b"-u" in words
                ):
                    peaks[int(path.name)] = max(peaks.get(int(path.name), 0), resident(path.name))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        distributed.train(settings, 1, base, Data(chains), folder, scratch, lambda *_: None)
    finally:
        ended.set()
        thread.join()
    return sorted(peaks.values(), reverse=True)


def forked(work: Callable[[], object]) -> object:
    """What ``work`` returns, done in a process of its own that has the libraries of this one and nothing else."""
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        try:
            with os.fdopen(write_end, "w") as out:
                json.dump(work(), out)
            os._exit(0)
        except BaseException:  # noqa: BLE001  (the parent says that it failed)
            traceback.print_exc()
            os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end) as answer:
        text = answer.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("a task failed")
    return json.loads(text)


def measure(base: Path, root: Path, tasks: list[str]) -> None:
    root.mkdir()
    forked(lambda: prepare(base, root, whole=tasks != ["two ranks"]))
    shape = model_shape.read(base)
    each = models.compute_dtype().itemsize
    weights = shape.parameters * each
    layer = max(shape.linear_parameters / shape.layers, shape.vocabulary * shape.hidden) * each
    size = f"{shape.parameters / 1e6:.0f} M parameters, {weights / 2**20:.0f} MiB in {models.dtype_name()}"
    print(f"{base.name}: {size}; a layer is {layer / weights:.2f} of it", flush=True)
    for task in tasks:
        start = time.monotonic()
        if task == "two ranks":
            forked(lambda: tiny(root / "tiny") and None)
            libraries = two_ranks(root / "tiny", root)[-1]
            shown = " and ".join(f"{(peak - libraries) / weights:.2f}" for peak in two_ranks(root / "base", root))
        else:
            peak = int(str(forked(lambda task=task: run(task, root))))
            shown = f"{peak / weights:.2f} ({peak / 2**20:.0f} MiB)"
        print(f"  {task:10} {shown}, {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, action="append", help="folder of a model; default: two small ones")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    arguments = parser.parse_args()
    models.require("compressed_tensors", "datasets", "llmcompressor", "peft", "trl")
    for module in ("llmcompressor.modifiers.quantization", "transformers.models.llama.modeling_llama",
                   "transformers.models.qwen2.modeling_qwen2", "compressed_tensors.offload"):  # fmt: skip
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as name:
        larger_base = Path(name) / "random"
        if not arguments.base:
            forked(lambda: larger(larger_base) and None)
        for number, base in enumerate(arguments.base or [models.locate(models.BUNDLED), larger_base]):
            measure(base, Path(name) / str(number), arguments.tasks)


if __name__ == "__main__":
    main()
