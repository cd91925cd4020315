"""Loading and saving: what comes back is what was saved, and nothing from a folder is ever run."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from specs.schema.pipeline import KINDS
from tasks.context import StepError
from tasks.models import load, load_tokenizer, save
from tasks.models.check import weights_in
from tasks.models.layout import embeddings, linear_layers, tied_weights
from tasks.models.transforms import read_extras, transform
from tasks.registry import find
from tests.support import as_artifact, context, tiny_model

IDS = torch.tensor([[1, 70, 80, 90, 2]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


STEPS: dict[str, dict[str, Any]] = {
    "finetune": {},
    "prune": {"sparsity": 0.5},
    "quantize": {},
    "distill": {"teacher": "t", "student": {"layers": 1}},
    "attention": {},
    "adaptive_input": {"ratio": "4x"},
    "export_onnx": {},
    "export_tflite": {},
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path, llama, value):
    model: Any = load(llama)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = value
    save(model, tmp_path, llama)
    with pytest.raises(StepError, match=r"layers\.1\.mlp\.up_proj\.weight holds weights that are not finite; take"):
        load(tmp_path)


def test_every_step_blames_the_weights_that_are_no_numbers(tmp_path, llama, text_data):
    model: Any = load(llama)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    save(model, tmp_path / "broken", llama)
    assert set(STEPS) == set(KINDS) - {"select"}
    for name, fields in STEPS.items():
        step = find(KINDS[name])
        ctx = context(tmp_path / name, "text-generation", text_data)
        with pytest.raises(StepError, match=r"^model\.norm\.weight holds weights that are not finite"):
            step.function(as_artifact(tmp_path / "broken"), spec=step.spec(uses=name, id="s", **fields), ctx=ctx)
        assert list(ctx.out.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_what_is_saved_comes_back(request, tmp_path, family):
    folder = request.getfixturevalue(family)
    model = load(folder)
    save(model, tmp_path / "copy", folder)
    again = load(tmp_path / "copy")
    assert not again.training
    assert torch.equal(logits(model), logits(again))
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert load_tokenizer(tmp_path / "copy")("the fox").input_ids == load_tokenizer(folder)("the fox").input_ids


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_halves_are_stored_as_such_and_compute_in_float32(llama, tmp_path, dtype, stored):
    from transformers import AutoModelForCausalLM

    save(load(llama).to(dtype), tmp_path, llama, compute_dtype="float32")
    assert set(weights_in(tmp_path).dtypes) == {stored}
    assert read_extras(tmp_path).compute_dtype == "float32"
    model = load(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.allclose(logits(model), logits(load(llama)), atol=0.05)
    assert next(AutoModelForCausalLM.from_pretrained(tmp_path).parameters()).dtype == dtype


def test_tied_embeddings_stay_tied_and_are_stored_once(gpt2, tmp_path):
    model = load(gpt2)
    assert tied_weights(model) == {"lm_head.weight": "transformer.wte.weight"}
    save(model, tmp_path)
    assert weights_in(tmp_path).parameters == sum(parameter.numel() for parameter in model.parameters())
    assert tied_weights(load(tmp_path)) == tied_weights(model)


def test_layout_covers_conv1d_and_says_what_is_tied(gpt2):
    layers = {layer.name: layer for layer in linear_layers(load(gpt2))}
    attention = layers["transformer.h.0.attn.c_attn"]
    assert (attention.kind, attention.shape, tuple(attention.weight.shape)) == ("conv1d", (96, 32), (32, 96))
    head = layers["lm_head"]
    assert (head.kind, head.tied, head.shape) == ("linear", "transformer.wte.weight", (320, 32))
    assert len(layers) == 2 * 4 + 1
    tables = {table.name: table.tied for table in embeddings(load(gpt2))}
    assert tables == {"transformer.wte": ("lm_head",), "transformer.wpe": ()}


def test_layout_covers_every_linear_of_bert_and_llama(bert, llama):
    for folder in (bert, llama):
        model = load(folder)
        expected = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        assert [layer.name for layer in linear_layers(model)] == expected
        assert tied_weights(model) == {}


def test_layout_of_a_model_that_is_itself_a_linear_layer():
    (layer,) = linear_layers(nn.Linear(3, 2))
    assert (layer.name, layer.weight_name, layer.shape) == ("", "weight", (2, 3))


class Doubled(nn.Module):
    """A linear layer that keeps half its weight, in another form."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("halved", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, 2 * self.halved.float())


