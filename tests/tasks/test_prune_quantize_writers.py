"""Pruning and quantizing models that write: what is tied stays tied, and they write as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from specs.schema.steps.finetune import TrainingSpec
from specs.schema.steps.prune import PruneSpec
from specs.schema.steps.quantize import QuantizeSpec
from tasks.compress import packed
from tasks.compress.calibrate import outputs
from tasks.compress.packing import pack_int8
from tasks.compress.prune import prune
from tasks.compress.quantize import quantize, relative_error
from tasks.compress.selection import select
from tasks.compress.unstructured import prunable
from tasks.data import encode
from tasks.models import load, save
from tests.support import TASKS_OF, as_artifact, context
from tests.tasks.test_models_writers import WRITERS, generated, inputs, written

FAMILIES = (*WRITERS, "wav2vec2")
HEADS = {
    "marian": {"lm_head": "tied to model.shared.weight"},
    "t5": {"lm_head": "tied to shared.weight"},
    "bart": {"lm_head": "tied to model.shared.weight"},
    "whisper": {"proj_out": "tied to model.decoder.embed_tokens.weight"},
    "wav2vec2": {"lm_head": "output head"},
}


def data_of(request, family: str):
    return request.getfixturevalue("pair_data" if TASKS_OF[family] == "translation" else "speech_data")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inside_is_pruned_and_head_and_convolutions_are_left(request, family):
    model = load(request.getfixturevalue(family))
    weights, left = prunable(model)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)]
    assert left == HEADS[family] | dict.fromkeys(convolutions, "convolution")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name.removesuffix(".weight") for name in weights} == linear - HEADS[family].keys()
    assert (family in ("whisper", "wav2vec2")) == bool(convolutions)


def test_an_untied_head_of_a_model_without_a_body_of_its_own_is_left():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=40)
    model = T5ForConditionalGeneration(config)
    model.lm_head = nn.Linear(32, 40, bias=False)
    weights, left = prunable(model)
    assert left == {"lm_head": "output head"}
    assert len(weights) == 6 + 10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_trained_with_its_zeros_and_comes_back(request, tmp_path, family):
    folder, data = request.getfixturevalue(family), data_of(request, family)
    ctx = context(tmp_path, TASKS_OF[family], data.model_copy(update={"train_limit": 8}))
    recover = TrainingSpec(max_steps=1, batch_size=4, learning_rate=1e-3, validation=0)
    result = prune(as_artifact(folder), spec=PruneSpec(uses="prune", id="p", sparsity=0.5, recover=recover), ctx=ctx)
    model, before = load(ctx.out), load(folder)
    weights, _ = prunable(model)
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert zeros == result.properties["zeros"] == sum(round(weight.numel() / 2) for weight in weights.values())
    moved = [name for name, weight in weights.items() if not torch.equal(weight, before.get_parameter(name))]
    assert len(moved) == len(weights)
    assert {file.name for file in folder.iterdir()} == {file.name for file in ctx.out.iterdir()}
    if family != "wav2vec2":
        assert generated(model, inputs(family)) == written(model, inputs(family))


def rounded(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The model with the weights of these modules rounded to int8 and back."""
    copied = copy.deepcopy(model)
    seen = set()
    with torch.no_grad():
        for name in names:
            weight: Any = copied.get_submodule(name).weight
            if weight.data_ptr() not in seen:
                integers, scale = packed.quantize_rows(weight)
                weight.copy_(integers * scale[:, None])
                seen.add(weight.data_ptr())
    return copied


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_stores_what_is_tied_once_and_writes_as_before(request, tmp_path, family):
    folder, data = request.getfixturevalue(family), data_of(request, family)
    ctx = context(tmp_path, TASKS_OF[family], data)
    result = quantize(as_artifact(folder), spec=QuantizeSpec(uses="quantize", id="q"), ctx=ctx)
    assert result.kind == "packed"
    assert 0 < result.properties["output_error"] < 0.1
    assert result.properties["weight_bytes"] < 0.6 * result.properties["weight_bytes_before"]
    before, after = load(folder), load(ctx.out)
    linear = [name for name, module in before.named_modules() if isinstance(module, nn.Linear)]
    assert all(packed.is_packed(after.get_submodule(name)) for name in linear)
    assert all("Positional" in reason for reason in result.left.values())
    stored = load_file(ctx.out / "model.safetensors")
    head = next(iter(HEADS[family]))
    table = {"wav2vec2": head, "whisper": "model.decoder.embed_tokens", "t5": "shared"}.get(family, "model.shared")
    shape = before.get_submodule(head).weight.shape  # type: ignore[union-attr]
    tables = [name for name, tensor in stored.items() if tensor.shape == shape]
    assert tables == [f"{table}.weight_int8"]
    names = {file.name for file in ctx.out.iterdir()}
    assert names == {file.name for file in folder.iterdir()} | {"lathe.json"}
    examples = encode(ctx.data, "eval", ctx.task, folder, ctx.store).take(slice(0, 8))
    exact = outputs(rounded(before, result.touched), examples)
    assert relative_error(exact, outputs(after, examples)) < 0.1
    if family == "wav2vec2":
        return
    integers = after.get_submodule(head).weight_int8  # type: ignore[union-attr]
    tied = [name for name, module in before.named_modules() if module is not before.get_submodule(head)]
    tied = [name for name in tied if getattr(before.get_submodule(name), "weight", None) is not None]
    tied = [name for name in tied if before.get_submodule(name).weight is before.get_submodule(head).weight]  # type: ignore
    assert table in tied
    assert all(after.get_submodule(name).weight_int8.data_ptr() == integers.data_ptr() for name in tied)  # type: ignore
    rows = generated(after, inputs(family))
    same = [
        one == other
        for ours, theirs in zip(rows, generated(before, inputs(family)), strict=True)
        for one, other in zip(ours, theirs, strict=False)
    ]
    assert sum(same) >= 0.8 * len(same) > 0


