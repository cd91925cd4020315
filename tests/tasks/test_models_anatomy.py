"""The parts of every described architecture, held against the module tree and against what runs through it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from specs.schema.base import Task
from tasks.context import StepError
from tasks.models.anatomy import Anatomy, anatomy
from tasks.models.applications import auto_for
from tasks.models.patterns import PATTERNS
from tests.support import tiny_config

BERT = tiny_config("bert", pad_token_id=0)
LLAMA = tiny_config("llama")
SEQ2SEQ = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
BART = tiny_config("bart") | SEQ2SEQ
T5 = tiny_config("t5") | SEQ2SEQ
DISTILBERT = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "camembert", "roberta", "xlm-roberta"), BERT),
    "distilbert": DISTILBERT | {"vocab_size": 320},
    "gpt2": tiny_config("gpt2"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA | {"head_dim": 8}),
    **dict.fromkeys(("bart", "m2m_100", "marian", "mbart", "pegasus", "plbart"), BART),
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
    "whisper": tiny_config("whisper") | SEQ2SEQ | {"bos_token_id": 1, "begin_suppress_tokens": None},
    **dict.fromkeys(("wav2vec2", "hubert"), tiny_config("wav2vec2") | {"vocab_size": 40}),
}
TASKS: dict[str, Task] = {
    **dict.fromkeys(("bert", "camembert", "roberta", "xlm-roberta", "distilbert"), "text-classification"),
    **dict.fromkeys(("gpt2", "llama", "mistral", "qwen2", "qwen3"), "text-generation"),
    **dict.fromkeys(("whisper", "wav2vec2", "hubert"), "speech-recognition"),
}


def make(kind: str, task: Task | None = None, **fields: Any) -> Any:
    config = AutoConfig.for_model(**{**FIELDS[kind], **fields, "model_type": kind})
    torch.manual_seed(0)
    return auto_for(task or TASKS.get(kind, "translation"), kind).from_config(config).eval()


def inputs(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 40, (1, 9), generator=generator)
    if kind == "whisper":
        return {"input_features": torch.randn(1, 16, 100, generator=generator), "decoder_input_ids": ids}
    if kind in ("wav2vec2", "hubert"):
        return {"input_values": torch.randn(1, 4000, generator=generator)}
    return {"input_ids": ids} if kind in TASKS else {"input_ids": ids, "decoder_input_ids": ids[:, :5]}


def naive_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def claimed(parts: Anatomy) -> Counter[str]:
    return Counter(
        [name for block in parts.blocks for name in block.layers] + [*parts.head, *parts.pooler, *parts.front_layers]
    )


VARIANTS = [
    *((kind, None, {}) for kind in PATTERNS),
    ("t5", None, {"feed_forward_proj": "gated-gelu"}),
    ("wav2vec2", None, {"do_stable_layer_norm": True}),
    ("wav2vec2", None, {"feat_extract_norm": "group"}),
    ("llama", None, {"tie_word_embeddings": True}),
    ("llama", "text-classification", {"pad_token_id": 0}),
]


@pytest.mark.parametrize(("kind", "task", "fields"), VARIANTS)
def test_every_layer_table_and_norm_is_claimed_once(kind, task, fields):
    model = make(kind, task, **fields)
    parts = anatomy(model)
    assert claimed(parts) == Counter(naive_layers(model))
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    assert sorted(parts.embeddings) == sorted(tables)
    norms = [name for stack in parts.stacks for name in stack.norms]
    norms += [name for block in parts.blocks for part in (*block.attentions, block.ffn) for name in part.norms]
    own = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    found = [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm") and name in own]
    found = [name for name in found if not any(name.startswith(f"{front}.") for front in parts.front)]
    assert Counter(norms) == Counter(found)
    for name in parts.front:
        model.get_submodule(name)


@pytest.mark.parametrize(("kind", "task", "fields"), [variant for variant in VARIANTS if variant[1] is None])
def test_what_runs_through_the_layers_is_what_their_names_say(kind, task, fields):
    model = make(kind, **fields)
    parts = anatomy(model)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in naive_layers(model):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _, into, out, name=name: seen.__setitem__(name, (into[0], out)))
    with torch.no_grad():
        output = model(**inputs(kind))
    assert set(seen) == set(naive_layers(model))
    for block in parts.blocks:
        for attention in block.attentions:
            query, key, value = (seen[name] for name in (attention.query, attention.key, attention.value))
            assert torch.equal(key[0], value[0])
            if attention.cross:
                assert torch.equal(key[0], output.encoder_last_hidden_state)
            else:
                assert torch.equal(query[0], key[0])
            parts_of = 3 if attention.fused else 1
            assert query[1].shape[-1] == parts_of * attention.heads * attention.head_size
            assert key[1].shape[-1] == parts_of * attention.kv_heads * attention.head_size
            assert seen[attention.output][0].shape[-1] == attention.heads * attention.head_size
        ffn = block.ffn
        activation = ACT2FN[ffn.activation]
        wide = seen[ffn.up][1]
        assert wide.shape[-1] == ffn.width
        hidden = activation(seen[ffn.gate][1]) * wide if ffn.gate else activation(wide)
        assert torch.allclose(hidden, seen[ffn.down][0], atol=1e-6)
    logits = output.logits
    assert any(logits.shape[-1] == seen[name][1].shape[-1] for name in parts.head)


def test_blocks_have_the_heads_and_the_positions_of_their_configuration():
    parts = anatomy(make("llama"))
    (attention,) = parts.stacks[0].blocks[1].attentions
    assert (attention.heads, attention.kv_heads, attention.head_size) == (4, 2, 8)
    assert (attention.positions, attention.fused, attention.cross) == ("rotary", False, False)
    assert parts.stacks[0].fields["ffn"] == "intermediate_size"
    gpt2 = anatomy(make("gpt2")).stacks[0].blocks[0].attentions[0]
    assert gpt2.fused
    assert (gpt2.heads, gpt2.kv_heads, gpt2.head_size, gpt2.positions) == (4, 4, 8, "absolute")
    encoder, decoder = anatomy(make("t5", d_kv=16)).stacks
    assert [attention.cross for attention in decoder.blocks[0].attentions] == [False, True]
    assert [attention.positions for attention in decoder.blocks[0].attentions] == ["relative", None]
    assert encoder.blocks[0].attentions[0].head_size == 16
    assert "relative positions" in encoder.embeddings.values()


@pytest.mark.parametrize("kind", PATTERNS)
def test_fields_say_what_the_modules_have(kind):
    model = make(kind)
    for stack in anatomy(model).stacks:

        def says(what, config=model.config, fields=stack.fields):
            return getattr(config, fields[what])

        block = stack.blocks[0]
        assert says("depth") == len(stack.blocks)
        assert says("width") == stack.width == model.get_submodule(block.ffn.norms[0]).weight.shape[0]
        assert says("heads") == block.attentions[0].heads
        assert says("ffn") in (block.ffn.width, None)  # GPT-2 may leave it to its default
        assert "kv_heads" not in stack.fields or says("kv_heads") == block.attentions[0].kv_heads
        assert "head_size" not in stack.fields or says("head_size") == block.attentions[0].head_size


@pytest.mark.parametrize(("kind", "first"), [("bart", False), ("mbart", True), ("whisper", True), ("bert", False)])
def test_norms_come_first_where_the_first_norm_gets_what_the_block_gets(kind, first):
    model = make(kind)
    stack = anatomy(model).stacks[-1]
    assert stack.norm_first is first
    got: dict[str, torch.Tensor] = {}
    block = stack.blocks[0]
    for name in (block.name, block.attentions[0].norms[0]):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, into, name=name: got.__setitem__(name, into[0]))
    with torch.no_grad():
        model(**inputs(kind))
    assert torch.equal(got[block.name], got[block.attentions[0].norms[0]]) is first


def test_ties_head_and_front_are_told():
    marian = anatomy(make("marian"))
    assert marian.ties["lm_head.weight"] == "model.shared.weight"
    assert marian.ties["model.decoder.embed_tokens.weight"] == "model.shared.weight"
    assert marian.head == ("lm_head",)
    assert (marian.family, anatomy(make("wav2vec2")).family) == ("encoder-decoder", "ctc")
    wav2vec2 = anatomy(make("wav2vec2"))
    assert wav2vec2.front_layers == ("wav2vec2.feature_projection.projection",)
    assert wav2vec2.head == ("lm_head",)
    assert anatomy(make("whisper")).front == ("model.encoder.conv1", "model.encoder.conv2")
    bert = anatomy(make("bert"))
    assert (bert.pooler, bert.head) == (("bert.pooler.dense",), ("classifier",))


def test_a_model_type_that_is_not_described_is_told():
    model = make("llama")
    model.config.model_type = "lama"
    with pytest.raises(StepError, match=r"the parts of lama models are not described.*did you mean llama\?"):
        anatomy(model)


def test_a_model_that_is_built_otherwise_is_told():
    model = make("bert")
    model.bert.encoder.adapter = nn.Linear(2, 2)
    with pytest.raises(StepError, match=r"bert\.encoder\.adapter has no known use"):
        anatomy(model)
    model = make("llama")
    del model.model.layers[1].mlp.down_proj
    with pytest.raises(StepError, match=r"it has no model\.layers\.1\.mlp\.down_proj"):
        anatomy(model)
    model = make("llama")
    model.model.layers[1].self_attn.v_proj = nn.Identity()
    with pytest.raises(StepError, match=r"layers\.1\.self_attn\.v_proj is a Identity and no linear layer of floats"):
        anatomy(model)
