"""Whole heads, channels, hidden numbers and blocks go: held against the whole model with them zeroed or skipped."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig

from specs.schema.steps.finetune import TrainingSpec
from specs.schema.steps.prune import PruneSpec
from specs.schema.units import parse_keep
from tasks.compress import cut, depth, importance, search, structured, width
from tasks.compress.calibrate import examples, forward
from tasks.compress.prune import look, prune, refuses
from tasks.context import StepError
from tasks.data import encode
from tasks.finetune.objective import task_loss
from tasks.models import load
from tasks.models.anatomy import anatomy
from tasks.models.applications import auto_for
from tasks.models.layout import tied_weights
from tests.support import TASKS_OF, as_artifact, context
from tests.tasks import tiny
from tests.tasks.test_models_anatomy import TASKS, inputs, make
from tests.tasks.test_models_writers import generated
from tests.tasks.test_models_writers import inputs as spoken

KINDS = ("bert", "roberta", "distilbert", "gpt2", "llama", "qwen2", "qwen3", "bart", "marian", "t5", "umt5", "whisper")
KINDS += ("wav2vec2",)
FAMILIES = ("llama", "gpt2", "bert", "marian", "t5", "bart", "whisper", "wav2vec2")


def spec(method: str = "width", **fields: Any) -> PruneSpec:
    return PruneSpec(uses="prune", id="p", **{"method": method, "keep": "50%", **fields})


def logits(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(kind)).logits


def narrowed(model: Any, parts: tuple[Any, ...], share: float, seed: int = 0) -> tuple[Any, list[cut.Axis], dict]:
    """The model with parts of it gone at random, and what was kept."""
    parts_of = anatomy(model)
    space = width.room(model, parts_of, parts, 8)
    axes = width.axes(model, parts_of, space)
    fields = width.shape(parts_of, space, share)
    generator = torch.Generator().manual_seed(seed)
    kept = {
        axis.name: cut.choose(
            torch.rand(axis.size, generator=generator), width.count(axis, parts_of, fields), axis.groups
        )
        for axis in axes
    }
    state = cut.state_of(model, [place.tensor for axis in axes for place in axis.places])
    config = width.config_of(model.config, parts_of, fields)
    return cut.rebuild(model, config, cut.cut(state, axes, kept)), axes, kept


def zeroed(model: Any, axes: list[cut.Axis], kept: dict[str, list[int]]) -> Any:
    """The model whose dropped heads and channels give nothing: the columns that read them are 0."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for axis in axes:
            gone = set(range(axis.size)) - set(kept[axis.name])
            for source in axis.sources:
                layer: Any = copied.get_submodule(source.module)
                matrix = layer.weight.T if type(layer) is nn.Linear else layer.weight  # [in, out]
                unit = matrix.shape[0] // axis.size
                for number in gone:
                    matrix[number * unit : (number + 1) * unit] = 0
    return copied


@pytest.mark.parametrize(
    ("kind", "fields"), [*((kind, {}) for kind in KINDS), ("t5", {"feed_forward_proj": "gated-gelu"})]
)
def test_without_heads_and_channels_it_computes_what_the_model_with_them_zeroed_does(kind, fields):
    model = make(kind, **fields)
    small, axes, kept = narrowed(model, (), 0.5)
    assert any(len(kept[axis.name]) < axis.size for axis in axes)
    assert torch.allclose(logits(small, kind), logits(zeroed(model, axes, kept), kind), atol=1e-5)
    assert not torch.allclose(logits(small, kind), logits(model, kind), atol=1e-5)
    assert tied_weights(small) == tied_weights(model)
    can_lose_heads = kind in ("llama", "qwen2", "qwen3", "t5", "umt5")
    assert {axis.part for axis in axes} == ({"heads", "ffn"} if can_lose_heads else {"ffn"})


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_goes_it_is_the_same_model(kind):
    model = make(kind)
    parts = ("ffn",) if kind == "marian" else ("heads", "ffn", "hidden")
    same, _, _ = narrowed(model, parts, 1.0)
    assert torch.allclose(logits(same, kind), logits(model, kind), atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "marian"])
