"""What bands are worth: errors by band, rare tokens among them, the time of a lookup, and the plots."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tasks.adaptive_input.layout import Band, band_bytes
from tasks.evaluate.format import size

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tasks.adaptive_input.bands import Fitted, Measured
    from tasks.adaptive_input.information import Information

_GIVEN_UP = 0.5
"""A token whose error is above it has lost most of what its vector says."""

_MANY = 0.25
"""Share of a band's tokens that have, which is worth a warning."""

_ALIKE = 0.01
"""Share of a vector's energy below which what tells it apart is none: what identical vectors differ by is rounding."""

_LOOKUPS = 60
_BATCH = 32

Surprise = tuple["np.ndarray", "np.ndarray"]


@dataclass(frozen=True)
class BandQuality:
    """One band.

    Args:
        band: its tokens, rank and bits.
        bytes: that it takes.
        text: share of the tokens of the training data that are of it.
        information: bits that one of them tells, on average over the band's occurrences.
        error: the median of its tokens' own errors (``errors``): a few long vectors do not speak for the others.
        lost: tokens whose own error is above a half.
        surprise: bits a token of it is foretold with on training examples, before and after; None without a decoder.
    """

    band: Band
    bytes: int
    text: float
    information: float
    error: float
    lost: int
    surprise: tuple[float, float] | None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"band": self.band.record() | {"rank": self.band.rank}}

    def told(self) -> str:
        """In a few words."""
        return (
            f"{self.band.told()} ({self.text:.0%} of the text, {8 * self.bytes / self.band.count:.0f} bits each, "
            f"median error {self.error:.0%})"
        )


def qualities(
    fitted: Fitted, dense: Tensor, made: Any, told: Information, before: Surprise | None, after: Surprise | None
) -> list[BandQuality]:
    """The bands of a table.

    Args:
        fitted: the bands.
        dense: the table before, float [V, D].
        made: the module that stands for it.
        told: of its tokens.
        before, after: see ``information.surprise``.
    """
    import torch

    with torch.no_grad():
        got = made.expanded()
    found = []
    for number, band in enumerate(fitted.layout.bands):
        tokens = fitted.band_of == number
        own = tokens.numpy()
        wrong = errors(dense[tokens], got[tokens])
        counts = told.counts[own] + 1
        surprise = None
        if before is not None and after is not None and before[1][own].sum():
            surprise = tuple(float(bits[own].sum() / seen[own].sum()) for bits, seen in (before, after))
        found.append(
            BandQuality(
                band,
                band_bytes(band, fitted.layout.width),
                float(told.counts[own].sum() / told.counts.sum()),
                float((told.bits[own] * counts).sum() / counts.sum()),
                float(wrong.quantile(0.5)),
                int((wrong > _GIVEN_UP).sum()),
                surprise,  # type: ignore[arg-type]
            )
        )
    return found


def errors(dense: Tensor, got: Tensor) -> Tensor:
    """How much each token of a band has lost: the squared error of its vector over the energy of what tells it apart,
    which is its difference from what the band has in common. A mean is stored of every band; were its energy counted,
    a band of which nothing else is left would seem to be there.

    Args:
        dense: the vectors before, float [N, D].
        got: those after.

    Returns:
        float64 [N]; 0 for a vector of zeros, which says nothing.
    """
    import torch

    with torch.no_grad():
        dense = dense.float()
        lengths = _squared(dense).sqrt()
        # A vector of many times the typical length must not make up what all have in common.
        most = 2 * lengths.median()
        common = (dense * (most / lengths.clamp_min(1e-30)).clamp_max(1)[:, None].float()).mean(0)
        apart = torch.maximum(_squared(dense - common), _ALIKE * lengths.square())
        return torch.where(lengths > 0, _squared(got - dense) / apart.clamp_min(1e-60), 0.0)


def _squared(vectors: Tensor) -> Tensor:
    """The energy of each row, float64."""
    import torch

    return torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64).square()


def sacrificed(bands: Sequence[BandQuality], remedy: str) -> list[str]:
    """What to say of bands many of whose tokens lost most of their vectors, or whose tokens are foretold far worse.

    Args:
        bands: of a table.
        remedy: what keeps more of the vectors.
    """
    said = []
    for band in bands:
        if band.lost >= _MANY * band.band.count:
            said.append(
                f"{band.lost} of {band.band.count} tokens, of a band with {band.text:.2%} of the text, lost more than "
                f"half of what tells their vectors apart (median {band.error:.0%}); {remedy}"
            )
        if band.surprise is not None and band.surprise[1] > band.surprise[0] + 1:
            said.append(
                f"{band.band.count} tokens, {band.text:.2%} of the text, are foretold with {band.surprise[1]:.1f} bits "
                f"and were with {band.surprise[0]:.1f}"
            )
    return said


