"""From a float model to one of few bits: calibration, training, bits of each layer, and the packed layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from specs.schema.steps.quantize import SAMPLES, QuantizeSpec
from tasks.compress import packed, sensitivity, weight_only
from tasks.compress.calibrate import sample
from tasks.compress.grid import Rounded, round_to
from tasks.compress.packing import pack_int8, pack_weights
from tasks.compress.round_by_data import (
    Calibrated,
    ranges_of,
    round_by_awq,
    round_by_gptq,
    share_outside,
    smooth,
)
from tasks.compress.selection import Selection, reasons, rows_of, select
from tasks.compress.simulate import Change, dynamic_activations, simulated, static_activations
from tasks.context import Artifact, StepContext, StepError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.data.encoded import Encoded

MOST_CLIPPED = {"weights": 0.05, "activations": 0.01}
"""Share of a layer's weights that lie more than a step outside what its integers reach, and of its activations that lie
outside by more than a tenth of their range: a layer with more is saturated."""


@dataclass(frozen=True)
class Made:
    """A model of few bits, the transform that loads it, and what there is to say and to write beside it."""

    network: nn.Module
    entry: Mapping[str, Any]
    touched: tuple[str, ...]
    left: Mapping[str, str]
    summary: str
    properties: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)


def few_bits(network: nn.Module, model: Artifact, checked: Encoded, spec: QuantizeSpec, ctx: StepContext) -> Made:
    """Pack a float model as ``spec`` says, in place.

    Args:
        network: the model.
        model: where it came from.
        checked: examples on which saturation is looked for.
        spec: any precision but fp16 and bf16.
        ctx: where, and the training data.

    Raises:
        StepError: see ``quantize``.
    """
    tables = spec.embeddings is not False
    selection = select(network, spec.skip, tables)
    if not selection.layers:
        raise StepError(f"quantize found no linear layer to convert: {reasons(selection.left) or 'the model has none'}")
    data = sample(model, spec.samples or SAMPLES, ctx) if spec.calibrates else None
    properties: dict[str, Any] = {"algorithm": spec.algorithm}
    if data is not None:
        properties["calibration_examples"] = len(data)
    measured: dict[str, dict[int, float]] = {}
    if spec.measures and data is not None:
        ctx.note("measuring what each layer alone does to the outputs")
        measured = sensitivity.measure(network, selection, partial(_as_stored, spec), data, ctx.progress)
    made = (_weights if spec.weight_only else _int8)(network, model, selection, measured, data, checked, spec, ctx)
    files, bits = {}, made.properties.get("bits", {})
    if measured:
        properties["sensitivity"] = sensitivity.table(measured, bits)
        files = sensitivity.draw(measured, bits)
    summary = f"converted {len(selection.layers)} of {selection.linear} linear layers"
    summary += f" and {len(selection.embeddings)} of {selection.tables} embeddings to {made.summary}"
    return Made(
        made.network,
        made.entry,
        selection.names,
        selection.left,
        summary,
        properties | dict(made.properties),
        made.warnings,
        files,
    )


def _int8(
    network: nn.Module,
    model: Artifact,
    selection: Selection,
    measured: Mapping[str, Any],
    data: Encoded | None,
    checked: Encoded,
    spec: QuantizeSpec,
    ctx: StepContext,
) -> Made:
    found = Calibrated()
    if spec.algorithm == "smoothquant" and data is not None:
        ctx.note("moving outliers into the weights")
        network.to(ctx.device)
        found = smooth(network, selection.layers, data, ctx, 0.5 if spec.alpha is None else spec.alpha)
    ranges: dict[str, tuple[float, float]] | None = None
    if spec.stored == "int8-static" and data is not None:
        network.to(ctx.device)
        ranges = ranges_of(network, selection.layers, data, found.scales, ctx)
    network.to("cpu")
    said, properties, warnings = "", {}, ()
    if spec.train is not None:
        weights = dict.fromkeys(selection.names, _int8_rows)
        inputs = {
            name: static_activations(*ranges[name]) if ranges and name in ranges else dynamic_activations
            for name in selection.layers
        }
        said, properties, warnings = _train(network, model, weights, inputs, spec, ctx)
        if ranges is not None and data is not None:
            ranges = ranges_of(network.to(ctx.device), selection.layers, data, found.scales, ctx)
            network.to("cpu")
    properties |= {"reduced_activation_range": packed.reduced_range(), **_told(found)}
    if ranges is not None:
        outside = share_outside(network, ranges, checked, found.scales)
        _refuse_saturated(outside, "activations", "raise samples, or leave the layer out with skip")
        properties["clipped_activations"] = max(outside.values(), default=0.0)
        properties["dynamic_layers"] = [name for name in selection.layers if name not in ranges]
    changed, entry = pack_int8(network, selection, found.scales, ranges)
    return Made(changed, entry, (), {}, f"{_named(spec)}{said}", properties, warnings)


def _weights(
    network: nn.Module,
    model: Artifact,
    selection: Selection,
    measured: Mapping[str, Mapping[int, float]],
    data: Encoded | None,
    checked: Encoded,
    spec: QuantizeSpec,
    ctx: StepContext,
) -> Made:
    said, properties, warnings = "", {}, ()
    bits = _bits(network, selection, measured, spec)
    if spec.train is not None:
        weights = {name: partial(_as_stored, spec, bits=width) for name, width in bits.items()}
        said, properties, warnings = _train(network, model, weights, {}, spec, ctx)
    groups = {width: spec.group(width) for width in (4, 8)}
    found = Calibrated()
    if spec.algorithm != "rtn" and data is not None:
        # A model that is given what will be stored of its tables and shared weights calibrates the rest to that.
        to = {name: (bits[name], groups[bits[name]]) for name in selection.alone if bits[name] != 16}
        known: dict[str, Rounded] = {}
        for names in selection.units.values():
            if names[0] not in to:
                weight = rows_of(network, selection, names[0])
                if bits[names[0]] != 16:
                    known[names[0]] = round_to(weight, bits[names[0]], groups[bits[names[0]]])
                weight.copy_(_as_stored(spec, weight, bits[names[0]]))
        ctx.note(f"rounding by {spec.algorithm}, block by block")
        network.to(ctx.device)
        if spec.algorithm == "gptq":
            damping = 0.01 if spec.damping is None else spec.damping
            found = round_by_gptq(network, to, data, ctx, damping=damping, act_order=bool(spec.act_order))
        else:
            found = round_by_awq(network, to, data, ctx)
        network.to("cpu")
        found.rounded.update(known)
    rounded = {name: _on_cpu(codes) for name, codes in found.rounded.items()}
    clipped = {name: codes.clipped for name, codes in rounded.items()}
    _refuse_saturated(clipped, "weights", "raise damping, or write algorithm: rtn")
    if spec.mixed is not None and set(bits.values()) == {sensitivity.BITS[-1]}:
        warnings = (*warnings, f"mixed: {spec.mixed.budget} bytes hold every layer in 16 bits; write a smaller budget")
    changed, entry = pack_weights(network, selection, bits, groups, rounded, found.scales)
    properties |= _told(found) | {
        "bits": bits,
        "group_size": {str(width): groups[width] or "per-row" for width in sorted({*bits.values()} - {16})},
    }
    if clipped:
        properties["clipped_weights"] = max(clipped.values())
    return Made(changed, entry, (), {}, f"{_named(spec, bits)}{_also(found)}{said}", properties, warnings)


def _train(
    network: nn.Module,
    model: Artifact,
    weights: Mapping[str, Change],
    inputs: Mapping[str, Change],
    spec: QuantizeSpec,
    ctx: StepContext,
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Train the model with its weights, and activations where they become int8, rounded in every pass."""
    from tasks.finetune import finetune
    from tasks.finetune.loop import train

    assert spec.train is not None
    ctx.note("training with rounded weights")
    with simulated(network, weights, inputs):
        trained = train(network, finetune.training_data(network, model, ctx), spec.train, ctx)
    network.to("cpu")
    return f"; {finetune.summary(trained)}", finetune.properties(trained), finetune.warnings(trained)