@transform("test-doubled")
def _replay_doubled(model, entry):
    for name in entry["layers"]:
        weight = model.get_submodule(name).weight
        model.set_submodule(name, Doubled(torch.empty(weight.shape, dtype=torch.float16)))


def test_transforms_are_replayed_before_the_weights_are_set(llama, tmp_path):
    model = load(llama)
    for name in ("lm_head", "model.layers.0.mlp.up_proj"):
        model.set_submodule(name, Doubled((model.get_submodule(name).weight / 2).half()))
    layers = ["lm_head", "model.layers.0.mlp.up_proj"]
    save(model, tmp_path, llama, transforms=[{"name": "test-doubled", "layers": layers}])
    again = load(tmp_path)
    assert isinstance(again.get_submodule("lm_head"), Doubled)
    assert torch.equal(logits(model), logits(again))
    assert weights_in(tmp_path).dtypes["F16"] == 320 * 32 + 64 * 32


def test_shared_tensors_of_transformed_models_are_stored_once(gpt2, tmp_path):
    model = load(gpt2)
    model.set_submodule("transformer.h.0.attn.c_proj", Doubled(torch.zeros(32, 32, dtype=torch.float16)))
    entry = {"name": "test-doubled", "layers": ["transformer.h.0.attn.c_proj"]}
    save(model, tmp_path, gpt2, transforms=[entry])
    assert read_extras(tmp_path).aliases == {"lm_head.weight": "transformer.wte.weight"}
    again = load(tmp_path)
    assert tied_weights(again) == {"lm_head.weight": "transformer.wte.weight"}
    assert torch.equal(logits(model), logits(again))


def test_an_unknown_transform_is_told(llama, tmp_path):
    save(load(llama), tmp_path, llama, transforms=[{"name": "int8-dynamik"}])
    with pytest.raises(StepError, match="'int8-dynamik', which this version does not have"):
        load(tmp_path)


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def edit_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_pickles_are_refused_with_a_way_out_that_works(llama, tmp_path):
    import subprocess
    import sys

    folder = copy(llama, tmp_path / "model")
    torch.save(load(llama).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(StepError, match="only as a pickle") as refused:
        load(folder)
    code = str(refused.value).split('python -c "')[1].split('"')[0]
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert torch.equal(logits(load(folder)), logits(load(llama)))


def test_code_in_a_folder_is_never_run(llama, tmp_path):
    folder = copy(llama, tmp_path / "model")
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\nEvilConfig = Evil\n")
    mapping = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.E", None]}
    edit_config(folder, auto_map=mapping)
    assert torch.equal(logits(load(folder)), logits(load(llama)))
    edit_config(folder, model_type="evil")
    with pytest.raises(StepError, match="'evil' exists only as code in the folder"):
        load(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
    )
    with suppress(StepError):
        load_tokenizer(folder)
    assert not canary.exists()


def test_missing_weights_are_an_error_and_not_random(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy(llama, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepError, match=r"1 weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), "names no model_type"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: edit_config(folder, model_type="nope"), "'nope' is unknown"),
        (lambda folder: edit_config(folder, architectures=["LlamaModel"]), "LlamaModel has no head"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: (folder / "lathe.json").write_text('{"version": 9}'), "damaged"),
    ],
)
def test_unfit_folders_are_told(llama, tmp_path, spoil, message):
    folder = copy(llama, tmp_path / "model")
    spoil(folder)
    with pytest.raises(StepError, match=message):
        load(folder)


def test_a_folder_without_tokenizer_is_told(tmp_path):
    with pytest.raises(StepError, match=r"has no tokenizer; name one in model\.tokenizer"):
        load_tokenizer(tmp_path)


def test_tiny_models_are_the_same_every_time(tmp_path):
    one, two = (tiny_model(tmp_path / name, "llama", "text-generation") for name in ("one", "two"))
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