def lookup_ratio(dense: Tensor, made: Any, length: int, seed: int) -> float:
    """The time of a lookup of a batch over that in the dense table: medians, both in turns, one thread."""
    import statistics

    import torch
    from torch.nn.functional import embedding

    ids = torch.randint(len(dense), (_BATCH, length), generator=torch.Generator().manual_seed(seed))
    weight = dense.float()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spent: tuple[list[float], list[float]] = ([], [])
    try:
        with torch.inference_mode():
            for turn in range(_LOOKUPS + 5):
                for at, look in enumerate((lambda: embedding(ids, weight), lambda: made.lookup(ids))):
                    started = time.perf_counter()
                    look()
                    if turn >= 5:
                        spent[at].append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(spent[1]) / max(statistics.median(spent[0]), 1e-9)


@dataclass(frozen=True)
class Drawn:
    """A table to draw: its name, its place in ``Measured``, the bands that were chosen, and what they are worth."""

    name: str
    at: int
    fitted: Fitted
    quality: Sequence[BandQuality]


def plots(measured: Measured, drawn: Sequence[Drawn], told: Information) -> dict[str, bytes]:
    """``adaptive_input.svg`` and ``.png``, a row for each table: information and stored bits by rank of the token,
    bytes against text, and the weighted error that the least bytes leave, with the table's own bytes marked."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "adaptive", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(10.8, 3.6 * len(drawn)), layout="constrained")
        FigureCanvasAgg(figure)
        for panels, one in zip(figure.subplots(len(drawn), 3, squeeze=False), drawn, strict=True):
            _draw_tokens(panels[0], panels[1], measured, one, told)
            _draw_error(panels[2], measured.frontier(one.at), one.fitted.layout.bytes)
            panels[0].set_title(one.name, loc="left", fontsize=9)
            for axes in panels:
                axes.grid(alpha=0.25, linewidth=0.6)
        svg, png = io.BytesIO(), io.BytesIO()
        nothing: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", metadata=nothing)
        software: Any = {"Software": None}
        figure.savefig(png, format="png", dpi=130, metadata=software)
    return {"adaptive_input.svg": svg.getvalue(), "adaptive_input.png": png.getvalue()}


def _draw_tokens(left: Any, middle: Any, measured: Measured, one: Drawn, told: Information) -> None:
    """Bits by token, and the share of the bytes that the most frequent part of the text takes."""
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter

    ranks = np.arange(1, one.fitted.layout.rows + 1)
    size_of = np.zeros(len(ranks))
    for number, band in enumerate(one.quality):
        size_of[(one.fitted.band_of[measured.order] == number).numpy()] = band.bytes / band.band.count
    text = np.cumsum(told.counts[told.order]) / told.counts.sum()
    stored = 8 * size_of / one.fitted.layout.width
    left.plot(ranks, told.bits[told.order], color="#3b6fd4", lw=1, label="information, bits")
    left.plot(ranks, stored, color="#c2452d", lw=1.4, label="stored bits a dimension")
    left.set(xscale="log", yscale="log", xlabel="token by weight", ylabel="bits")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(lambda bits, _: f"{bits:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    left.legend(fontsize=7)
    middle.plot(text, np.cumsum(size_of) / size_of.sum(), color="#0f8f6f", lw=1.4)
    middle.plot([0, 1], [0, 1], color="#999999", lw=0.6)
    middle.set(xlabel="share of the text", ylabel="share of the table's bytes")


def _draw_error(axes: Any, frontier: tuple[Sequence[int], Sequence[float]], own: int) -> None:
    """The least weighted error by bytes. No logarithm shows an error of nothing: it is left out, and of a table without
    any the axis is plain."""
    from matplotlib.ticker import NullLocator

    points = [(taken, 100 * cost) for taken, cost in zip(*frontier, strict=True)]
    some = [point for point in points if point[1] > 0]
    axes.plot(*zip(*(some or points), strict=True), color="#3b6fd4", lw=1.4)
    axes.axvline(own, color="#c2452d", lw=1, ls="--", label=f"this table, {size(own)}")
    axes.set(xscale="log", yscale="log" if some else "linear", xlabel="bytes of the table")
    axes.set_ylabel("weighted error, %\n(tokens by weight, directions\nby what the outputs feel of them)", fontsize=8)
    ends = (min(own, points[0][0]), max(own, points[-1][0]))
    ticks = dict.fromkeys(float(f"{ends[0] * (ends[1] / ends[0]) ** (at / 3):.2g}") for at in range(4))
    axes.set_xticks(list(ticks), [size(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(fontsize=7)
