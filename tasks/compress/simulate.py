"""Quantization as training sees it: layers that compute with rounded weights and activations, and float gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.compress.packed import levels, reduced_range
from tasks.models.layout import embeddings, linear_layers

if TYPE_CHECKING:
    from torch import Tensor, nn

Change = Callable[["Tensor"], "Tensor"]


@contextmanager
def simulated(
    network: nn.Module, weights: Mapping[str, Change], inputs: Mapping[str, Change] | None = None
) -> Iterator[None]:
    """Let layers and tables compute with changed weights and inputs while the context lasts.

    The parameters stay the float ones; a gradient goes through as if nothing had been changed (the straight-through
    estimator, Bengio et al., 1308.3432), except where ``inputs`` clips.

    Args:
        network: a float model.
        weights: module name to the change of its weights: [out, in] of a layer, rows [N, columns] of a table.
        inputs: module name to the change of a layer's input.
    """
    changed = []
    given = inputs or {}
    try:
        for layer in linear_layers(network):
            if layer.name in weights:
                how: Any = partial(_linear, layer, weights[layer.name], given.get(layer.name))
                layer.module.forward = how
                changed.append(layer.module)
        for table in embeddings(network):
            if table.name in weights:
                how = partial(_rows, table.module, table.factor or 1.0, weights[table.name])
                table.module.forward = how
                changed.append(table.module)
        yield
    finally:
        for module in changed:
            del module.forward


def straight_through(change: Change, x: Tensor) -> Tensor:
    """``change(x)`` with the gradient of ``x``."""
    return x + (change(x.detach()) - x.detach())


def dynamic_activations(x: Tensor) -> Tensor:
    """What the dynamic int8 kernel makes of its inputs: every token divided by its largest magnitude, then one step and
    one zero for all; the gradient goes straight through."""
    return straight_through(_dynamic, x)


def static_activations(low: float, high: float) -> Change:
    """What the static int8 kernel makes of its inputs; what is clipped gets no gradient."""
    step, zero, least, greatest = levels(low, high)

    def to_levels(x: Tensor) -> Tensor:
        return ((x / step).round() + zero).clamp(0, 127 if reduced_range() else 255).sub(zero) * step

    return lambda x: straight_through(to_levels, x.clamp(least, greatest))


def _dynamic(x: Tensor) -> Tensor:
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
    unit = x / largest
    low, high = min(float(unit.min()), 0.0), max(float(unit.max()), 0.0)
    step, zero, _, _ = levels(low, high)
    top = 127 if reduced_range() else 255
    return ((unit / step).round() + zero).clamp(0, top).sub(zero) * step * largest


def _linear(layer: Any, change: Change, before: Change | None, x: Tensor) -> Tensor:
    from torch.nn.functional import linear

    given = x if before is None else before(x)
    return linear(given, straight_through(change, layer.matrix), layer.module.bias)


def _rows(table: Any, factor: float, change: Change, ids: Tensor) -> Tensor:
    from torch.nn.functional import embedding

    rows = embedding(ids, table.weight, table.padding_idx)
    flat = straight_through(change, rows.reshape(-1, rows.shape[-1])).view(rows.shape)
    return flat if factor == 1 else flat * factor
