"""Carrying out a quantization: layers and tables replaced by packed ones, and the transform that loading replays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tasks.compress import packed, weight_only
from tasks.compress.grid import Rounded, round_to
from tasks.compress.selection import Selection, rows_of

if TYPE_CHECKING:
    from torch import Tensor, nn


def pack_int8(
    network: nn.Module,
    selection: Selection,
    scales: Mapping[str, Tensor] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Replace what is selected by int8 layers, in place.

    Args:
        network: a float model.
        selection: what to replace.
        scales: layer to what its inputs are divided by first.
        ranges: layer to the range of its inputs, for static int8; one without a range is dynamic.

    Returns:
        The model (another one only where the model itself was the layer), and the transform that ``load`` replays.
    """
    import torch

    scales, static, ranges = scales or {}, ranges is not None, ranges or {}
    rows: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}
    entry: dict[str, Any] = {"name": packed.STATIC if static else packed.NAME, "layers": {}, "embeddings": {}}

    def integers(name: str) -> tuple[Tensor, Tensor]:
        place = selection.place(name)
        if place not in rows:
            rows[place] = packed.quantize_rows(rows_of(network, selection, name).contiguous())
        return rows[place]

    for name in selection.names:
        integers(name)
    for name in selection.embeddings:
        table: Any = network.get_submodule(name)
        weight, scale = integers(name)
        factor = selection.factors[name]
        network = packed.put(network, name, packed.packed_embedding(weight, scale, table.padding_idx, factor))
        entry["embeddings"][name] = {"shape": list(weight.shape), "factor": factor}
    for name in selection.layers:
        weight, scale = integers(name)
        bias, inputs = _bias(network, name), _inverse(scales.get(name))
        limits = torch.tensor(ranges[name]) if name in ranges else None
        network = packed.put(network, name, packed.packed_linear(weight, scale, bias, inputs, limits))
        entry["layers"][name] = {"shape": list(weight.shape), "bias": bias is not None}
        if inputs is not None:
            entry["layers"][name]["input_scale"] = True
        if limits is not None:
            entry["layers"][name]["static"] = True
    _all_there(network, selection)
    return network, entry


def pack_weights(
    network: nn.Module,
    selection: Selection,
    bits: Mapping[str, int],
    groups: Mapping[int, int | None],
    rounded: Mapping[str, Rounded] | None = None,
    scales: Mapping[str, Tensor] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Replace what is selected by layers whose weights alone have few bits, in place.

    Args:
        network: a float model.
        selection: what to replace.
        bits: of each, 4, 8 or 16.
        groups: bits to the inputs of a row that share a scale; None is a whole row.
        rounded: codes that are known already; the others are rounded to the nearest.
        scales: layer to what its inputs are divided by first.

    Returns:
        The model (another one only where the model itself was the layer), and the transform that ``load`` replays.
    """
    rounded, scales = rounded or {}, scales or {}
    weights: dict[tuple[str, bool], Rounded | Tensor] = {}
    stored: dict[tuple[str, bool], dict[str, Tensor]] = {}
    entry: dict[str, Any] = {"name": weight_only.NAME, "layers": {}, "embeddings": {}}
    for place, names in selection.units.items():
        rows, width = rows_of(network, selection, names[0]), bits[names[0]]
        known = next((rounded[name] for name in names if name in rounded), None)
        weights[place] = rows if width == 16 else known or round_to(rows, width, groups[width])
        stored[place] = weight_only.tensors_of(weights[place])
    for name in selection.embeddings:
        table: Any = network.get_submodule(name)
        place, factor = selection.place(name), selection.factors[name]
        what = weight_only.described(weights[place])
        module = weight_only.stored_embedding(stored[place], what["shape"][1], what["group"], table.padding_idx, factor)
        network = packed.put(network, name, module)
        entry["embeddings"][name] = {**what, "factor": factor}
    for name in selection.layers:
        place, bias, inputs = selection.place(name), _bias(network, name), _inverse(scales.get(name))
        what = weight_only.described(weights[place])
        module = weight_only.stored_linear(stored[place], what["shape"][1], what["group"], bias, inputs)
        network = packed.put(network, name, module)
        entry["layers"][name] = {**what, "bias": bias is not None, "input_scale": inputs is not None}
    _all_there(network, selection)
    return network, entry


def _bias(network: nn.Module, name: str) -> Tensor | None:
    layer: Any = network.get_submodule(name)
    return None if layer.bias is None else layer.bias.detach().float()


def _inverse(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else 1 / scale.float().cpu()


def _all_there(network: nn.Module, selection: Selection) -> None:
    count = sum(packed.is_packed(module) or weight_only.is_stored(module) for module in network.modules())
    if count != len(selection.names):
        raise RuntimeError(f"{count} layers were packed of {len(selection.names)} selected")