def test_a_narrower_hidden_size_runs_and_keeps_what_was_kept(kind):
    model = make(kind)
    small, axes, kept = narrowed(model, ("heads", "ffn", "hidden"), 0.5)
    stack = anatomy(small).stacks[0]
    assert stack.width == 16
    assert (stack.blocks[0].attentions[0].heads, stack.blocks[0].attentions[0].head_size) == (2, 8)
    assert torch.isfinite(logits(small, kind)).all()
    hidden = kept["hidden"]
    table = next((name for name, what in anatomy(model).embeddings.items() if what == "tokens"), None)
    if table is not None:
        old, new = model.get_submodule(table).weight, small.get_submodule(table).weight  # type: ignore[union-attr]
        assert torch.equal(new, old[:, hidden])
    assert sum(axis.name == "hidden" for axis in axes) == 1


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_every_hidden_dimension_is_cut(kind):
    """All sizes differ, so that every dimension of 32 is a hidden one."""
    fields = {"head_dim": 6, "intermediate_size": 48} if kind == "llama" else {"d_kv": 6, "d_ff": 48, "vocab_size": 50}
    fields |= {} if kind == "llama" else {"relative_attention_num_buckets": 20}
    model = make(kind, None, **fields)
    small, _, kept = narrowed(model, ("hidden",), 0.5)
    index = torch.tensor(kept["hidden"])
    for name, tensor in model.state_dict().items():
        for dim, size in enumerate(tensor.shape):
            if size == 32:
                tensor = tensor.index_select(dim, index)
        assert torch.equal(small.state_dict()[name], tensor), name


def test_a_convolution_in_groups_gives_what_the_whole_one_gives_of_the_rest():
    whole = nn.Conv1d(8, 8, 3, groups=2, bias=False)
    kept = cut.choose(torch.tensor([1.0, 9, 9, 1, 9, 1, 1, 9]), 4, groups=2)
    assert kept == [1, 2, 4, 7]
    axis = cut.Axis("a", "hidden", 8, (cut.Place("weight", 0, groups=2),), (), 2)
    small = nn.Conv1d(4, 4, 3, groups=2, bias=False)
    small.load_state_dict(cut.cut(whole.state_dict(), [axis], {"a": kept}))
    given = torch.randn(1, 8, 9, generator=torch.Generator().manual_seed(0))
    masked = torch.zeros_like(given)
    masked[:, kept] = given[:, kept]
    assert torch.allclose(small(given[:, kept]), whole(masked)[:, kept], atol=1e-6)


def test_units_segments_and_ties_of_scores():
    assert cut.entries([0, 2], 3, cut.Place("w", 0, unit=2)) == [0, 1, 4, 5]
    assert cut.entries([1], 2, cut.Place("w", 0, unit=2, segments=3)) == [2, 3, 6, 7, 10, 11]
    assert cut.choose(torch.tensor([1.0, 2, 2, 2]), 2) == [1, 2]


# Importance


