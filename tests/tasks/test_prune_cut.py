"""Heads, channels, hidden numbers and blocks go: held against the whole model with them zeroed or skipped; and what
decides what goes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tasks.compress import cut, depth, importance, width
from tasks.compress.calibrate import examples, forward
from tasks.finetune.objective import task_loss
from tasks.models.anatomy import anatomy
from tasks.models.layout import tied_weights
from tests.tasks import tiny
from tests.tasks.test_models_anatomy import inputs, make

KINDS = ("bert", "roberta", "distilbert", "gpt2", "llama", "qwen2", "qwen3", "bart", "marian", "t5", "umt5", "whisper")
KINDS += ("wav2vec2",)


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
