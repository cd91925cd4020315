"""Pruning by data, block by block, of every architecture; what is refused, and what is said."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

from specs.schema.steps.finetune import FinetuneSpec
from specs.schema.steps.prune import PruneSpec, kept_of
from tasks.compress import semi_structured
from tasks.compress.calibrate import observe
from tasks.compress.prune import look, prune
from tasks.compress.prune_by_data import by_sparsegpt, by_wanda, prune_by_data
from tasks.compress.unstructured import NO_GAIN, _gain, check, no_gain, plan, prunable, prunable_layers
from tasks.compress.walk import stages, walk
from tasks.context import StepError
from tasks.finetune.finetune import finetune
from tasks.models import load, save
from tasks.models.anatomy import anatomy
from tests.support import TASKS_OF, as_artifact, context
from tests.tasks import tiny

KINDS = ("llama", "gpt2", "bert", "marian", "t5", "whisper", "wav2vec2")


def made(kind: str, count: int = 5) -> tuple[Any, Any]:
    """A model and examples for it."""
    if kind in ("llama", "gpt2", "bert"):
        return tiny.network(kind), tiny.sentences(count) if kind == "bert" else tiny.language(count)
    return tiny.writer(kind), tiny.pairs(count) if kind in ("marian", "t5") else tiny.recordings(kind, count)


def spec(method: str, **fields: Any) -> PruneSpec:
    return PruneSpec.model_validate({"uses": "prune", "id": "p", "method": method, **fields})


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_sees_what_the_blocks_changed_before_it_give(kind):
    """Against whole passes through the model for every block, bit for bit."""
    model, data = made(kind)
    names = frozenset(layer.name for layer in prunable_layers(model)[0])

    def collected(through):
        changed = copy.deepcopy(model)
        seen: dict[str, list[torch.Tensor]] = {}

        def change(layers):
            with torch.no_grad():
                for name in layers:
                    changed.get_submodule(name).weight.mul_(0.5)

        through(changed, lambda name, x: seen.setdefault(name, []).append(x.clone()), change)
        return seen

    def naive(changed, see, change):
        for stage in stages(anatomy(changed)):
            layers = tuple(name for name in stage.layers if name in names)
            if layers:
                observe(changed, layers, data, see)
                change(layers)

    found = collected(lambda changed, see, change: walk(changed, names, data, see, change))
    expected = collected(naive)
    assert set(found) == set(expected) == names
    for name in names:
        assert len(found[name]) == len(data)
        assert all(torch.equal(one, other) for one, other in zip(found[name], expected[name], strict=True)), name
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_exact_zeros_in_the_right_direction(kind, pattern):
    model, data = made(kind)
    layers = {layer.name: layer for layer in prunable_layers(model)[0]}
    amount = (None, kept_of(pattern)) if pattern else (0.5, None)
    for rule in (by_wanda(*amount), by_sparsegpt(*amount, 16, 0.01)):
        changed = copy.deepcopy(model)
        targets = {layer.name: layer for layer in prunable_layers(changed)[0]}
        masks, vectors = prune_by_data(changed, targets, data, rule)
        assert min(vectors.values()) >= len(data)
        assert set(masks) == {layer.weight_name for layer in layers.values()}
        for name, layer in targets.items():
            assert torch.equal(layer.weight != 0, masks[layer.weight_name])
            assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2
            if pattern:
                assert semi_structured.is_two_four(layer.matrix), name
        others = set(model.state_dict()) - set(masks)
        assert all(torch.equal(changed.state_dict()[name], model.state_dict()[name]) for name in others)


def test_a_pattern_by_magnitude_follows_the_inputs_of_conv1d():
    model = tiny.network("gpt2")
    masks = plan(prunable_layers(model)[0], spec("magnitude", pattern="1:4"))
    for name, mask in masks.items():
        assert mask.shape == model.get_parameter(name).shape
        assert torch.all(mask.T.reshape(-1, 4).sum(1) == 1)


@pytest.mark.parametrize("family", ["llama", "bert", "marian", "whisper", "wav2vec2"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_step_prunes_every_application_and_twice_the_same(request, tmp_path, family, method):
    task = TASKS_OF.get(family, "text-generation")
    kind = {"text-generation": "text", "text-classification": "review", "translation": "pair"}.get(task, "speech")
    data = request.getfixturevalue(f"{kind}_data").model_copy(update={"train_limit": 12})
    folder, ends = request.getfixturevalue(family), []
    for name in ("a", "b"):
        ctx = context(tmp_path / name, task, data, store=tmp_path / "store")
        result = prune(as_artifact(folder), spec=spec(method, pattern="2:4", calibration_examples=8), ctx=ctx)
        ends.append((ctx.out / "model.safetensors").read_bytes())
    assert ends[0] == ends[1]
    weights, left = prunable(load(ctx.out))
    assert result.properties["zeros"] == sum(int((weight == 0).sum()) for weight in weights.values())
    assert result.properties["sparsity"] == 0.5
    assert (result.properties["calibration_examples"], result.properties["pattern"]) == (8, "2:4")
    assert set(result.touched) == set(weights)
    assert result.left == left
    assert f"({method}, pattern: 2:4)" in result.summary
    assert "nothing faster on a CPU" in result.warnings[0]


def test_movement_and_later_finetuning_end_to_end(text_data, llama, tmp_path):
    recover = {"max_steps": 8, "batch_size": 8, "learning_rate": 1e-3}
    ctx = context(tmp_path / "p", "text-generation", text_data)
    result = prune(as_artifact(llama), spec=spec("movement", sparsity=0.6, recover=recover), ctx=ctx)
    assert "movement, sparsity: 0.6, scope: layer, cubic" in result.summary
    assert "training" in result.properties
    pruned, _ = prunable(load(ctx.out))
    assert all(int((weight == 0).sum()) == round(0.6 * weight.numel()) for weight in pruned.values())
    magnitude = plan(prunable_layers(load(llama))[0], spec("magnitude", sparsity=0.6))
    assert not all(torch.equal(pruned[name] != 0, mask) for name, mask in magnitude.items())
    later = context(tmp_path / "f", "text-generation", text_data)
    tuned = finetune(as_artifact(ctx.out), spec=FinetuneSpec(uses="finetune", id="f", max_steps=2), ctx=later)
    after, _ = prunable(load(later.out))
    assert all(torch.equal(after[name] != 0, weight != 0) for name, weight in pruned.items())
    assert any(not torch.equal(after[name], weight) for name, weight in pruned.items())
    assert f"kept {result.properties['zeros']} zeros in 14 layers" in tuned.summary
    assert tuned.properties["zeros_kept"] == result.properties["zeros"]


@pytest.mark.parametrize(
    "fields",
    [{"sparsity": 0.5}, {"method": "width", "keep": "90%", "calibration_examples": 2}, {"method": "vocabulary"}],
)
def test_a_file_that_grew_is_told(text_data, llama, tmp_path, fields):
    save(load(llama).half(), tmp_path / "half", llama, compute_dtype="float32")
    ctx = context(tmp_path, "text-generation", text_data)
    result = prune(as_artifact(tmp_path / "half"), spec=PruneSpec(uses="prune", id="p", **fields), ctx=ctx)
    assert re.match(r"the file grew from 0.0\d+ to 0.1\d+ MB: .* are float32 now; quantize after", result.warnings[-1])


def test_inputs_that_are_no_numbers_name_the_layer():
    model: Any = tiny.network("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(1)
        model.model.layers[1].input_layernorm.weight.fill_(float("inf"))
    layers = {layer.name: layer for layer in prunable_layers(model)[0]}
    with pytest.raises(StepError, match=r"what comes into model\.layers\.1\.self_attn\.q_proj .* is not finite"):
        prune_by_data(model, layers, tiny.language(3), by_wanda(0.5, None))


def test_no_examples_to_calibrate_with(monkeypatch, text_data, llama, tmp_path):
    import tasks.data

    empty = tiny.language(1).take(slice(0, 0))
    monkeypatch.setattr(tasks.data, "encode", lambda *given, **named: empty)
    with pytest.raises(StepError, match="no example to calibrate with"):
        prune(
            as_artifact(llama),
            spec=spec("wanda", sparsity=0.5),
            ctx=context(tmp_path, "text-generation", text_data),
        )


def test_few_vectors_for_many_inputs_are_a_warning(text_data, llama, tmp_path):
    data = text_data.model_copy(update={"train_limit": 2})
    ctx = context(tmp_path, "text-generation", data)
    result = prune(as_artifact(llama), spec=spec("sparsegpt", sparsity=0.5, calibration_examples=1), ctx=ctx)
    assert result.warnings[1].startswith("too few calibration examples for ")
    assert "layers.0.mlp.down_proj: " in result.warnings[1]
    assert result.warnings[1].endswith(" vectors for 64 inputs); raise calibration_examples")


def test_a_width_that_the_pattern_does_not_divide_is_known_before():
    wide = tiny.network("llama", intermediate_size=66)
    problems, warnings = look(spec("wanda", pattern="2:4"), wide.config.to_dict(), "text-generation", 32)
    assert problems == [
        "pattern 2:4 needs a multiple of 4 inputs, and 2 of 14 linear layers have none, first "
        "model.layers.0.mlp.down_proj with 66; write sparsity instead, or another pattern"
    ]
    assert warnings == []
    assert look(spec("wanda", pattern="1:2"), wide.config.to_dict(), "text-generation", 32)[0] == []
    with pytest.raises(StepError, match=r"down_proj with 66"):
        check(prunable_layers(wide), spec("magnitude", pattern="2:4"))


def test_an_architecture_without_description_is_known_before():
    import transformers

    config = transformers.GPTNeoXConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    problems, _ = look(spec("sparsegpt", sparsity=0.5), config.to_dict(), "text-generation", 32)
    assert "the parts of gpt_neox models are not described" in problems[0]
    assert look(spec("magnitude", sparsity=0.5), config.to_dict(), "text-generation", 32) == ([], [NO_GAIN])


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(StepError, match="prune found no linear layer that it may touch: the model has none"):
        check(prunable_layers(torch.nn.Embedding(4, 4)), spec("magnitude", sparsity=0.5))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (None, "neither the file smaller nor the model faster"),
        ("2:4", "a GPU of compute capability 8.0 or newer computes them faster"),
        ("1:4", "a GPU of compute capability 8.0 or newer computes them faster"),
        ("1:2", "a GPU of compute capability 8.0 or newer computes them faster"),
        ("3:4", "and 3:4 does not hold it: zeros alone"),
        ("4:8", "and 4:8 does not hold it: zeros alone"),
    ],
)
def test_what_zeros_bring_is_said_for_each_pattern(pattern, words):
    assert words in no_gain(pattern)


def test_two_of_four_is_run_by_gpus_alone():
    assert semi_structured.is_two_four(torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 1]]))
    assert not semi_structured.is_two_four(torch.tensor([[1.0, 0, 3, 2]]))
    assert not semi_structured.is_two_four(torch.zeros(2, 6))
    reason = semi_structured.why_not("cpu")
    assert reason is not None
    assert "GPUs alone" in reason
    with pytest.raises(RuntimeError, match="GPUs alone"):
        semi_structured.accelerate(tiny.network("llama"), torch.float16)


def test_a_gpu_is_asked_for_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert semi_structured.why_not("cuda") == (
        "2:4 needs a GPU of compute capability 8.0 or newer, and this one has 7.5"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert semi_structured.why_not("cuda") is None


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (semi_structured.Gain(14, {}, (2e-3, 1e-3), 1e-4), "14 of 14 layers run as 2:4, 2.00 times as fast as dense"),
        (semi_structured.Gain(14, {}, (2e-3, 1e-3), 0.2), "here it does not: the error is 20.00%"),
        (semi_structured.Gain(0, {"a": "too small"}, (0.0, 0.0), 0.0), "here it does not: too small"),
    ],
)
def test_what_was_measured_on_a_gpu_is_said(monkeypatch, tmp_path, gain, words):
    model = tiny.network("llama")
    monkeypatch.setattr(semi_structured, "why_not", lambda device: None)
    monkeypatch.setattr(semi_structured, "measure", lambda *given: gain)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "card")
    layers, _ = prunable_layers(model)
    warnings, figures = _gain(model, layers, spec("wanda", pattern="2:4"), tiny.context(tmp_path))
    assert words in warnings[0]
    assert bool(figures) == ("2.00 times" in words)