def test_activation_importance_is_the_mean_of_what_flows():
    model = tiny.network("llama")
    parts = anatomy(model)
    axes = width.axes(model, parts, width.room(model, parts, ("heads", "ffn", "hidden"), 8))
    data = tiny.language(6)
    found = importance.activation(model, axes, data)
    seen: dict[str, list[torch.Tensor]] = {}
    names = ["model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    norms = [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(name, []).append(given[0][0])
        )
    for name in norms:
        model.get_submodule(name).register_forward_hook(
            lambda _, given, out, name=name: seen.setdefault(name, []).append(out[0])
        )
    with torch.no_grad():
        for batch in examples(data):
            forward(model, batch)
    tokens = {name: torch.cat(parts) for name, parts in seen.items()}
    heads = [
        sum(
            float(tokens[names[0]][:, 8 * head : 8 * head + 8].norm(dim=1).mean())
            for head in (2 * group, 2 * group + 1)
        )
        for group in range(2)
    ]
    assert found["model.layers.1.self_attn"].tolist() == pytest.approx(heads, rel=1e-5)
    channels = tokens[names[1]].abs().mean(0)
    assert torch.allclose(found["model.layers.0.ffn"].float(), channels, rtol=1e-5)
    hidden = torch.stack([tokens[name].abs().mean(0) for name in norms]).sum(0)
    assert torch.allclose(found["hidden"].float(), hidden, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_taylor_importance_is_the_sum_over_all_that_goes(kind):
    model = tiny.network(kind)
    parts = anatomy(model)
    axes = width.axes(model, parts, width.room(model, parts, (), 8))
    data = tiny.language(8)
    loss = task_loss("text-generation")
    found = importance.by_axis(importance.taylor(model, data, loss), axes)
    assert all(parameter.grad is None for parameter in model.parameters())
    ids, mask = torch.from_numpy(data.input_ids).long(), torch.from_numpy(data.attention_mask).long()
    total, weight = loss(model, {"input_ids": ids, "attention_mask": mask})
    (total / weight).backward()
    mlp = model.get_submodule(axes[-1].name.removesuffix(".ffn")).mlp
    if kind == "llama":
        layers = ((mlp.gate_proj.weight, 1), (mlp.up_proj.weight, 1), (mlp.down_proj.weight, 0))
    else:
        layers = ((mlp.c_fc.weight, 0), (mlp.c_proj.weight, 1))
    expected = torch.stack([(weight * weight.grad).abs().sum(dim) for weight, dim in layers]).sum(0)
    if kind == "gpt2":
        expected = expected + (mlp.c_fc.bias * mlp.c_fc.bias.grad).abs()
    assert torch.allclose(found[axes[-1].name].float(), expected, rtol=1e-4)


def test_block_influence_is_one_minus_the_cosine():
    model = tiny.network("llama", num_hidden_layers=3)
    data = tiny.language(4)
    names = [f"model.layers.{index}" for index in range(3)]
    found = importance.block_influence(model, names, data)
    cosines: list[list[float]] = [[], []]
    with torch.no_grad():
        for batch in examples(data):
            states = model(**batch, output_hidden_states=True).hidden_states
            for index in range(2):
                cosines[index] += torch.cosine_similarity(states[index][0], states[index + 1][0], dim=-1).tolist()
    assert [found[name] for name in names[:2]] == pytest.approx([1 - np.mean(one) for one in cosines], abs=1e-6)


# Depth


def shallow(model: Any, kept: list[int]) -> Any:
    parts = anatomy(model)
    stacks = depth.chosen(model.config, parts, ())
    plan = {stack.name: kept for stack in stacks}
    return cut.rebuild(model, depth.config_of(model.config, stacks, plan), depth.cut(cut.state_of(model), stacks, plan))


DEPTH: dict[str, tuple[str, ...]] = {
    "gpt2": ("n_layer",),
    "distilbert": ("n_layers",),
    **dict.fromkeys(("t5", "umt5"), ("num_layers", "num_decoder_layers")),
    **dict.fromkeys(("bart", "marian", "whisper"), ("encoder_layers", "decoder_layers")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_block_it_computes_what_the_model_that_skips_it_does(kind):
    model = make(kind, None, **dict.fromkeys(DEPTH.get(kind, ("num_hidden_layers",)), 3))
    small = shallow(model, [0, 2])
    skipping = copy.deepcopy(model)
    for stack in anatomy(model).stacks:
        owner, _, name = stack.name.rpartition(".")
        blocks = skipping.get_submodule(stack.name)
        setattr(skipping.get_submodule(owner), name, nn.ModuleList([blocks[0], blocks[2]]))
        setattr(skipping.config, stack.fields["depth"], 2)
    with torch.no_grad():
        cached = {} if kind in ("wav2vec2", "bert", "roberta", "distilbert") else {"use_cache": False}
        expected = skipping(**inputs(kind), **cached).logits
    assert torch.allclose(logits(small, kind), expected, atol=1e-6)
    assert float((logits(small, kind) - logits(model, kind)).abs().max()) > 1e-5
    assert tied_weights(small) == tied_weights(model)


def test_the_table_of_positions_stays_where_its_block_goes():
    model = make("t5", num_layers=3, num_decoder_layers=3)
    small = shallow(model, [1, 2])
    for side in ("encoder", "decoder"):
        table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        assert torch.equal(small.state_dict()[table], model.state_dict()[table])
        query = "layer.0.SelfAttention.q.weight"
        assert torch.equal(small.state_dict()[f"{side}.block.0.{query}"], model.state_dict()[f"{side}.block.1.{query}"])


def test_lists_by_layer_follow_their_blocks():
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = make("qwen2", num_hidden_layers=3, layer_types=kinds, sliding_window=4, use_sliding_window=True)
    assert shallow(model, [1, 2]).config.layer_types == kinds[1:]


def test_the_least_important_blocks_go_and_of_equal_ones_the_later():
    parts = anatomy(make("bart"))
    scores = {block.name: 0.5 for block in parts.blocks}
    scores["model.decoder.layers.1"] = 0.9
    kept = depth.plan(parts.stacks, scores, {"encoder_layers": 1, "decoder_layers": 1})
    assert kept == {"model.encoder.layers": [0], "model.decoder.layers": [1]}


# The step


def data_of(request, family: str) -> tuple[Any, Any]:
    task = TASKS_OF.get(family, "text-generation")
    names = {"text-generation": "text", "text-classification": "review", "translation": "pair"}
    return task, request.getfixturevalue(f"{names.get(task, 'speech')}_data").model_copy(update={"train_limit": 8})


def plain(folder: Any, task: Any) -> Any:
    config = AutoConfig.from_pretrained(folder)
    return auto_for(task, config.model_type).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["width", "depth"])
def test_the_result_is_an_ordinary_smaller_model(request, tmp_path, family, method):
    task, data = data_of(request, family)
    folder = request.getfixturevalue(family)
    ctx = context(tmp_path, task, data)
    by = "taylor" if (family in ("t5", "gpt2", "wav2vec2")) == (method == "width") else "activation"
    hidden = method == "width" and family not in ("marian", "llama")
    parts = {"parts": ("heads", "ffn", "hidden")} if hidden else {}
    recover = TrainingSpec(max_steps=1, batch_size=4, validation=0) if family in ("llama", "whisper") else None
    result = prune(
        as_artifact(folder), spec=spec(method, importance=by, calibration_examples=4, recover=recover, **parts), ctx=ctx
    )
    assert not (ctx.out / "lathe.json").exists()
    whole, ours, theirs = load(folder), load(ctx.out), plain(ctx.out, task)
    given = spoken(family) if family not in ("llama", "gpt2", "bert", "wav2vec2") else inputs(family)
    if family in ("marian", "t5", "bart", "whisper"):
        given = {**given, "decoder_input_ids": torch.tensor([[4, 5, 6]] * 3)}
    with torch.no_grad():
        assert torch.equal(ours(**given).logits, theirs(**given).logits)
    assert {one.partition(".")[2] for one in tied_weights(ours)} == {
        one.partition(".")[2] for one in tied_weights(whole)
    }
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, ctx.out)]
    assert sizes[1] < sizes[0]
    assert result.properties["parameters"] < result.properties["parameters_before"]
    written = json.loads((ctx.out / "config.json").read_text())
    for name, (old, new) in result.properties["shape"].items():
        assert (written[name], new <= old) == (new, True)
    assert result.touched
    if family == "whisper" and method == "depth":  # its sines are not trained
        sines = [model.model.encoder.embed_positions.weight for model in (whole, ours)]
        assert torch.equal(*sines)
    if family in ("llama", "gpt2"):
        ids = torch.tensor([[5, 6, 7]])
        both = [
            model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use)
            for model, use in ((theirs, True), (theirs, False))
        ]
        assert torch.equal(*both)
    elif family not in ("bert", "wav2vec2"):
        generated(theirs, spoken(family))


