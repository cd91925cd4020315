"""The steps one after another on a model that has learned real text."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import DataSpec, ModelSpec
from specs.schema.steps.finetune import FinetuneSpec
from specs.schema.steps.prune import PruneSpec
from specs.schema.steps.quantize import QuantizeSpec
from tasks.compress import few_bits, simulate
from tasks.compress.masks import magnitude_masks
from tasks.compress.prune import prune
from tasks.compress.quantize import quantize
from tasks.compress.unstructured import prunable
from tasks.context import StepError
from tasks.data import encode
from tasks.finetune.batches import Batches
from tasks.finetune.finetune import finetune
from tasks.finetune.objective import task_loss
from tasks.models import load, save
from tasks.models.origin import import_model
from tests.tasks import tiny

MODEL = ModelSpec(
    config={
        "model_type": "llama",
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
)
DATA = DataSpec(train="builtin:python-docs", eval="builtin:python-docs", max_length=32, train_limit=20, eval_limit=4)
TRAINING = {"max_steps": 300, "batch_size": 16, "learning_rate": 1e-2, "eval_steps": 50}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a trained model, what the step said, and how to make contexts beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("trained")

    def context(name):
        ctx = tiny.context(root / name, model=MODEL, data=DATA)
        return dataclasses.replace(ctx, store=root / "store")

    ctx = context("baseline")
    import_model(spec=BaselineSpec(uses="model", id="baseline", model=MODEL), ctx=ctx)
    after = context("finetune")
    result = finetune(tiny.artifact(ctx.out), spec=FinetuneSpec(uses="finetune", id="t", **TRAINING), ctx=after)
    yield tiny.artifact(after.out), result, context
    torch.set_num_threads(threads)


def _perplexity(folder, ctx):
    data = encode(ctx.data, "eval", ctx.task, folder, ctx.store)
    batches = Batches(data, 0.0, 32, 0, "cpu")
    model, total, weight = load(folder), 0.0, 0
    with torch.inference_mode():
        for at in range(0, len(data), 32):
            part, count = task_loss("text-generation")(model, batches.tensors(np.arange(at, min(at + 32, len(data)))))
            total, weight = total + float(part), weight + int(count)
    return math.exp(total / weight)


def test_finetune_reports_what_it_did(trained):
    artifact, result, context = trained
    training = result.properties["training"]
    assert result.summary.startswith("trained 98.6 k parameters")
    assert f"({training['steps']} steps), validation loss" in result.summary
    assert training["validation_loss"] < training["validation_loss_before"] - 1
    assert set(result.touched) == {name for name, _ in load(artifact.path).named_parameters()}
    assert {path.name for path in artifact.path.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    untrained = _perplexity(context("baseline").out, context("x"))
    assert _perplexity(artifact.path, context("x")) < untrained / 3


def test_recovery_wins_back_what_pruning_lost_and_keeps_the_zeros(trained):
    artifact, _, context = trained
    before = _perplexity(artifact.path, context("x"))
    ends = {}
    for name, recover in (("plain", None), ("recovered", {**TRAINING, "max_steps": 60, "learning_rate": 2e-3})):
        ctx = context(name)
        spec = PruneSpec(uses="prune", id="p", sparsity="50%", recover=recover)
        result = prune(artifact, spec=spec, ctx=ctx)
        ends[name] = _perplexity(ctx.out, ctx)
        weights, _ = prunable(load(ctx.out))
        zeros = sum(int((weight == 0).sum()) for weight in weights.values())
        total = sum(weight.numel() for weight in weights.values())
        assert zeros == round(total / 2) == result.properties["zeros"]
        assert len(result.touched) == 14
        assert set(result.left) == {"lm_head"}
        assert "neither the file smaller nor the model faster" in result.warnings[0]
        assert "zeroed 50.0% of" in result.summary
    weights, _ = prunable(load(artifact.path))
    masks = magnitude_masks(weights, 0.5, "layer")
    pruned, _ = prunable(load(context("recovered").out))
    assert all(torch.equal(pruned[name] != 0, mask) for name, mask in masks.items())
    assert ends["plain"] > 1.02 * before
    assert ends["recovered"] < before + 0.5 * (ends["plain"] - before)


@pytest.mark.parametrize("amount", [{"sparsity": "60%"}, {"pattern": "2:4"}])
def test_sparsegpt_costs_less_than_magnitude_and_wanda(trained, amount):
    artifact, _, context = trained
    ends = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        ctx = context(f"{method}-{next(iter(amount))}")
        prune(artifact, spec=PruneSpec(uses="prune", id="p", method=method, **amount), ctx=ctx)
        ends[method] = _perplexity(ctx.out, ctx)
    assert ends["sparsegpt"] < 0.98 * min(ends["wanda"], ends["magnitude"])


def test_int8_keeps_the_perplexity_and_shrinks_the_file(trained):
    artifact, _, context = trained
    ctx = context("int8")
    result = quantize(artifact, spec=QuantizeSpec(uses="quantize", id="q"), ctx=ctx)
    assert result.kind == "packed"
    assert len(result.touched) == 16
    assert "converted 15 of 15 linear layers and 1 of 1 embeddings" in result.summary
    assert result.properties["weight_bytes"] < 0.35 * result.properties["weight_bytes_before"]
    assert result.properties["weight_bytes"] == (ctx.out / "model.safetensors").stat().st_size
    assert 0 < result.properties["output_error"] < 0.05
    assert result.warnings == ()
    before, after = _perplexity(artifact.path, ctx), _perplexity(ctx.out, ctx)
    assert abs(after / before - 1) < 0.02
    assert json.loads((ctx.out / "lathe.json").read_text())["transforms"][0]["name"] == "int8-dynamic"


@pytest.mark.parametrize(("precision", "allowed"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_half_precision_loses_nothing_to_speak_of(trained, precision, allowed):
    artifact, _, context = trained
    ctx = context(precision)
    result = quantize(artifact, spec=QuantizeSpec(uses="quantize", id="q", precision=precision), ctx=ctx)
    assert result.kind == "model"
    assert result.properties["weight_bytes"] < 0.55 * result.properties["weight_bytes_before"]
    assert abs(_perplexity(ctx.out, ctx) / _perplexity(artifact.path, ctx) - 1) < allowed
    again = context(f"{precision}-again")
    with pytest.raises(StepError, match="leave this step out"):
        quantize(tiny.artifact(ctx.out), spec=QuantizeSpec(uses="quantize", id="q", precision=precision), ctx=again)


@pytest.fixture(scope="module")
def int4(trained):
    """Perplexity with the linear layers in int4, one scale a row, and what the step said, by algorithm; trained for a
    while under ``train``."""
    artifact, _, context = trained
    found = {}
    training = {**TRAINING, "max_steps": 60, "learning_rate": 1e-3, "eval_steps": 20}
    kinds = {name: {"algorithm": name, "samples": 64} for name in ("gptq", "awq")} | {"rtn": {}}
    for name, fields in (kinds | {"train": {"train": training}}).items():
        ctx = context(f"int4-{name}")
        spec = QuantizeSpec(uses="quantize", id="q", precision="int4", group_size="per-row", embeddings=False, **fields)
        found[name] = quantize(artifact, spec=spec, ctx=ctx), _perplexity(ctx.out, ctx)
    return found


def test_int4_packs_two_weights_a_byte(trained, int4):
    result, perplexity = int4["rtn"]
    assert result.properties["weight_bytes"] < 0.4 * result.properties["weight_bytes_before"]
    before = _perplexity(trained[0].path, trained[2]("x"))
    assert before < perplexity < 2 * before


def test_calibration_and_training_win_back_what_int4_lost(trained, int4):
    before = _perplexity(trained[0].path, trained[2]("x"))
    lost = {name: perplexity - before for name, (_, perplexity) in int4.items()}
    assert lost["train"] < 0.5 * lost["rtn"], lost
    assert lost["gptq"] < lost["rtn"], lost
    assert lost["awq"] < 0.1 * before, lost  # on so small a model it need not be better than rtn, only sound
    training = int4["train"][0].properties["training"]
    assert training["validation_loss"] < training["validation_loss_before"]
    assert int4["train"][0].warnings == ()
    sizes = {result.properties["weight_bytes"] for result, _ in int4.values()}
    assert max(sizes) < 1.05 * min(sizes)


def test_training_wins_back_what_mixed_bits_lost(trained, int4, monkeypatch):
    """Each layer is trained in the bits that the budget left it, and stored in them."""
    artifact, _, context = trained
    seen = {}

    def simulated(network, weights, inputs):
        row = torch.linspace(-1, 1, 64)[None]
        seen.update((name, int(change(row).unique().numel())) for name, change in weights.items())
        return simulate.simulated(network, weights, inputs)

    monkeypatch.setattr(few_bits, "simulated", simulated)
    budget = int(1.1 * int4["rtn"][0].properties["weight_bytes"])
    lost, bits = {}, {}
    training = {**TRAINING, "max_steps": 30, "learning_rate": 1e-3, "eval_steps": 10}
    for name, fields in {"mixed": {}, "trained": {"train": training}}.items():
        ctx = context(name)
        spec = QuantizeSpec(
            uses="quantize",
            id="q",
            group_size="per-row",
            embeddings=False,
            mixed={"budget": budget},
            samples=8,
            **fields,
        )
        result = quantize(artifact, spec=spec, ctx=ctx)
        assert result.properties["weight_bytes"] <= budget
        lost[name], bits[name] = _perplexity(ctx.out, ctx) - _perplexity(artifact.path, ctx), result.properties["bits"]
    assert lost["trained"] < 0.7 * lost["mixed"], lost
    assert bits["trained"] == bits["mixed"]
    assert len(set(bits["mixed"].values())) > 1
    assert {name: 4 if levels <= 16 else 8 for name, levels in seen.items() if bits["mixed"][name] < 16} == {
        name: width for name, width in bits["mixed"].items() if width < 16
    }


def test_a_large_error_is_a_warning(trained, tmp_path):
    artifact, _, context = trained
    ctx = context("coarse")
    network = load(artifact.path)
    with torch.no_grad():  # one huge weight a row leaves the others no resolution
        for layer in network.model.layers:
            layer.mlp.down_proj.weight[:, 0] = 1e4
            layer.mlp.gate_proj.weight[0] = 0
            layer.mlp.up_proj.weight[0] = 0
    save(network, tmp_path, tokenizer_from=artifact.path)
    result = quantize(tiny.artifact(tmp_path), spec=QuantizeSpec(uses="quantize", id="q"), ctx=ctx)
    assert "the outputs differ from the float model's by" in result.warnings[0]
    assert result.properties["output_error"] > 0.1


def test_nothing_to_convert_is_an_error(trained):
    artifact, _, context = trained
    with pytest.raises(StepError, match=r"no linear layer to convert: .*skip: \*"):
        quantize(artifact, spec=QuantizeSpec(uses="quantize", id="q", skip=("*",)), ctx=context("wrong"))