def _bits(
    network: nn.Module, selection: Selection, measured: Mapping[str, Mapping[int, float]], spec: QuantizeSpec
) -> dict[str, int]:
    """The bits of each layer and table; those that share their weights have the same."""
    if spec.mixed is None:
        return dict.fromkeys(selection.names, int(spec.stored.removeprefix("int")))
    sizes = {}
    for names in selection.units.values():
        weight = rows_of(network, selection, names[0])
        # Where AWQ's scale goes is known only later: space is kept for it in every layer.
        kept = 4 * weight.shape[1] if spec.algorithm == "awq" and names[0] in selection.layers else 0
        sizes[names[0]] = {bits: kept + stored_bytes(spec, weight, bits) for bits in measured[names[0]]}
    fixed = fixed_bytes(network, selection, 3 if spec.algorithm == "awq" else 2)
    chosen = sensitivity.assign(measured, sizes, fixed, spec.mixed.budget)
    return {name: chosen[names[0]] for names in selection.units.values() for name in names}


def _as_stored(spec: QuantizeSpec, weight: Tensor, bits: int) -> Tensor:
    """What the file will say of a weight."""
    return weight.half().float() if bits == 16 else round_to(weight, bits, spec.group(bits)).weight


def stored_bytes(spec: QuantizeSpec, weight: Tensor, bits: int) -> int:
    """Bytes of what the file will hold of a weight, its header apart."""
    stored = weight_only.tensors_of(weight if bits == 16 else round_to(weight, bits, spec.group(bits)))
    return sum(tensor.nbytes for tensor in stored.values())