def test_two_runs_give_the_same_bytes(tmp_path, llama, text_data):
    made = []
    for number in range(2):
        ctx = context(tmp_path / str(number), "text-generation", text_data)
        prune(as_artifact(llama), spec=spec(calibration_examples=4), ctx=ctx)
        made.append((ctx.out / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_one_stack_alone_becomes_shallower(tmp_path, bart, pair_data):
    ctx = context(tmp_path, "translation", pair_data)
    result = prune(as_artifact(bart), spec=spec("depth", stacks=["decoder"], calibration_examples=2), ctx=ctx)
    assert result.touched == ("model.decoder.layers",)
    assert result.left == {"model.encoder.layers": "stacks does not name the encoder"}
    config = load(ctx.out).config
    assert (config.encoder_layers, config.decoder_layers) == (2, 1)  # type: ignore[union-attr]
    generated(load(ctx.out), spoken("bart"))


def test_the_result_can_be_quantized(tmp_path, gpt2, text_data):
    from specs.schema.steps.quantize import QuantizeSpec
    from tasks.compress.quantize import quantize

    ctx = context(tmp_path, "text-generation", text_data)
    prune(as_artifact(gpt2), spec=spec(parts=["heads", "ffn", "hidden"], calibration_examples=4), ctx=ctx)
    after = context(tmp_path / "q", "text-generation", text_data)
    quantized = quantize(as_artifact(ctx.out), spec=QuantizeSpec(uses="quantize", id="q"), ctx=after)
    assert quantized.properties["weight_bytes"] < quantized.properties["weight_bytes_before"]


# Targets


def way(model: Any, **fields: Any) -> structured.Way:
    return structured._WAYS[fields.get("method", "width")](model, spec(**fields))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("method", ["width", "depth"])
def test_as_many_parameters_as_fit_stay(method):
    model = make("llama", num_hidden_layers=4, intermediate_size=160)
    smaller = way(model, method=method)
    sizes = [parameters(cut.shell(model, smaller.config(shape))) for shape in search.shapes(smaller)]
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == parameters(model)
    for target in (sizes[1], sizes[-1], (sizes[1] + sizes[2]) // 2):
        shape = search.by_size(smaller, model, parse_keep(f"{target} parameters"))
        assert parameters(cut.shell(model, smaller.config(shape))) == max(size for size in sizes if size <= target)


def test_the_largest_shape_that_is_fast_enough_stays(monkeypatch, tmp_path):
    model = make("llama", intermediate_size=160)
    smaller = way(model)
    monkeypatch.setattr(search, "_seconds", lambda network, given, ctx: parameters(network) / 1e6)
    ctx = tiny.context(tmp_path)
    scores = smaller.scores(tiny.language(4), ctx)
    sizes = [parameters(cut.shell(model, smaller.config(shape))) for shape in search.shapes(smaller)]
    shape, times = search.by_time(smaller, scores, tiny.language(4), parse_keep(f"{sizes[3] / 1e6} s"), ctx)
    assert shape == search.shapes(smaller)[3]
    assert {"shape": shape, "seconds": sizes[3] / 1e6} in times
    assert len(times) < len(sizes)
    monkeypatch.setattr(search, "_seconds", lambda network, given, ctx: 0.0)  # after a kill it does not measure again
    again = search.by_time(smaller, scores, tiny.language(4), parse_keep("1 s"), ctx)
    assert again == (shape, times)
    (ctx.checkpoints / search.FILE).unlink()
    monkeypatch.setattr(search, "_seconds", lambda network, given, ctx: parameters(network) / 1e6)
    with pytest.raises(StepError, match="the whole model takes"):
        search.by_time(smaller, scores, tiny.language(4), parse_keep("60 s"), ctx)
    with pytest.raises(StepError, match=r"the smallest shape .* takes .* let more parts go"):
        search.by_time(smaller, scores, tiny.language(4), parse_keep("1 us"), ctx)


@pytest.mark.parametrize("method", ["width", "depth"])
def test_the_step_keeps_as_much_as_a_time_allows(monkeypatch, tmp_path, llama, text_data, method):
    """On a machine whose times are known: a microsecond for every thousand parameters."""
    timed = []

    def seconds(network: Any, given: Any, ctx: Any) -> float:
        timed.append(parameters(network))
        return timed[-1] * 1e-9

    monkeypatch.setattr(search, "_seconds", seconds)
    network = load(llama)
    smaller = way(network, method=method)
    sizes = [parameters(cut.shell(network, smaller.config(shape))) for shape in search.shapes(smaller)]
    limit = (sizes[0] + sizes[-1]) // 2
    ctx = context(tmp_path, "text-generation", text_data)
    result = prune(as_artifact(llama), spec=spec(method, keep=f"{limit / 1e6} ms", calibration_examples=4), ctx=ctx)
    best = max(size for size in sizes if size <= limit)
    assert parameters(load(ctx.out)) == best == result.properties["parameters"]
    candidates = result.properties["candidates"]
    assert [one["seconds"] for one in candidates] == sorted((size * 1e-9 for size in set(timed)), reverse=True)
    assert {"shape": {name: new for name, (_, new) in result.properties["shape"].items()}, "seconds": best * 1e-9} in (
        candidates
    )
    assert "another machine, or a busy one, may choose another" in result.warnings[0]


def test_a_time_that_cannot_be_met_leaves_nothing(monkeypatch, tmp_path, llama, text_data):
    monkeypatch.setattr(search, "_seconds", lambda network, given, ctx: parameters(network) * 1e-9)
    ctx = context(tmp_path, "text-generation", text_data)
    with pytest.raises(StepError, match=r"keep: 1 us: the smallest shape .* takes .* ms; write more"):
        prune(as_artifact(llama), spec=spec(keep="1 us", calibration_examples=4), ctx=ctx)
    assert list(ctx.out.iterdir()) == []


def test_a_time_is_measured_alone_and_recorded(tmp_path, llama, text_data):
    held = []

    @contextlib.contextmanager
    def exclusive():
        held.append(True)
        yield

    ctx = replace(context(tmp_path, "text-generation", text_data), exclusive=exclusive)
    network = load(llama)
    given = search._example(encode(text_data, "train", ctx.task, llama, ctx.store), ctx)
    assert given["input_ids"].shape == (1, text_data.max_length)
    assert 0 < search._seconds(network, given, ctx) < 60
    assert held == [True]


# What is refused before the work


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("bert", {"parts": ["heads"]}, "can only go together; write parts: .ffn."),
        ("gpt2", {"parts": ["hidden"]}, "can only go together"),
        ("marian", {"parts": ["heads", "hidden"]}, "marian computes its positions from the hidden size"),
        ("plbart", {"parts": ["heads", "hidden"]}, "scale_embedding: true"),
        ("llama", {"keep": "5M"}, "the model has 3.* parameters, which is no more"),
        ("llama", {"keep": "100 parameters"}, "the smallest shape .* has 2.* parameters"),
        ("llama", {"keep": "99%"}, "rounds to the whole model .* write keep: 9.* or less"),
        ("llama", {"method": "depth", "keep": "90%"}, "rounds to the whole model .* write keep: 74.75% or less"),
        ("llama", {"method": "depth", "stacks": ["encoder"]}, r"has no encoder; write stacks: \[decoder\]"),
    ],
)
def test_the_plan_says_what_cannot_be(kind, fields, reason):
    config = make(kind).config.to_dict()
    problems, warnings = look(spec(**fields), config, TASKS.get(kind, "translation"), 16)
    assert len(problems) == 1
    assert re.search(reason, problems[0]), problems
    assert warnings == []


def test_one_block_cannot_go():
    config = make("llama", num_hidden_layers=1).config.to_dict()
    problems, _ = look(spec("depth"), config, "text-generation", 16)
    assert problems == ["method: depth leaves at least one block, and the decoder has no more; use method: width"]
    scaled = make("gpt2", scale_attn_by_inverse_layer_idx=True).config.to_dict()
    assert "scaled by the number of the block" in look(spec("depth"), scaled, "text-generation", 16)[0][0]
    assert look(spec("depth"), make("llama").config.to_dict(), "text-generation", 16) == ([], [])


def test_the_table_says_what_a_family_has_not():
    assert refuses(None, "ctc", "speech-recognition") is None
    assert refuses(spec(), "ctc", "speech-recognition") is None
    assert "has no decoder" in str(refuses(spec("depth", stacks=["decoder"]), "ctc", "speech-recognition"))
    assert "read text" in str(
        refuses(PruneSpec(uses="prune", id="v", method="vocabulary"), "ctc", "speech-recognition")
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "width"}, "method width needs `keep`; write for example keep: 50%"),
        ({"method": "threshold"}, "method threshold needs `threshold`; write for example threshold: 0.02"),
        (
            {"method": "depth", "keep": 0.5, "parts": ["ffn"]},
            "method depth takes no `parts`; leave it out",
        ),
        (
            {"sparsity": 0.5, "keep": 0.5},
            "takes no `keep`; leave it out, or write method: width or depth",
        ),
        ({"method": "vocabulary", "keep": 0.5}, "method vocabulary takes no `keep`"),
        ({"method": "width", "keep": "100%"}, "neither of them prunes; write for example 50%, 5M or 8 ms"),
        ({"method": "width", "keep": 0}, "neither of them prunes"),
        ({"method": "width", "keep": "0 ms"}, "is not above 0"),
        ({"method": "width", "keep": "8 mb"}, "unit 'mb' is unknown"),
        ({"method": "width", "keep": 0.5, "parts": ["ffn", "ffn"]}, "parts names the same twice"),
        ({"method": "width", "keep": 0.5, "calibration_examples": 0}, "greater than 0"),
    ],
)
def test_a_mistake_names_field_and_method(fields, message):
    with pytest.raises(ValueError, match=message):
        PruneSpec(uses="prune", id="p", **fields)


@pytest.mark.parametrize("keep", ["50%", 0.25, "5M", "1.5B", "20k", "1234 parameters", "8 ms", "2 s"])
def test_what_is_kept_can_be_written_and_read(keep):
    one = spec(keep=keep)
    assert PruneSpec.model_validate(one.model_dump(mode="json")) == one
    assert parse_keep(str(one.keep)) == one.keep
