"""From adapter to proved 4-bit weights: merging, quantising, what a sabotaged export looks like, and repairs."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from made import run_file
from rich.console import Console

from stepladder import models
from stepladder.closedworld.generate import generate, to_line
from stepladder.config import General, Quantise, load
from stepladder.context import STAGES, Context
from stepladder.documents import Distance
from stepladder.errors import GateError, InputError, ModelError, UserError
from stepladder.models import template
from stepladder.progress import Progress
from stepladder.quantising import calibration, gptq, repair
from stepladder.records import Example, Message
from stepladder.stages import flow
from stepladder.training import merging
from stepladder.training.distance import compare, next_token_log_probabilities, rows_of
from stepladder.training.sequences import tokenise
from stepladder.workspace import Workspace

pytestmark = pytest.mark.dtype

torch = pytest.importorskip("torch")


def example(number: int) -> Example:
    said = (("user", f"What is {number} and {number * 7}?"), ("assistant", f"It is {number * 8}.\nAnswer: A"))
    messages = tuple(Message.model_validate({"role": role, "content": content}) for role, content in said)
    return Example(messages=messages, question_id=f"q{number}", teacher="t")


EXAMPLES = [example(number) for number in range(16)]


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter whose product is far from zero."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(models.load(base), config)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(str(folder))
    template.write(models.load_tokenizer(base), folder)
    return folder


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    merging.merge(base, adapter, folder)
    return folder


@pytest.fixture(scope="module")
def rows(base: Path) -> list[list[int]]:
    return [row.ids for row in tokenise(models.load_tokenizer(base), EXAMPLES, 200)]


@pytest.fixture(scope="module")
def four_bit(merged: Path, rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    gptq.quantise(Quantise(), merged, rows, folder)
    return folder


def apart(one: Path, other: Path) -> Distance:
    chats = rows_of(models.load_tokenizer(one), EXAMPLES, 200)
    return compare(next_token_log_probabilities(one, chats), next_token_log_probabilities(other, chats))


def test_merging_folds_in_what_peft_would_shard_by_shard(base: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    sharded, folder = tmp_path / "sharded", tmp_path / "merged"
    folder.mkdir()
    models.load(base).save_pretrained(sharded, max_shard_size="2MB")
    models.load_tokenizer(base).save_pretrained(sharded)
    merging.merge(sharded, adapter, folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    wanted = PeftModel.from_pretrained(models.load(base), adapter).merge_and_unload().state_dict()
    for name, weight in models.load(folder).state_dict().items():
        torch.testing.assert_close(weight, wanted[name], atol=1e-6, rtol=1e-5)
    assert merging.prove(base, adapter, folder, EXAMPLES, 200).kl < 1e-6


def test_a_merge_that_went_wrong_is_not_passed_on(base: Path, adapter: Path) -> None:
    with pytest.raises(GateError, match="nats a token away from base and adapter"):
        merging.prove(base, adapter, base, EXAMPLES, 200)


def test_what_cannot_be_folded_in_is_said(base: Path, adapter: Path, four_bit: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is quantised; train on and merge into the unquantised base"):
        merging.merge(four_bit, adapter, tmp_path)
    other = tmp_path / "dora"
    shutil.copytree(adapter, other)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"use_dora": True}
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="use_dora = True is more than plain LoRA"):
        merging.merge(base, other, tmp_path)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_export_says_what_it_is_and_is_near_its_weights(
    merged: Path, rows: list[list[int]], tmp_path: Path, method: str, bits: int
) -> None:
    settings = Quantise.model_validate({"method": method, "bits": bits})
    told: list[tuple[int, int]] = []
    gptq.quantise(settings, merged, rows, tmp_path, report=lambda done, total: told.append((done, total)))
    assert told == ([(number, 14) for number in range(1, 15)] if method == "gptq" else [])  # 7 in each of two blocks
    gptq.inspect(tmp_path, settings, merged)
    assert gptq.claims(tmp_path) == [(bits, 32)]  # the largest that divides 32 and 64
    distance = apart(merged, tmp_path)
    assert 0 < distance.kl < (0.5 if bits == 4 else 0.002)


def test_symmetric_scales_fit_the_weights_and_not_their_largest(merged: Path, four_bit: Path) -> None:
    """By default every group's largest weight stood at 7.5 steps, between two of them (docs/experiments.md)."""
    from safetensors.torch import load_file

    weights, packed = models.load(merged).state_dict(), load_file(four_bit / "model.safetensors")
    steps = []
    for name, scale in packed.items():
        if name.endswith("weight_scale"):
            weight = weights[name.removesuffix("_scale")].float().reshape(*scale.shape, -1)
            steps.append((weight.abs().amax(-1) / scale.float()).flatten())
    assert ((torch.cat(steps) - 7.5).abs() < 0.03).float().mean() < 0.5


