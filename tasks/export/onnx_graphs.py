"""The graphs of an ONNX export: modules of a model with inputs and outputs whose batch and lengths are free."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from tasks.context import StepError
from tasks.export.attention import additive, given_layers, kept_layers
from tasks.export.ctc import listener
from tasks.export.names import (
    CROSS,
    DECODER_IDS,
    FEATURES,
    IDS,
    LOGITS,
    MASK,
    ONNX_DECODER,
    ONNX_ENCODER,
    ONNX_FILE,
    PAST,
    PRESENT,
    SAMPLES,
    cached,
)
from tasks.export.scorer import is_causal, pools_last, position_offset

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH, LENGTH, SEEN, TOTAL, SOURCE = "batch", "length", "past", "total", "source"
"""What the free sizes are called in the file."""

_CACHE = {0: BATCH, 2: SEEN}
_GROWN = {0: BATCH, 2: TOTAL}
_TEXT = {0: BATCH, 1: LENGTH}
_READ = {0: BATCH, 1: SOURCE}


@dataclass(frozen=True)
class Graph:
    """One graph.

    Args:
        file: its name.
        module: takes the inputs as a dictionary and gives the outputs as one.
        inputs: an example of each input by name. No two free sizes are the same and none is below 2, so that the
            converter takes none for a constant.
        free: for each input or output the name of every size that is free, by its place.
    """

    file: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    free: Mapping[str, Mapping[int, str]]

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(name for name in self.free if name not in self.inputs)


_BATCH, _LENGTH, _SEEN, _SOURCE = 3, 5, 7, 11
"""Sizes of the examples."""


def graphs(model: Any, family: str, task: Task) -> list[Graph]:
    """The graphs of a model, whose attention is the one for exports.

    Args:
        model: the model; that of a model for CTC is changed.
        family: as ``tasks.models.family_of`` says.
        task: what the model does.

    Raises:
        StepError: a decoder keeps no keys and values of every layer.
    """
    if task == "text-classification":
        return [_classifier(model, task)]
    if family == "decoder":
        return [_decoder(model)]
    if family == "ctc":
        return [_ctc(model)]
    return _encoder_decoder(model)


def _classifier(model: Any, task: Task) -> Graph:
    import torch
    from torch import nn

    causal, last, offset = is_causal(model, task), pools_last(model, task), position_offset(model)

    class Classify(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.bias = additive(False)

        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            ids, mask = inputs[IDS], inputs[MASK]
            places = torch.arange(ids.shape[1])
            allowed = mask[:, None, None]
            if causal:
                allowed = allowed * (places <= places[:, None]).long()
            arguments: dict[str, Any] = {IDS: ids, MASK: self.bias(allowed)}
            if causal:
                arguments["use_cache"] = False
            if offset is not None:
                arguments["position_ids"] = (places + offset)[None]
            if not last:
                return {LOGITS: self.model(**arguments).logits}
            hidden = self.model.base_model(**arguments).last_hidden_state
            final = (mask * places).argmax(1)
            return {LOGITS: self.model.score(hidden[torch.arange(ids.shape[0]), final])}

    free: dict[str, dict[int, str]] = {IDS: _TEXT, MASK: _TEXT, LOGITS: {0: BATCH}}
    return Graph(ONNX_FILE, Classify(), {IDS: _ones(_BATCH, _LENGTH), MASK: _ones(_BATCH, _LENGTH)}, free)


def _decoder(model: Any) -> Graph:
    import torch
    from torch import nn
    from transformers.cache_utils import Cache

    shapes = _cache_shapes(model, {IDS: _ones(1, 1)}, lambda out: out.get("past_key_values"))
    layers = len(shapes)
    placed = "position_ids" in inspect.signature(model.forward).parameters

    class Decode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.bias = additive(False)

        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            ids, mask = inputs[IDS], inputs[MASK]
            kept = given_layers(_pairs(inputs, PAST, layers))
            past = kept[0].keys.shape[2]
            columns = torch.arange(past + ids.shape[1])
            allowed = mask[:, None, None] * (columns <= columns[past:, None]).long()
            arguments: dict[str, Any] = {}
            if placed:
                arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
            out = self.model(
                input_ids=ids,
                attention_mask=self.bias(allowed),
                past_key_values=Cache(layers=kept),
                use_cache=True,
                **arguments,
            )
            return {LOGITS: out.logits, **_named(kept, PRESENT)}

    inputs = {IDS: _ones(_BATCH, _LENGTH), MASK: _ones(_BATCH, _SEEN + _LENGTH)}
    free: dict[str, Mapping[int, str]] = {IDS: _TEXT, MASK: {0: BATCH, 1: TOTAL}}
    inputs |= _state(shapes, PAST, _SEEN)
    free |= dict.fromkeys(cached(PAST, layers), _CACHE)
    free |= {LOGITS: _TEXT} | dict.fromkeys(cached(PRESENT, layers), _GROWN)
    return Graph(ONNX_FILE, Decode(), inputs, free)


def _encoder_decoder(model: Any) -> list[Graph]:
    import torch
    from torch import nn
    from transformers.cache_utils import Cache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    reads_text = model.main_input_name == IDS
    if reads_text:
        example = {IDS: _ones(_BATCH, _SOURCE), MASK: _ones(_BATCH, _SOURCE)}
        free: dict[str, Mapping[int, str]] = dict.fromkeys(example, _READ)
    else:
        frames = 2 * model.config.max_source_positions
        example = {FEATURES: torch.zeros(_BATCH, model.config.num_mel_bins, frames)}
        free = {FEATURES: {0: BATCH}}
    probe = {**example, DECODER_IDS: _ones(_BATCH, 1)}
    own = _cache_shapes(model, probe, lambda out: out.past_key_values.self_attention_cache)
    cross = _cache_shapes(model, probe, lambda out: out.past_key_values.cross_attention_cache)
    layers = len(own)
    width = model.config.d_model
    seen_free: Mapping[int, str] = {0: BATCH, 2: SOURCE} if reads_text else {0: BATCH}

    class Encode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.bias = additive(False)

        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            given = dict(inputs)
            if MASK in given:
                given[MASK] = self.bias(given[MASK][:, None, None])
            seen = Cache(layers=kept_layers(layers))
            rows = next(iter(inputs.values())).shape[0]
            self.model(
                **given,
                decoder_input_ids=torch.zeros(rows, 1, dtype=torch.long),
                past_key_values=EncoderDecoderCache(Cache(layers=kept_layers(layers)), seen),
                use_cache=True,
            )
            return _named(seen.layers, CROSS)

    class Decode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.bias = additive(False)

        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            ids = inputs[DECODER_IDS]
            kept = given_layers(_pairs(inputs, PAST, layers))
            seen = given_layers(_pairs(inputs, CROSS, layers))
            past = kept[0].keys.shape[2]
            columns = torch.arange(past + ids.shape[1])
            earlier = (columns <= columns[past:, None]).long()
            padded = {MASK: self.bias(inputs[MASK][:, None, None])} if MASK in inputs else {}
            out = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=torch.zeros(ids.shape[0], 1, width)),
                decoder_input_ids=ids,
                decoder_attention_mask=self.bias(earlier[None, None]),
                past_key_values=EncoderDecoderCache(Cache(layers=kept), Cache(layers=seen)),
                use_cache=True,
                **padded,
            )
            return {LOGITS: out.logits, **_named(kept, PRESENT)}

    encode = Graph(ONNX_ENCODER, Encode(), example, free | dict.fromkeys(cached(CROSS, layers), seen_free))
    inputs = {DECODER_IDS: _ones(_BATCH, _LENGTH)}
    decode_free: dict[str, Mapping[int, str]] = {DECODER_IDS: _TEXT}
    if reads_text:
        inputs[MASK], decode_free[MASK] = _ones(_BATCH, _SOURCE), _READ
    inputs |= _state(cross, CROSS, _SOURCE if reads_text else None) | _state(own, PAST, _SEEN)
    decode_free |= dict.fromkeys(cached(CROSS, layers), seen_free) | dict.fromkeys(cached(PAST, layers), _CACHE)
    decode_free |= {LOGITS: _TEXT} | dict.fromkeys(cached(PRESENT, layers), _GROWN)
    return [encode, Graph(ONNX_DECODER, Decode(), inputs, decode_free)]


def _ctc(model: Any) -> Graph:
    import torch
    from torch import nn

    heard = listener(model, lookup=False, dense=False)

    class Listen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heard = heard

        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return self.heard(inputs[SAMPLES], inputs[MASK])

    reach = 1
    for layer in reversed(list(model.base_model.feature_extractor.conv_layers)):
        reach = (reach - 1) * layer.conv.stride[0] + layer.conv.kernel_size[0]
    length = 4 * reach + 1
    inputs = {SAMPLES: torch.zeros(_BATCH, length), MASK: _ones(_BATCH, length)}
    return Graph(ONNX_FILE, Listen(), inputs, {SAMPLES: _TEXT, MASK: _TEXT, LOGITS: {0: BATCH, 1: "frames"}})


def _ones(*shape: int) -> Tensor:
    import torch

    return torch.ones(*shape, dtype=torch.long)


def _cache_shapes(model: Any, inputs: Mapping[str, Tensor], cache: Any) -> list[tuple[int, ...]]:
    """The shape of the keys of every layer, as a run of the model shows them.

    Raises:
        StepError: some layer keeps none.
    """
    import torch

    with torch.no_grad():
        layers = getattr(cache(model(**inputs, use_cache=True)), "layers", ())
    if not layers or any(getattr(layer, "keys", None) is None or layer.keys.ndim != 4 for layer in layers):
        raise StepError(
            f"{model.config.model_type} keeps no keys and values of every layer, so that it cannot write with a cache; "
            "use another architecture"
        )
    return [tuple(layer.keys.shape) for layer in layers]


def _state(shapes: list[tuple[int, ...]], prefix: str, length: int | None) -> dict[str, Tensor]:
    import torch

    tensors = {}
    for layer, (_, heads, kept, width) in enumerate(shapes):
        for name in cached(prefix, len(shapes))[2 * layer : 2 * layer + 2]:
            tensors[name] = torch.zeros(_BATCH, heads, kept if length is None else length, width)
    return tensors


def _pairs(inputs: Mapping[str, Tensor], prefix: str, layers: int) -> list[tuple[Tensor, Tensor]]:
    names = cached(prefix, layers)
    return [(inputs[key], inputs[value]) for key, value in zip(names[::2], names[1::2], strict=True)]


def _named(layers: Any, prefix: str) -> dict[str, Tensor]:
    tensors = (tensor for layer in layers for tensor in (layer.keys, layer.values))
    return dict(zip(cached(prefix, len(layers)), tensors, strict=True))
