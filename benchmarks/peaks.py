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
import subprocess
import sys
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
from stepladder.training import merging, sharding
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


def two_ranks(root: Path) -> list[int]:
    """Peaks of two processes that load their shares of the base as training with FSDP does, bytes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, __file__, "--rank", str(root)], check=True)
    return [int((root / f"peak-{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]


def load_share(root: Path) -> None:
    """In one of the two processes: add an adapter to the base, split both, and read this process's share."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    base, settings = root / "base", Train(lora_rank=RANK, devices=2, sharding="fsdp")
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    with Peak() as peak:
        config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(sharding.student(settings, base), config)
        reader = sharding.share_reader(model, base)
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        reader.on_train_begin(None, None, None, model=model)
    if not all(isinstance(weight, DTensor) and not weight.is_meta for weight in model.parameters()):
        raise SystemExit("a weight is not split, or was not read")
    (root / f"peak-{torch.distributed.get_rank()}").write_text(str(peak.own), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


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
            shown = " and ".join(f"{peak / weights:.2f}" for peak in two_ranks(root))
        else:
            peak = int(str(forked(lambda task=task: run(task, root))))
            shown = f"{peak / weights:.2f} ({peak / 2**20:.0f} MiB)"
        print(f"  {task:10} {shown}, {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, action="append", help="folder of a model; default: two small ones")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    models.require("compressed_tensors", "datasets", "llmcompressor", "peft", "trl")
    for module in ("llmcompressor.modifiers.quantization", "transformers.models.llama.modeling_llama",
                   "transformers.models.qwen2.modeling_qwen2", "compressed_tensors.offload"):  # fmt: skip
        importlib.import_module(module)
    if arguments.rank:
        load_share(arguments.rank)
        return
    with tempfile.TemporaryDirectory() as name:
        larger_base = Path(name) / "random"
        if not arguments.base:
            forked(lambda: larger(larger_base) and None)
        for number, base in enumerate(arguments.base or [models.locate(models.BUNDLED), larger_base]):
            measure(base, Path(name) / str(number), arguments.tasks)


if __name__ == "__main__":
    main()
