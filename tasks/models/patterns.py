"""Where each architecture keeps its parts: the table that ``tasks.models.anatomy`` reads.

Names are dotted and relative: a stack's to the model without its head, a block's parts to the block. A part that only
some models of an architecture have (T5's gate, BERT's pooler) is named all the same, and missed where it is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Positions = Literal["absolute", "rotary", "relative", "convolutional"]
"""How a model knows where a token stands: a table or sines added to the input, rotated queries and keys, a bias on the
scores by distance, or a convolution over the frames."""


@dataclass(frozen=True)
class AttentionPattern:
    """One attention of a block.

    Args:
        at: the module.
        query: names of the linear layers under ``at``; ``query`` is also ``key`` and ``value`` where they are fused.
        norms: normalisations that belong to it, relative to the block.
        cross: whether keys and values come from the encoder.
    """

    at: str
    query: str
    key: str
    value: str
    output: str
    norms: tuple[str, ...]
    cross: bool = False


@dataclass(frozen=True)
class StackPattern:
    """Blocks of one kind.

    Args:
        role: encoder or decoder.
        at: the module that holds them.
        blocks: the list of the blocks, under ``at``.
        attentions: of each block.
        up: names of the linear layers that widen, the first that a model has is its own; under the block.
        gate: the layer whose activation is multiplied with ``up``'s output.
        down: the layer that narrows again.
        ffn_norms: normalisations that belong to the feed-forward part, under the block.
        positions: how it knows positions.
        embeddings: name under ``at`` to what the table holds: tokens, positions or types.
        norms: normalisations outside the blocks, under ``at``.
        norm_first: whether blocks normalise what goes in, not what comes out; or the field that says so.
        fields: what the configuration calls depth, width, heads, ffn and activation; ``head_size`` and ``kv_heads``
            where it has them.
    """

    role: Literal["encoder", "decoder"]
    at: str
    blocks: str
    attentions: tuple[AttentionPattern, ...]
    up: tuple[str, ...]
    down: str
    ffn_norms: tuple[str, ...]
    positions: Positions
    fields: Mapping[str, str]
    gate: str | None = None
    embeddings: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    norm_first: bool | str = False


@dataclass(frozen=True)
class Pattern:
    """An architecture.

    Args:
        types: the model types that are built so.
        stacks: encoder first.
        embeddings: tables outside the stacks, relative to the model without its head, to what they hold.
        front: what makes frames of audio, convolutions and the projection behind them.
        pooler: what condenses an encoder's output for a classifier.
        inner: layers whose output no other layer sees but the one that is named for each; relative to the model
            without its head.
    """

    types: tuple[str, ...]
    stacks: tuple[StackPattern, ...]
    embeddings: Mapping[str, str] = field(default_factory=dict)
    front: tuple[str, ...] = ()
    pooler: tuple[str, ...] = ()
    inner: Mapping[str, str] = field(default_factory=dict)


_BERT = Pattern(
    types=("bert", "camembert", "roberta", "xlm-roberta"),
    stacks=(
        StackPattern(
            role="encoder",
            at="",
            blocks="encoder.layer",
            attentions=(
                AttentionPattern(
                    "attention",
                    "self.query",
                    "self.key",
                    "self.value",
                    "output.dense",
                    norms=("attention.output.LayerNorm",),
                ),
            ),
            up=("intermediate.dense",),
            down="output.dense",
            ffn_norms=("output.LayerNorm",),
            positions="absolute",
            fields={
                "depth": "num_hidden_layers",
                "width": "hidden_size",
                "heads": "num_attention_heads",
                "ffn": "intermediate_size",
                "activation": "hidden_act",
            },
            embeddings={
                "embeddings.word_embeddings": "tokens",
                "embeddings.position_embeddings": "positions",
                "embeddings.token_type_embeddings": "types",
            },
            norms=("embeddings.LayerNorm",),
        ),
    ),
    pooler=("pooler",),
)

_DISTILBERT = Pattern(
    types=("distilbert",),
    stacks=(
        StackPattern(
            role="encoder",
            at="",
            blocks="transformer.layer",
            attentions=(AttentionPattern("attention", "q_lin", "k_lin", "v_lin", "out_lin", norms=("sa_layer_norm",)),),
            up=("ffn.lin1",),
            down="ffn.lin2",
            ffn_norms=("output_layer_norm",),
            positions="absolute",
            fields={
                "depth": "n_layers",
                "width": "dim",
                "heads": "n_heads",
                "ffn": "hidden_dim",
                "activation": "activation",
            },
            embeddings={"embeddings.word_embeddings": "tokens", "embeddings.position_embeddings": "positions"},
            norms=("embeddings.LayerNorm",),
        ),
    ),
)

_GPT2 = Pattern(
    types=("gpt2",),
    stacks=(
        StackPattern(
            role="decoder",
            at="",
            blocks="h",
            attentions=(AttentionPattern("attn", "c_attn", "c_attn", "c_attn", "c_proj", norms=("ln_1",)),),
            up=("mlp.c_fc",),
            down="mlp.c_proj",
            ffn_norms=("ln_2",),
            positions="absolute",
            fields={
                "depth": "n_layer",
                "width": "n_embd",
                "heads": "n_head",
                "ffn": "n_inner",
                "activation": "activation_function",
            },
            embeddings={"wte": "tokens", "wpe": "positions"},
            norms=("ln_f",),
            norm_first=True,
        ),
    ),
)

_LLAMA = Pattern(
    types=("llama", "mistral", "qwen2", "qwen3"),
    stacks=(
        StackPattern(
            role="decoder",
            at="",
            blocks="layers",
            attentions=(
                AttentionPattern(
                    "self_attn",
                    "q_proj",
                    "k_proj",
                    "v_proj",
                    "o_proj",
                    norms=("input_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
                ),
            ),
            up=("mlp.up_proj",),
            gate="mlp.gate_proj",
            down="mlp.down_proj",
            ffn_norms=("post_attention_layernorm",),
            positions="rotary",
            fields={
                "depth": "num_hidden_layers",
                "width": "hidden_size",
                "heads": "num_attention_heads",
                "kv_heads": "num_key_value_heads",
                "head_size": "head_dim",
                "ffn": "intermediate_size",
                "activation": "hidden_act",
            },
            embeddings={"embed_tokens": "tokens"},
            norms=("norm",),
            norm_first=True,
        ),
    ),
)


def _bart_stack(role: Literal["encoder", "decoder"], norm_first: bool) -> StackPattern:
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    attentions = [AttentionPattern("self_attn", *projections, norms=("self_attn_layer_norm",))]
    if role == "decoder":
        cross = AttentionPattern("encoder_attn", *projections, norms=("encoder_attn_layer_norm",), cross=True)
        attentions.append(cross)
    return StackPattern(
        role=role,
        at=role,
        blocks="layers",
        attentions=tuple(attentions),
        up=("fc1",),
        down="fc2",
        ffn_norms=("final_layer_norm",),
        positions="absolute",
        fields={
            "depth": f"{role}_layers",
            "width": "d_model",
            "heads": f"{role}_attention_heads",
            "ffn": f"{role}_ffn_dim",
            "activation": "activation_function",
        },
        embeddings={"embed_tokens": "tokens", "embed_positions": "positions"},
        norms=("layernorm_embedding", "layer_norm"),
        norm_first=norm_first,
    )


_BART = Pattern(
    types=("bart", "marian", "plbart"),
    stacks=(_bart_stack("encoder", False), _bart_stack("decoder", False)),
    embeddings={"shared": "tokens"},
)

_MBART = Pattern(
    types=("m2m_100", "mbart", "pegasus"),
    stacks=(_bart_stack("encoder", True), _bart_stack("decoder", True)),
    embeddings={"shared": "tokens"},
)

_WHISPER = Pattern(
    types=("whisper",),
    stacks=(_bart_stack("encoder", True), _bart_stack("decoder", True)),
    front=("encoder.conv1", "encoder.conv2"),
    inner={"encoder.conv1": "encoder.conv2"},
)


def _t5_stack(role: Literal["encoder", "decoder"]) -> StackPattern:
    attentions = [AttentionPattern("layer.0.SelfAttention", "q", "k", "v", "o", norms=("layer.0.layer_norm",))]
    if role == "decoder":
        cross = AttentionPattern(
            "layer.1.EncDecAttention", "q", "k", "v", "o", norms=("layer.1.layer_norm",), cross=True
        )
        attentions.append(cross)
    last = f"layer.{len(attentions)}"
    return StackPattern(
        role=role,
        at=role,
        blocks="block",
        attentions=tuple(attentions),
        up=(f"{last}.DenseReluDense.wi_1", f"{last}.DenseReluDense.wi"),
        gate=f"{last}.DenseReluDense.wi_0",
        down=f"{last}.DenseReluDense.wo",
        ffn_norms=(f"{last}.layer_norm",),
        positions="relative",
        fields={
            "depth": "num_layers" if role == "encoder" else "num_decoder_layers",
            "width": "d_model",
            "heads": "num_heads",
            "head_size": "d_kv",
            "ffn": "d_ff",
            "activation": "dense_act_fn",
        },
        embeddings={"embed_tokens": "tokens"},
        norms=("final_layer_norm",),
        norm_first=True,
    )


_T5 = Pattern(
    types=("mt5", "t5", "umt5"),
    stacks=(_t5_stack("encoder"), _t5_stack("decoder")),
    embeddings={"shared": "tokens"},
)

_WAV2VEC2 = Pattern(
    types=("hubert", "wav2vec2"),
    stacks=(
        StackPattern(
            role="encoder",
            at="encoder",
            blocks="layers",
            attentions=(
                AttentionPattern("attention", "q_proj", "k_proj", "v_proj", "out_proj", norms=("layer_norm",)),
            ),
            up=("feed_forward.intermediate_dense",),
            down="feed_forward.output_dense",
            ffn_norms=("final_layer_norm",),
            positions="convolutional",
            fields={
                "depth": "num_hidden_layers",
                "width": "hidden_size",
                "heads": "num_attention_heads",
                "ffn": "intermediate_size",
                "activation": "hidden_act",
            },
            norms=("layer_norm",),
            norm_first="do_stable_layer_norm",
        ),
    ),
    front=("feature_extractor", "feature_projection", "encoder.pos_conv_embed"),
)

PATTERNS: dict[str, Pattern] = {
    kind: pattern
    for pattern in (_BERT, _DISTILBERT, _GPT2, _LLAMA, _BART, _MBART, _WHISPER, _T5, _WAV2VEC2)
    for kind in pattern.types
}
"""Model type to the architecture that it is built like."""
