"""Layer by layer: the bits of the whole model, while memory holds one layer of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepladder import models
from stepladder.errors import ModelError
from stepladder.models import template
from stepladder.models.layerwise import Layerwise
from stepladder.models.weight_files import WeightFiles, replace_tensor

pytestmark = pytest.mark.dtype

torch = pytest.importorskip("torch")

ROWS = [list(range(5, 45)), list(range(7, 30)), [9, 8, 7]]
SCORED = [range(20, 39), range(21, 22), range(2)]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2: biases, grouped queries, a head of its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")  # type: ignore[no-untyped-call]
    return folder


def whole(folder: Path) -> list[Any]:
    model = models.load(folder, "float32")
    model.train(False)
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in ROWS]
    return [torch.log_softmax(row[list(scored)], -1) for row, scored in zip(logits, SCORED, strict=True)]


@pytest.mark.parametrize("kind", ["untied", "base"])
def test_the_results_are_those_of_the_whole_model(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    model = Layerwise(folder, "float32")
    parts = list(model.log_probabilities(model.hidden_states(ROWS), SCORED))
    for part, expected in zip(parts, whole(folder), strict=True):
        assert torch.equal(part, expected)


def test_one_layer_at_a_time_has_weights(untied: Path) -> None:
    model = Layerwise(untied, "float32")
    sizes: list[int] = []

    def count(*_: object) -> None:
        held = {name for name, weight in model.model.named_parameters() if weight.device.type != "meta"}
        assert len({name.split(".")[2] for name in held if ".layers." in name}) == 1
        sizes.append(len(held))

    for layer in model.model.base_model.layers:  # type: ignore[union-attr]
        layer.self_attn.register_forward_hook(count)
    list(model.log_probabilities(model.hidden_states(ROWS), SCORED))
    assert sizes == [12] * 9  # three layers, three rows; seven weights, three biases, two norms
    assert {weight.device.type for weight in model.model.parameters()} == {"meta"}


def test_nothing_of_a_generator_that_waits_holds_in_its_callers_code(untied: Path) -> None:
    model = Layerwise(untied, "float32")
    waiting = model.log_probabilities(model.hidden_states(ROWS), SCORED)
    next(waiting)
    assert torch.is_grad_enabled()


def test_a_missing_tensor_is_said(untied: Path, tmp_path: Path) -> None:
    for path in untied.iterdir():
        if not path.name.startswith("model-00002"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    model = Layerwise(tmp_path, "float32")
    with pytest.raises(ModelError, match=r"tensor .* is missing\); give a complete, undamaged folder"):
        model.hidden_states(ROWS)


def test_a_tensor_is_replaced_in_its_file(untied: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for path in untied.glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = WeightFiles(untied)
    (file,) = [path for path in tmp_path.glob("*.safetensors") if name in _names(path)]
    replace_tensor(file, name, torch.ones(96, 64, dtype=torch.bfloat16))
    after = WeightFiles(tmp_path)
    assert {other for other in after.names if not torch.equal(before.read(other), after.read(other))} == {name}
    assert torch.equal(after.read(name), torch.ones(96, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="has 12288 bytes, not 24576"):
        replace_tensor(file, name, torch.ones(96, 64))


def _names(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def test_an_adapter_is_computed_with(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(1)
    tuned = get_peft_model(models.load(base), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    tuned.save_pretrained(str(tmp_path))
    template.write(models.load_tokenizer(base), tmp_path)
    adapted = PeftModel.from_pretrained(models.load(base), tmp_path).eval()
    with torch.no_grad():
        expected = torch.log_softmax(adapted(input_ids=torch.tensor([ROWS[0]])).logits[0, list(SCORED[0])].float(), -1)
    model = Layerwise(base, adapter=tmp_path)
    (part,) = model.log_probabilities(model.hidden_states(ROWS[:1]), SCORED[:1])
    assert torch.equal(part, expected)
