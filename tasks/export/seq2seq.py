"""An encoder-decoder as two signatures: ``encode`` reads, ``decode`` writes one token with a KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.export.attention import additive, given_layers, kept_layers, named, pairs_of, written_layers
from tasks.export.convert import Signature
from tasks.export.names import DECODE, DECODER_IDS, ENCODE, FEATURES, IDS, LOGITS, MASK, POSITION

if TYPE_CHECKING:
    from torch import Tensor

CROSS = "cross_"
"""Before the names of the keys and values that the decoder makes of the encoder's output."""


def seq2seq(model: Any, batch: int, length: int, target_length: int, lookup: bool) -> list[Signature]:
    """``encode`` and ``decode`` of a translation model or of Whisper.

    ``encode`` takes ``input_ids`` and ``attention_mask`` int32 [batch, length], or ``input_features`` [batch, mels,
    length], and gives what the decoder's cross-attention looks at: ``cross_key_0``, ``cross_value_0`` and so on, float
    [batch, heads, states, width]. ``decode`` takes these, ``attention_mask`` where there was one, one token for each
    example as ``decoder_input_ids`` int32 [batch, 1], its ``position`` int32 [1] and the decoder's own cache
    (``key_0``, ``value_0`` and so on, [batch, heads, target_length, width]); it gives the ``logits`` [batch,
    vocabulary] behind the token and the new cache. What lies behind the position is not looked at.
    """
    import torch
    from torch import nn
    from transformers.cache_utils import Cache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    reads_text = model.main_input_name == IDS
    example = _example(model, batch, length, reads_text)
    mask = {MASK: example[MASK]} if reads_text else {}
    cross, own, width = _shapes(model, example, target_length)
    layers = len(own) // 2

    class Encode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.bias = additive(lookup)

        def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
            if MASK in inputs:
                inputs[MASK] = self.bias(inputs[MASK].view(batch, 1, 1, length))
            seen = Cache(layers=kept_layers(layers))
            self.model(
                **inputs,
                decoder_input_ids=torch.zeros(batch, 1, dtype=torch.int32),
                past_key_values=EncoderDecoderCache(Cache(layers=kept_layers(layers)), seen),
                use_cache=True,
            )
            return named(seen.layers, CROSS)

    class Decode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.bias = additive(lookup)

        def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
            position = inputs[POSITION]
            earlier = torch.arange(target_length, dtype=torch.int32) <= position
            cache = Cache(layers=written_layers(pairs_of(inputs), position))
            seen = Cache(layers=given_layers(pairs_of(inputs, CROSS)))
            padded = {MASK: self.bias(inputs[MASK].view(batch, 1, 1, length))} if MASK in inputs else {}
            out = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=torch.zeros(batch, 1, width)),
                decoder_input_ids=inputs[DECODER_IDS],
                decoder_attention_mask=self.bias(earlier.int()[None, None, None]),
                past_key_values=EncoderDecoderCache(cache, seen),
                use_cache=True,
                **padded,
            )
            return {LOGITS: out.logits[:, 0], **named(cache.layers)}

    step = {
        DECODER_IDS: torch.zeros(batch, 1, dtype=torch.int32),
        POSITION: torch.ones(1, dtype=torch.int32),
    }
    return [
        Signature(ENCODE, Encode(), example),
        Signature(DECODE, Decode(), {**step, **mask, **_zeros(cross), **_zeros(own)}),
    ]


def _example(model: Any, batch: int, length: int, reads_text: bool) -> dict[str, Tensor]:
    import torch

    if not reads_text:
        return {FEATURES: torch.zeros(batch, model.config.num_mel_bins, length)}
    return {
        IDS: torch.zeros(batch, length, dtype=torch.int32),
        MASK: torch.ones(batch, length, dtype=torch.int32),
    }


def _shapes(model: Any, example: dict[str, Tensor], target_length: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Shapes of the cross-attention's keys and values and of the decoder's cache, and the width of the encoder's
    states, as a run of the model shows them."""
    import torch

    first = torch.zeros(len(next(iter(example.values()))), 1, dtype=torch.long)
    inputs = {name: tensor.long() if tensor.dtype == torch.int32 else tensor for name, tensor in example.items()}
    with torch.no_grad():
        out = model(**inputs, decoder_input_ids=first, use_cache=True)
    past = out.past_key_values
    cross = {name: tuple(tensor.shape) for name, tensor in named(past.cross_attention_cache.layers, CROSS).items()}
    own = named(past.self_attention_cache.layers)
    shaped = {name: (*tensor.shape[:2], target_length, tensor.shape[3]) for name, tensor in own.items()}
    return cross, shaped, out.encoder_last_hidden_state.shape[-1]


def _zeros(shapes: dict[str, Any]) -> dict[str, Tensor]:
    import torch

    return {name: torch.zeros(shape) for name, shape in shapes.items()}