def fixed_bytes(network: nn.Module, selection: Selection, tensors: int = 3) -> int:
    """Bytes of the file beside the selected weights: the other tensors, and as much header as any bits may need.

    Args:
        network: a float model.
        selection: what is packed.
        tensors: how many may stand for a weight: codes, their scale and that of the inputs.
    """
    names: dict[Any, list[str]] = {}
    found: dict[Any, Tensor] = {}
    for name, tensor in network.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape) if tensor.numel() else name
        names.setdefault(place, []).append(name)
        found[place] = tensor
    total = sum(tensor.nbytes for tensor in found.values())
    chosen = {f"{name}.weight" if name else "weight" for name in selection.names}
    header, other = 8 + 7 + len('{"__metadata__":{"format":"pt"},}'), 0
    for place, tensor in found.items():
        longest = max(names[place], key=len)  # of tied tensors one is stored, by one of their names
        entry = f'"{longest}":{{"dtype":"BF16","shape":{list(tensor.shape)},"data_offsets":[{total},{total}]}},'
        packs = bool(chosen.intersection(names[place]))  # weight_int8 and weight_scale are longer than weight
        header += tensors * (len(entry.encode()) + len("_scale")) if packs else len(entry.encode())
        other += 0 if packs else tensor.nbytes
    return header + other


def _int8_rows(weight: Tensor) -> Tensor:
    codes, scale = packed.quantize_rows(weight)
    return codes * scale[:, None]


def _refuse_saturated(shares: Mapping[str, float], what: str, remedy: str) -> None:
    worst = max(shares, key=lambda name: shares[name], default="")
    if worst and shares[worst] > MOST_CLIPPED[what]:
        raise StepError(
            f"{worst} saturates: {shares[worst]:.1%} of its {what} lie outside what its integers reach "
            f"({MOST_CLIPPED[what]:.0%} at most); {remedy}"
        )


def _on_cpu(codes: Rounded) -> Rounded:
    return Rounded(codes.codes.cpu(), codes.scale.cpu(), codes.group, codes.bits, codes.clipped)


def _told(found: Calibrated) -> dict[str, Any]:
    """What a calibration records about itself."""
    told: dict[str, Any] = {}
    if found.kept:
        told["rows_rounded_to_nearest"] = {name: kept for name, (kept, _) in found.kept.items() if kept}
    if found.alphas:
        told["alphas"] = found.alphas
    if found.folded or found.scales:
        told |= {"scales_folded": found.folded, "scales_kept": sorted(found.scales)}
    if found.notes:
        told["not_calibrated"] = found.notes
    return told


def _named(spec: QuantizeSpec, bits: Mapping[str, int] | None = None) -> str:
    by = "" if spec.algorithm == "rtn" else f" by {spec.algorithm}"
    if spec.mixed is None or bits is None:
        return f"{'int8' if spec.stored == 'int8-dynamic' else spec.stored}{by}"
    counts = {width: list(bits.values()).count(width) for width in sensitivity.BITS}
    return ", ".join(f"{width} bits ({count})" for width, count in counts.items() if count) + by


def _also(found: Calibrated) -> str:
    """The layers that GPTQ could not better, for the summary."""
    whole = [name for name, (kept, rows) in found.kept.items() if kept == rows]
    return f"; rounded to the nearest, which GPTQ did not better: {', '.join(whole)}" if whole else ""
