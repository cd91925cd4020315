"""GPTQ, AWQ, SmoothQuant and ranges of activations over a whole model, by what its layers see of training data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from tasks.compress.calibrate import observe
from tasks.compress.gptq import gptq
from tasks.compress.grid import Rounded, round_to
from tasks.compress.rescale import Shared, move, shared_inputs, undivided
from tasks.compress.scaling import awq_scale, smooth_scale
from tasks.context import StepContext, StepError
from tasks.models.anatomy import Anatomy, anatomy
from tasks.models.layout import LinearLayer, linear_layers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.data.encoded import Encoded

UNSEEN = "no calibration example reached it; rounded to the nearest"


@dataclass
class Inputs:
    """What one layer was given: the sums of x xᵀ and of |x| over ``count`` vectors x, the largest |x| of each input,
    and the least and greatest of all."""

    hessian: Tensor
    magnitude: Tensor
    largest: Tensor
    count: int = 0
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Calibrated:
    """What calibration decided.

    Args:
        rounded: codes by layer, for those that were rounded.
        scales: by layer, what its weights were multiplied with and its inputs have yet to be divided by.
        folded: how many scales went into the layers before.
        kept: rows that kept the rounding to the nearest, by layer, and their number.
        alphas: AWQ's alpha of the layers that share an input, by the first of them.
        notes: what is to be said of single layers.
    """

    rounded: dict[str, Rounded] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    folded: int = 0
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


Rounding = Mapping[str, tuple[int, int | None]]
"""Layer to bits (4 or 8) and inputs that share a scale; None is a whole row."""


def round_by_gptq(
    network: nn.Module, to: Rounding, data: Encoded, ctx: StepContext, *, damping: float, act_order: bool
) -> Calibrated:
    """Round the layers ``to`` of a float model in place by GPTQ, block by block: each sees what the blocks before it,
    rounded already, make of the examples.

    Args:
        network: a model whose layers outside of ``to`` already have the weights that will be stored.
        to: what to round, none of it tied to another module.
        data: the examples.
        ctx: device and progress.
        damping: see ``tasks.compress.gptq``.
        act_order: likewise.
    """
    found, parts, layers = Calibrated(), anatomy(network), _layers(network)
    shared = shared_inputs(parts)
    stages = _stages(parts)
    for number, (name, names) in enumerate(stages):
        chosen = [layer for layer in names if layer in to]
        alike = {layer: group.layers[0] for group in shared.get(name, ()) for layer in group.layers}
        seen = inputs_of(network, {alike.get(layer, layer) for layer in chosen}, data, ctx)
        for layer in chosen:
            bits, group = to[layer]
            inputs = seen.get(alike.get(layer, layer))
            matrix = layers[layer].matrix
            if inputs is None:
                rounded, found.notes[layer] = round_to(matrix, bits, group), UNSEEN
            else:
                rounded, kept = gptq(matrix, inputs.hessian / inputs.count, bits, group, damping, act_order)
                found.kept[layer] = (kept, len(matrix))
            found.rounded[layer] = rounded
            write(layers[layer], rounded.weight)
        ctx.progress(number + 1, len(stages), "blocks")
    return found


def round_by_awq(network: nn.Module, to: Rounding, data: Encoded, ctx: StepContext) -> Calibrated:
    """Scale the inputs of each block's layers by AWQ, then round the layers ``to`` of a float model in place to the
    nearest, block by block; the arguments are those of ``round_by_gptq``.

    A scale goes into the layer or the normalisation before where nothing else reads that; else it stays with the layer.
    """
    found, parts, layers = Calibrated(), anatomy(network), _layers(network)
    shared, folded, hooks = shared_inputs(parts), 0, []
    stages = _stages(parts)
    try:
        for number, (name, names) in enumerate(stages):
            groups = [_within(group, to, layers) for group in shared.get(name, ())]
            groups = [group for group in groups if group.layers]
            seen = inputs_of(network, {group.layers[0] for group in groups}, data, ctx)
            for group in groups:
                inputs = seen.get(group.layers[0])
                if inputs is None:
                    found.notes.update(dict.fromkeys(group.layers, UNSEEN))
                    continue
                scale, alpha = awq_scale(
                    [layers[layer].matrix.detach().float() for layer in group.layers],
                    inputs.hessian / inputs.count,
                    inputs.magnitude / inputs.count,
                    [partial(_rounded, bits=to[layer][0], group=to[layer][1]) for layer in group.layers],
                )
                found.alphas[group.layers[0]] = alpha
                if alpha == 0:
                    continue
                if move(network, group, scale):
                    folded += 1
                else:
                    found.scales.update(dict.fromkeys(group.layers, scale))
                    hooks += undivided(network, dict.fromkeys(group.layers, scale))
            for layer in names:
                if layer in to:
                    found.rounded[layer] = round_to(layers[layer].matrix, *to[layer])
                    write(layers[layer], found.rounded[layer].weight)
            ctx.progress(number + 1, len(stages), "blocks")
    finally:
        for hook in hooks:
            hook.remove()
    return replace(found, folded=folded)


def smooth(network: nn.Module, names: Sequence[str], data: Encoded, ctx: StepContext, alpha: float) -> Calibrated:
    """Move outliers of the inputs of attentions and feed-forward parts into the weights, by SmoothQuant; the model
    computes the same as before once the inputs of the layers in ``scales`` are divided.

    Args:
        network: a float model, changed in place.
        names: the layers that are to be quantized.
        data: the examples.
        ctx: device.
        alpha: share of the difficulty that moves.
    """
    found, layers, folded = Calibrated(), _layers(network), 0
    every = [group for groups in shared_inputs(anatomy(network)).values() for group in groups if group.entry]
    groups = [group for group in (_within(group, names, layers) for group in every) if group.layers]
    seen = inputs_of(network, {group.layers[0] for group in groups}, data, ctx)
    for group in groups:
        inputs = seen.get(group.layers[0])
        if inputs is None:
            found.notes.update(dict.fromkeys(group.layers, UNSEEN))
            continue
        weights = [layers[layer].matrix.detach().float() for layer in group.layers]
        scale = smooth_scale(weights, inputs.largest, alpha)
        if move(network, group, scale):
            folded += 1
        else:
            found.scales.update(dict.fromkeys(group.layers, scale))
    return replace(found, folded=folded)


def ranges_of(
    network: nn.Module, names: Iterable[str], data: Encoded, scales: Mapping[str, Tensor], ctx: StepContext
) -> dict[str, tuple[float, float]]:
    """The least and the greatest input of each layer, 0 between them; layers that no example reached are left out.

    Args:
        network: a float model.
        names: the layers.
        data: the examples.
        scales: what the inputs of layers are divided by first.
        ctx: device.
    """
    hooks = undivided(network, scales)
    try:
        seen = inputs_of(network, names, data, ctx, moments=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (inputs.low, inputs.high) for name, inputs in seen.items()}


def share_outside(
    network: nn.Module, ranges: Mapping[str, tuple[float, float]], data: Encoded, scales: Mapping[str, Tensor]
) -> dict[str, float]:
    """Share of the inputs of each layer that lie outside its range by more than a tenth of it, for other examples."""
    outside, count = dict.fromkeys(ranges, 0), dict.fromkeys(ranges, 0)

    def see(name: str, x: Tensor) -> None:
        low, high = ranges[name]
        more = 0.1 * (high - low)
        outside[name] += int(((x < low - more) | (x > high + more)).sum())
        count[name] += x.numel()

    hooks = undivided(network, scales)
    try:
        observe(network, ranges, data, see)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: outside[name] / max(1, count[name]) for name in ranges}


def inputs_of(
    network: nn.Module, names: Iterable[str], data: Encoded, ctx: StepContext, *, moments: bool = True
) -> dict[str, Inputs]:
    """What the layers ``names`` see of the examples, by name; one that none of them reaches is left out.

    Raises:
        StepError: an input is not finite.
    """
    import torch

    seen: dict[str, Inputs] = {}
    chosen = sorted(names)

    def see(name: str, x: Tensor) -> None:
        magnitude = x.abs()
        largest = magnitude.amax(dim=0)
        if not torch.isfinite(largest).all():
            raise StepError(
                f"the activations that come into {name} are not finite, so that they have no range; look for weights "
                "that are too large, or train the model in fp32 or bf16"
            )
        if name not in seen:
            width = x.shape[1] if moments else 0
            empty = torch.zeros(width, width, dtype=torch.float64, device=x.device)
            seen[name] = Inputs(empty, torch.zeros_like(largest), torch.zeros_like(largest))
        inputs = seen[name]
        if moments:
            inputs.hessian += (x.T @ x).double()
        inputs.magnitude += magnitude.sum(dim=0)
        inputs.largest = torch.maximum(inputs.largest, largest)
        inputs.count += len(x)
        inputs.low, inputs.high = min(inputs.low, float(x.min())), max(inputs.high, float(x.max()))

    if chosen:
        observe(network, chosen, data, see, device=ctx.device)
    return seen


def write(layer: LinearLayer, weight: Tensor) -> None:
    """Set the weights of a layer, [out, in]."""
    import torch

    with torch.no_grad():
        layer.matrix.copy_(weight)


def _rounded(weight: Tensor, bits: int, group: int | None) -> Tensor:
    return round_to(weight, bits, group).weight


def _layers(network: nn.Module) -> dict[str, LinearLayer]:
    return {layer.name: layer for layer in linear_layers(network)}


def _within(group: Shared, chosen: Iterable[str], layers: Mapping[str, LinearLayer]) -> Shared:
    """The part of ``group`` that may be scaled. Layers that are left as they are are not touched, so that the scale
    cannot go into what they share."""
    allowed = set(chosen)
    inside = tuple(layer for layer in group.layers if layer in allowed)
    source = group.source
    touches = source is not None and (source.name not in layers or source.name in allowed)
    return replace(group, layers=inside, source=source if touches and inside == group.layers else None)


def _stages(parts: Anatomy) -> list[tuple[str, tuple[str, ...]]]:
    """Name and layers of what is rounded together, in the order in which the model computes."""
    inside = [(block.name, block.layers) for block in parts.blocks]
    return [("front", parts.front_layers), *inside, ("pooler", parts.pooler), ("head", parts.head)]