def test_a_group_size_that_does_not_divide_is_refused(merged: Path, rows: list[list[int]], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"group_size 48 does not divide the 32 inputs of model\.layers\.0"):
        gptq.quantise(Quantise(group_size=48), merged, rows, tmp_path)


def test_a_group_size_is_held_against_the_base_before_a_run_begins(tmp_path: Path) -> None:
    for size in (32, 128):
        context = Context.open(run_file(tmp_path, f"quantise = {{ group_size = {size} }}"), tmp_path / "runs")
        refused = pytest.raises(UserError, match="128 does not divide the 576 inputs of a layer of bundled; use a")
        with refused if size == 128 else nullcontext():
            flow.check_group_size(context)


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


def not_a_number(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_scale"][0] = float("nan")


SABOTAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "another group size": (lambda f: edit_config(f, '"group_size": 32', '"group_size": 64'), "groups of 64"),
    "other bits": (lambda f: edit_config(f, '"num_bits": 4', '"num_bits": 8'), "8 bits"),
    "no word of it": (lambda f: edit_config(f, "quantization_config", "other"), "names no quantisation"),
    "scales that are not numbers": (lambda f: edit_tensors(f, not_a_number), "not numbers"),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_an_export_that_contradicts_itself_is_refused(name: str, merged: Path, four_bit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(four_bit, folder)
    change, said = SABOTAGE[name]
    change(folder)
    with pytest.raises(GateError, match=said):
        gptq.inspect(folder, Quantise(), merged)


def test_scales_in_another_order_do_not_fit(merged: Path, four_bit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(four_bit, folder)
    gptq.inspect(folder, Quantise(), merged)
    scales = "model.layers.1.mlp.down_proj.weight_scale"
    edit_tensors(folder, lambda tensors: tensors.update({scales: tensors[scales].flip(0)}))
    with pytest.raises(GateError, match=r"the scales of model\.layers\.1\.mlp\.down_proj do not fit its weights"):
        gptq.inspect(folder, Quantise(), merged)


def test_the_worst_layers_get_more_bits(merged: Path, four_bit: Path, rows: list[list[int]], tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(four_bit, folder)
    edit_tensors(folder, lambda tensors: tensors.update({
        "model.layers.1.self_attn.k_proj.weight_scale": 2 * tensors["model.layers.1.self_attn.k_proj.weight_scale"]
    }))  # fmt: skip
    worst = repair.worst_layers(merged, folder, rows)
    assert worst == [f"model.layers.1.self_attn.{name}_proj" for name in "kqv"]  # servers compute the three as one
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    gptq.quantise(Quantise(), merged, rows, mixed, worst)
    gptq.inspect(mixed, Quantise(), merged)
    assert sorted(gptq.claims(mixed)) == [(4, 32), (8, 32)]
    whole, *exported = (gptq.linears(models.load(each))[worst[0]].weight.detach() for each in (merged, mixed, four_bit))
    in_8_bits, in_4_bits = (float((weight - whole).abs().mean()) for weight in exported)
    assert in_8_bits < in_4_bits / 4


def test_recovery_tuning_brings_a_model_nearer_and_leaves_packed_weights_alone(
    merged: Path, four_bit: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "tuned"
    shutil.copytree(four_bit, folder)
    chains = tokenise(models.load_tokenizer(merged), EXAMPLES, 200)
    repair.recover(merged, folder, chains)
    before, after = load_file(four_bit / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.endswith("norm.weight") for name in changed)
    assert apart(merged, folder).kl < apart(merged, four_bit).kl


SAID = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]
ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "All of it. 全部。"},
    "messages": {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]},
    "sharegpt": {"conversations": SAID},
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "pairs": {"prompt": "Hi?", "completion": "Ho."},
    "both": {"instruction": "Add.", "output": "3", "text": "### Instruction: Add. ### Response: 3"},
    "cut": {"conversations": [{"from": "gpt", "value": "on."}, *SAID, {"from": "human", "value": "And?"}]},
}


@pytest.mark.parametrize("name", ROWS)
def test_general_text_comes_in_all_common_forms(name: str, base: Path, tmp_path: Path) -> None:
    source = tmp_path / "general.jsonl"
    source.write_text("".join(json.dumps(ROWS[name] | {"n": n}) + "\n" for n in range(9)))
    tokenizer = models.load_tokenizer(base)
    wanted = General(source=str(source), samples=4, max_length=16)
    found = calibration.general(tokenizer, wanted, random.Random(1))
    assert len(found) == 4
    assert all(0 < len(ids) <= 16 for ids in found)
    whole = calibration.general(tokenizer, General(source=str(source), samples=1, max_length=500), random.Random(1))
    assert ("<|im_start|>user" in str(tokenizer.decode(whole[0]))) == (name != "text")


def test_general_text_that_cannot_be_had_is_said(base: Path, tmp_path: Path) -> None:
    tokenizer, draw = models.load_tokenizer(base), random.Random(1)
    source = tmp_path / "general.jsonl"
    source.write_text('{"text": "a"}\n{"other": 1}\n')
    assert len(calibration.general(tokenizer, General(source=str(source), samples=1), draw)) == 1
    with pytest.raises(InputError, match=r"has 1 rows with text, but \[\[quantise\.general\]\] samples = 2"):
        calibration.general(tokenizer, General(source=str(source), samples=2), draw)
    source.write_text('{"other": 1}\n[1]\n')
    with pytest.raises(
        InputError, match=r"general\.jsonl: holds no text that is understood .*; known fields: messages"
    ):
        calibration.general(tokenizer, General(source=str(source), samples=1), draw)
    with pytest.raises(InputError, match="no such file"):
        calibration.general(tokenizer, General(source=str(tmp_path / "none.jsonl"), samples=1), draw)


TOML = """
name = "tiny"
language = "en"

[questions]
train = "train.jsonl"
validation = 0.3

[[rung]]
name = "worked"
kind = "worked"

[train]
base = "{base}"
lora_rank = 4
lora_alpha = 8
epochs = 1
learning_rate = 1e-2

[[member]]
name = "all"

[quantise]
samples = 4
max_loss = 1.0
max_kl = {max_kl}
repairs = {repairs}

[predict]
max_tokens = 4
"""


def run(folder: Path) -> str:
    """The stages up to the quantised weights, in this process; what the terminal showed."""
    shown = StringIO()
    context = Context(
        load(folder / "run.toml"), Workspace(folder / "runs", "tiny"), Progress(Console(file=shown, width=500))
    )
    flow.run(context, STAGES[: STAGES.index("quantised") + 1])
    return shown.getvalue()


@pytest.fixture(scope="module")
def project(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its quantised weights."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "train.jsonl").write_text("".join(map(to_line, generate(2024, 4, "en", "train"))), encoding="utf-8")
    (folder / "run.toml").write_text(TOML.format(base=merged, max_kl=1.0, repairs="[]"))
    run(folder)
    return folder


def verdict(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "runs/tiny/quantised/all/verdict.json").read_text())
    return read


def test_the_verdict_and_the_card_say_what_was_measured(project: Path) -> None:
    found = verdict(project)
    (attempt,) = found["attempts"]
    assert attempt["repair"] is None
    assert attempt["why"] == [] == found["why"]
    assert attempt["kl"] == found["distance"]["kl"] > 0
    assert json.loads((project / "runs/tiny/merged/all/merge.json").read_text())["kl"] < 1e-6
    card = (project / "runs/tiny/quantised/all/README.md").read_text()
    assert card.startswith("---\nbase_model: ")
    assert "\nlanguage:\n- en\nlibrary_name: transformers\n" in card
    assert f"{found['distance']['kl']:.4f} nats" in card
    texts = [p.read_text() for p in (project / "runs/tiny/quantised/all").iterdir() if p.suffix != ".safetensors"]
    assert not any(str(project) in text for text in texts)  # nothing of this machine goes out with it


def test_what_fails_the_gate_is_repaired_step_by_step(project: Path, merged: Path) -> None:
    kl = verdict(project)["distance"]["kl"]
    (project / "run.toml").write_text(TOML.format(base=merged, max_kl=kl / 20, repairs='["calibration", "8bit"]'))
    run(project)
    found = verdict(project)
    assert [(row["repair"], row["bits"], bool(row["why"])) for row in found["attempts"]] == [
        (None, 4, True), ("calibration", 4, True), ("8bit", 8, False),
    ]  # fmt: skip
    assert found["form"]["bits"] == 8
    assert "repaired by '8bit'" in (project / "runs/tiny/quantised/all/README.md").read_text()


def test_what_no_repair_saves_fails_the_run_and_leaves_what_was_there(project: Path, merged: Path) -> None:
    before = verdict(project)
    (project / "run.toml").write_text(TOML.format(base=merged, max_kl=1e-12, repairs='["recovery"]'))
    with pytest.raises(GateError, match=r"more than max_kl = 1e-12.* \(repairs tried: recovery\)"):
        run(project)
    assert verdict(project) == before


def test_too_few_answers_are_asked_for_more_and_the_verdict_says_so(project: Path, merged: Path) -> None:
    toml = TOML.format(base=merged, max_kl=1.0, repairs="[]").replace("max_loss = 1.0", "max_loss = 0.001")
    (project / "run.toml").write_text(toml)
    shown = run(project)
    found = verdict(project)
    test = found["accuracy"]
    assert (test["decision"], test["margin"]) == ("cannot tell", 0.001)
    assert found["n"] < test["answers"] <= 8 * found["n"], "accuracy is that of the options' own order"
    assert test["needed"] > test["answers"]
    assert "too few answers to tell whether max_loss = 0.001 is kept" in shown
    assert "quantised/all passes, but: cannot tell whether validation accuracy fell by max_loss = 0.001" in shown

    (project / "run.toml").write_text(toml.replace("[predict]", 'undecided = "fail"\nmax_orders = 1\n\n[predict]'))
    with pytest.raises(GateError, match=r"cannot tell whether .*: raise max_orders \(now 1\), or \[questions\] valid"):
        run(project)
    assert verdict(project) == found


def test_the_number_format_is_on_record_and_a_change_is_said(
    project: Path, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = models.dtype_name()
    other = {"float32": "bfloat16", "bfloat16": "float32"}[here]
    manifest = json.loads((project / "runs/tiny/adapter/all/manifest.json").read_text())
    assert (manifest["dtype"], "dtype" in manifest["settings"]["train"]) == (here, False)
    assert verdict(project)["dtype"] == {"trained": here, "quantised": here, "measured": here}
    assert f"the base in {here}" in (project / "runs/tiny/quantised/all/README.md").read_text()

    monkeypatch.setenv(models.DTYPE_VARIABLE, other)
    (project / "run.toml").write_text(TOML.format(base=merged, max_kl=2.0, repairs="[]"))
    shown = run(project)
    assert "adapter/all              up to date" in shown, "auto is no setting: what another machine made stays"
    said = f"quantised/all is computed in {other}, and adapter/all, merged/all were in {here}; set dtype in [train]"
    assert said in shown
    assert verdict(project)["dtype"] == {"trained": here, "quantised": other, "measured": other}

    asked = TOML.format(base=merged, max_kl=2.0, repairs="[]").replace("[train]", f'[train]\ndtype = "{here}"')
    (project / "run.toml").write_text(asked)
    assert "adapter/all              up to date" not in run(project), "what was asked for is one"


def test_answers_in_a_format_that_was_asked_for_are_answers_of_somebody_else(merged: Path) -> None:
    assert models.identity(merged) == models.content_digest(merged)
    assert len({models.identity(merged, dtype) for dtype in ("auto", "float32", "bfloat16")}) == 3
