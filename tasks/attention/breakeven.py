"""From which length on a replaced attention is faster than the exact one on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tasks.attention.swap import LAYER, Seen, run
from tasks.evaluate.picture import files_of

if TYPE_CHECKING:
    import torch
    from torch import nn

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_LONGEST = 0.8
"""Seconds of one exact call behind which no longer one is tried."""


@dataclass(frozen=True)
class Timings:
    """Seconds of one call by length, the smaller of two.

    Args:
        exact: of exact attention.
        replaced: of what replaces it.
    """

    exact: Mapping[int, float]
    replaced: Mapping[int, float]

    @property
    def break_even(self) -> int | None:
        """The length from which on the replacement was faster wherever measured; None where it never was."""
        found = None
        for length in sorted(self.exact, reverse=True):
            if self.replaced[length] >= self.exact[length]:
                break
            found = length
        return found


def measure(module: nn.Module, seen: Seen, generator: torch.Generator) -> Timings:
    """Time the replacement in ``module`` against exact attention, in turn, on queries, keys and values drawn from those
    of ``seen``; lengths grow until the replacement is twice as fast or the exact one takes too long."""
    import torch

    layer = getattr(module, LAYER)
    exact: dict[int, float] = {}
    replaced: dict[int, float] = {}
    with torch.no_grad():
        for length in LENGTHS:
            call = _drawn(seen, length, generator)
            exact[length] = replaced[length] = float("inf")
            for _ in range(3):
                exact[length] = min(exact[length], _timed(call.exact))
                replaced[length] = min(replaced[length], _timed(lambda call=call: run(layer, call)))
            if exact[length] > _LONGEST or exact[length] > 2 * replaced[length]:
                break
    return Timings(exact, replaced)


def _timed(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _drawn(seen: Seen, length: int, generator: torch.Generator) -> Seen:
    import torch

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        at = torch.randint(tensor.shape[2], (length,), generator=generator).sort().values
        return tensor[:1, :, at].contiguous()

    return replace(seen, query=rows(seen.query), key=rows(seen.key), value=rows(seen.value), mask=None)


def draw(times: Mapping[str, Mapping[int, float]], marks: Sequence[int] = ()) -> dict[str, bytes]:
    """``attention.svg`` and ``.png``: time against length, a line for each method; ``marks`` are lengths to show."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "attention", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots()
        for name, found in times.items():
            lengths = sorted(found)
            axes.plot(lengths, [1e3 * found[length] for length in lengths], marker="o", markersize=4, label=name)
        for length in marks:
            axes.axvline(length, color="#8d8e8f", linewidth=1, linestyle="--")
            place = {"xytext": (3, 4), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(f"faster from {length} on", (length, 0), xycoords=("data", "axes fraction"), **place)
        axes.set(xscale="log", yscale="log", xlabel="length in tokens", ylabel="milliseconds of one call")
        lengths = sorted({length for found in times.values() for length in found})
        axes.set_xticks(lengths, [str(length) for length in lengths], fontsize=8)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(fontsize=8)
        return files_of(figure, "attention")
