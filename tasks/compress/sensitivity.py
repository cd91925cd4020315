"""What each layer in few bits, and nothing else, does to the outputs of a model; and bits by it within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.compress.bits import choose
from tasks.compress.calibrate import outputs
from tasks.compress.selection import Selection, rows_of
from tasks.context import StepError
from tasks.evaluate.picture import files_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.data.encoded import Encoded

BITS = (4, 8, 16)

EXAMPLES = 32
"""Calibration examples on which the outputs are compared, at most."""

_BATCH = 8


def measure(
    network: nn.Module,
    selection: Selection,
    stored: Callable[[Tensor, int], Tensor],
    data: Encoded,
    progress: Callable[[float, float, str], None],
) -> dict[str, dict[int, float]]:
    """The relative error of the outputs with one layer quantized, for each layer and each number of bits.

    Args:
        network: a float model; it is the same afterwards.
        selection: the layers; those that share their weights count as one, by the name of the first.
        stored: weights [rows, columns] and bits to what the file will say of them.
        data: the examples.
        progress: called with layers done, layers in all, and ``layers``.
    """
    data = data.take(slice(0, EXAMPLES))
    parts = [data.take(slice(at, at + _BATCH)) for at in range(0, len(data), _BATCH)]
    reference = [outputs(network, part) for part in parts]
    scale = sum(float(part.square().sum()) for part in reference)
    found: dict[str, dict[int, float]] = {}
    units = selection.units
    for number, names in enumerate(units.values()):
        weight = rows_of(network, selection, names[0])
        before = weight.clone()
        errors = {}
        for bits in BITS:
            weight.copy_(stored(before, bits))
            changed = (outputs(network, part) for part in parts)
            wrong = sum(float((one - other).square().sum()) for one, other in zip(changed, reference, strict=True))
            if math.isfinite(wrong):  # fp16 does not reach every weight
                errors[bits] = (wrong / max(scale, 1e-30)) ** 0.5
        weight.copy_(before)
        found[names[0]] = errors
        progress(number + 1, len(units), "layers")
    return found


def assign(
    sensitivity: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, Mapping[int, int]],
    fixed: int,
    budget: int,
) -> dict[str, int]:
    """The bits of each layer for which the outputs are disturbed least within a budget, exactly.

    The errors of layers are taken as independent, so that their squares add up.

    Args:
        sensitivity: layer to bits to the relative error of the outputs.
        sizes: layer to bits to bytes; bits that a layer cannot have are missing.
        fixed: bytes of the file beside these layers.
        budget: bytes of the whole file.

    Raises:
        StepError: the budget is smaller than the smallest file.
    """
    names = list(sensitivity)
    options = [[(sizes[name][bits], sensitivity[name][bits] ** 2) for bits in sizes[name]] for name in names]
    chosen = choose(options, budget - fixed)
    if chosen is None:
        least = fixed + sum(min(sizes[name].values()) for name in names)
        raise StepError(
            f"mixed: a budget of {budget} bytes is not to be had: with 4 bits everywhere the file takes {least} bytes, "
            f"{fixed} of them for what stays as it is; write budget: {-(-least // 1024)} KiB or more, or prune first"
        )
    return {name: list(sizes[name])[option] for name, option in zip(names, chosen, strict=True)}


def draw(sensitivity: Mapping[str, Mapping[int, float]], bits: Mapping[str, int]) -> dict[str, bytes]:
    """``sensitivity.svg`` and ``.png``: a line of points for each layer, the chosen bits filled."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(sensitivity)
    colours = {4: "#c2452d", 8: "#3b6fd4", 16: "#0f8f6f"}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sensitivity", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(7.2, 1.2 + 0.2 * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots()
        for width in BITS:
            values = [max(sensitivity[name].get(width, float("nan")), 1e-8) for name in names]
            filled = [colours[width] if bits.get(name) == width else "none" for name in names]
            axes.scatter(
                values, range(len(names)), s=26, color=filled, edgecolors=colours[width], label=f"{width} bits"
            )
        axes.set(xscale="log", xlabel="relative error of the outputs, this layer alone quantized")
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(alpha=0.25, linewidth=0.6)
        for handle in axes.legend(loc="lower right", fontsize=8).legend_handles:
            handle.set_facecolor(handle.get_edgecolor())
        return files_of(figure, "sensitivity")


def table(sensitivity: Mapping[str, Mapping[int, float]], bits: Mapping[str, int]) -> Sequence[dict[str, Any]]:
    """The same as data, the most sensitive layer first."""
    order = sorted(sensitivity, key=lambda name: -sensitivity[name][4])
    return [
        {"layer": name, "bits": bits.get(name), **{f"error_{width}": sensitivity[name].get(width) for width in BITS}}
        for name in order
    ]
