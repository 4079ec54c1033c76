"""GPTQ through gptqmodel, into the classic ``gptq`` format, as a subprocess in the environment that ms-swift is in.

vLLM reads that format with symmetric weights, groups of 32, 64 or 128 and no activation order.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from stepladder import models
from stepladder.config import Quantise
from stepladder.errors import UserError
from stepladder.models import template
from stepladder.models.files import refuse_code
from stepladder.quantising.gptq import group_size, linears
from stepladder.supervise import child_environment, supervised
from stepladder.training.data import log_tail
from stepladder.training.swift import OFFLINE, python

_QUANTISE_SCRIPT = """
import json, sys
from gptqmodel import GPTQModel, QuantizeConfig
merged, rows, out, bits, group_size = sys.argv[1:]
config = QuantizeConfig(
    bits=int(bits), group_size=int(group_size), sym=True, desc_act=False, act_group_aware=True, offload_to_disk=False
)
model = GPTQModel.load(merged, config, trust_remote_code=False)
calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.load(open(rows))]
model.quantize(calibration, batch_size=1, calibration_data_min_length=1)
model.save(out)
"""


def quantise(
    settings: Quantise, environment: Path, merged: Path, calibration: Sequence[list[int]], folder: Path
) -> None:
    """As :func:`stepladder.quantising.gptq.quantise`, but by gptqmodel.

    Raises:
        ModelError: ``group_size`` does not divide a layer's input width.
        TemplateError: ``merged`` has another template than it was trained with.
        UserError: the environment is not there, or gptqmodel failed; the end of its output is shown.
    """
    refuse_code(merged, "gptqmodel")
    tokenizer = models.load_tokenizer(merged)
    template.check(tokenizer, merged)
    size = group_size(settings, linears(models.skeleton(merged)))
    work = folder.resolve() / "gptqmodel"  # it writes a folder of logs where it runs
    work.mkdir()
    rows, out, log = (work / name for name in ("calibration.json", "out", "log"))
    rows.write_text(json.dumps(calibration), encoding="utf-8")
    command = [python(environment).absolute(), "-c", _QUANTISE_SCRIPT, merged.resolve(), rows, out, settings.bits, size]
    workers = {"GPTQMODEL_CPU_WORKERS": str(os.cpu_count() or 1)}
    with supervised([str(word) for word in command], log, child_environment() | OFFLINE | workers, work) as child:
        child.wait()
    if child.returncode:
        raise UserError(f"gptqmodel ended with {child.returncode}: ... {log_tail(log)}")
    for path in out.iterdir():
        if path.suffix in {".json", ".safetensors"} and not path.name.startswith(("tokenizer", "quant_log")):
            path.rename(folder / path.name)
    shutil.rmtree(work)
    tokenizer.save_pretrained(folder)
    template.write(tokenizer, folder)