@pytest.mark.parametrize("family", ["bart", "marian"])
def test_a_scaled_embedding_stays_scaled(tmp_path, family):
    from tests.support import tiny_model

    model = load(tiny_model(tmp_path / "model", family, "translation", scale_embedding=True))
    table: Any = model.get_submodule("model.encoder.embed_tokens")
    ids = torch.tensor([[4, 5, 300]])
    expected = table(ids)
    plan = select(model)
    assert plan.factors["model.encoder.embed_tokens"] == pytest.approx(32**0.5 if family == "bart" else 1)
    given = {**inputs(family), "labels": torch.tensor([[5, 6, 2]] * 3)}
    exact = rounded(model, (*plan.layers, *plan.embeddings))
    with torch.no_grad():
        reference = exact(**given).logits
        changed, entry = pack_int8(model, plan)
        assert torch.allclose(changed.get_submodule("model.encoder.embed_tokens")(ids), expected, atol=0.1)
        save(changed, tmp_path / "int8", transforms=[entry])
        assert relative_error(reference, load(tmp_path / "int8")(**given).logits) < 0.1


@pytest.mark.parametrize("family", ["marian", "whisper", "wav2vec2"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_halves_write_as_before(request, tmp_path, family, precision):
    folder = request.getfixturevalue(family)
    ctx = context(tmp_path, TASKS_OF[family], data_of(request, family))
    spec = QuantizeSpec(uses="quantize", id="q", precision=precision)
    result = quantize(as_artifact(folder), spec=spec, ctx=ctx)
    assert result.properties["weight_bytes"] < 0.6 * result.properties["weight_bytes_before"]
    assert result.properties["output_error"] < (2e-3 if precision == "fp16" else 2e-2)
    stored = load_file(ctx.out / "model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.float16 if precision == "fp16" else torch.bfloat16}
    model = load(ctx.out)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    if family != "wav2vec2" and precision == "fp16":
        assert generated(model, inputs(family)) == generated(load(folder), inputs(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_what_is_written(request, family, tmp_path: Path):
    folder, data = request.getfixturevalue(family), data_of(request, family)
    model: Any = load(folder)
    examples = encode(data, "eval", TASKS_OF[family], folder, tmp_path).take(slice(0, 2))
    logits = outputs(model, examples)
    assert examples.target_mask is not None
    if family == "wav2vec2":
        frames = model._get_feat_extract_output_lengths(int(examples.lengths().max()))
        assert logits.shape == (2, frames, model.config.vocab_size)
    else:
        assert logits.shape == (int(examples.target_mask.sum()), model.config.vocab_size)
