"""A decoder that writes: ``prefill`` takes the prompt chunk by chunk, ``decode`` one token, both with one KV cache."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from tasks.context import StepError
from tasks.export.attention import additive, named, pairs_of, written_layers
from tasks.export.convert import Signature
from tasks.export.names import COUNT, DECODE, IDS, LOGITS, POSITION, PREFILL

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 32
"""Tokens of a prompt that one call of ``prefill`` takes at most."""


def generation(model: Any, cache: int, lookup: bool) -> list[Signature]:
    """``prefill`` and ``decode`` of a causal language model, for one text at a time.

    ``prefill`` takes ``input_ids`` int32 [1, chunk], ``position`` int32 [1] of the first of them, ``count`` int32 [1]
    of those that are no padding, and the cache; it gives the ``logits`` [1, vocabulary] behind the last one counted and
    the new cache. ``decode`` takes one token, without a count. The cache is ``key_0``, ``value_0`` and so on, float
    [1, groups, cache, width]; what lies behind the position is not looked at.

    Raises:
        StepError: the model keeps no keys and values, as those do that are no transformers.
    """
    import torch
    from torch import nn
    from transformers.cache_utils import Cache

    state = _empty(model, cache)
    selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    class Continue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.bias = additive(lookup)

        def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
            ids, position = inputs[IDS], inputs[POSITION]
            rows = position + torch.arange(ids.shape[1], dtype=torch.int32)
            allowed = torch.arange(cache, dtype=torch.int32)[None] <= rows[:, None]
            layers = written_layers(pairs_of(inputs), position)
            last = inputs[COUNT] - 1 if COUNT in inputs else None
            arguments = {"logits_to_keep": last} if selects and last is not None else {}
            logits = self.model(
                input_ids=ids,
                attention_mask=self.bias(allowed.int()[None, None]),
                past_key_values=Cache(layers=layers),
                use_cache=True,
                **arguments,
            ).logits
            if last is not None and not selects:
                logits = logits[:, last]
            return {LOGITS: logits[:, 0], **named(layers)}

    # Every input is a tensor of its own: the converter takes one object under two names for one input.
    start, count = (torch.ones(1, dtype=torch.int32) for _ in range(2))
    token = torch.zeros(1, 1, dtype=torch.int32)
    chunk = torch.zeros(1, min(CHUNK, cache), dtype=torch.int32)
    module = Continue()
    return [
        Signature(PREFILL, module, {IDS: chunk, POSITION: start, COUNT: count, **state}),
        Signature(DECODE, module, {IDS: token, POSITION: start, **state}),
    ]


def _empty(model: Any, cache: int) -> dict[str, Tensor]:
    """An empty cache for the model, whose shapes are those that a run of it shows."""
    import torch

    with torch.no_grad():
        out = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True)
    layers = getattr(out.get("past_key_values"), "layers", ())
    if not layers or any(getattr(layer, "keys", None) is None or layer.keys.ndim != 4 for layer in layers):
        raise StepError(
            f"{model.config.model_type} keeps no keys and values of every layer, so that it cannot write with a cache; "
            "write generation: false"
        )
    shaped = {name: (*tensor.shape[:2], cache, tensor.shape[3]) for name, tensor in named(layers).items()}
    return {name: torch.zeros(shape) for name, shape in shaped.items()}
