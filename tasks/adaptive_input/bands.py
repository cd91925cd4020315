"""From tables of tokens to bands: curves, the allocation within the budget, and the fit of what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tasks.adaptive_input.allocate import Chosen, allocate, frontier
from tasks.adaptive_input.curves import Curves, Metric, Option, segments
from tasks.adaptive_input.layout import Layout, index_bytes
from tasks.adaptive_input.rounding import FLOAT

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.adaptive_input.information import Information

_COARSE = 256
"""Units of bytes in which the curve of the least error is drawn."""

Say = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Fitted:
    """A table in bands, not yet rounded.

    Args:
        layout: its bands.
        band_of: the band of each token, int64 [V].
        rows: of each band, float32 [count, rank], in the order of the ids.
        projections: of each band, float32 [rank, D]; None where there is none.
        means: of each band, float32 [D].
        cost: the share of the weighted energy that the measured curves say is lost.
    """

    layout: Layout
    band_of: Tensor
    rows: list[Tensor]
    projections: list[Any] = field(repr=False)
    means: list[Tensor] = field(repr=False)
    cost: float = 0.0


class Measured:
    """Tables with their curves, from which an allocation for any budget follows.

    Args:
        weights: the tables, float [V, D].
        metrics: what a difference of vectors counts in each.
        information: of their tokens.
        bits: that a band may have.
        most: bands of a table.
        say: is told runs done and in all.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        metrics: Sequence[Metric],
        information: Information,
        bits: Sequence[int],
        most: int,
        say: Say | None = None,
    ) -> None:
        import torch

        self.order = torch.from_numpy(information.order)
        counted = torch.from_numpy(information.weights)[self.order]
        borders = segments(counted.numpy(), information.counts[information.order])
        self.most = most
        self.curves = [
            Curves(weight.float()[self.order], counted, borders, one, FLOAT not in bits)
            for weight, one in zip(weights, metrics, strict=True)
        ]
        self.options: list[dict[tuple[int, int], list[Option]]] = [{} for _ in self.curves]
        jobs = [(at, run) for at, curves in enumerate(self.curves) for run in curves.runs()]
        for done, (at, run) in enumerate(jobs, start=1):
            if most == 1 and run != (0, self.curves[at].segments):
                continue
            self.options[at][run] = self.curves[at].options(run, bits)
            if say is not None:
                say(done, len(jobs), "runs")

    def frontier(self, at: int) -> tuple[list[int], list[float]]:
        """Bytes, and the least cost that the table at ``at`` has with them."""
        sizes, costs = frontier(*self._runs(at), self.most, _COARSE)
        return (sizes + index_bytes(len(self.order))).tolist(), costs.tolist()

    def allocate(
        self, budget: int, tables: Sequence[int] | None = None, several: Sequence[int] = ()
    ) -> list[Fitted] | None:
        """The bands of all tables, or of those at ``tables``, that together cost the model least within ``budget``
        bytes; None where nothing fits. The tables at ``several`` get at least two bands."""
        at = list(range(len(self.curves))) if tables is None else list(tables)
        fewest = [2 if one in several else 1 for one in at]
        index = sum(index_bytes(len(self.order)) for _ in at)
        counted = [self.curves[one].energy * self.curves[one].measure.scale for one in at]
        if min(counted) <= 0:  # nothing was seen of one of them: each by its own energy
            counted = [1.0] * len(at)
        runs = [self._runs(one, each / max(counted)) for one, each in zip(at, counted, strict=True)]
        chosen = allocate(runs, self.most, budget - index, fewest=fewest)
        return None if chosen is None else [self._fit(one, bands) for one, bands in zip(at, chosen, strict=True)]

    def _runs(self, at: int, counted: float = 1.0) -> tuple[int, dict[tuple[int, int], list[tuple[int, float]]]]:
        """The segments of the table at ``at``, and the bytes of their runs with the costs times ``counted``."""
        runs = {run: [(one.bytes, counted * one.cost) for one in found] for run, found in self.options[at].items()}
        return self.curves[at].segments, runs

    def _fit(self, at: int, chosen: Chosen) -> Fitted:
        import torch

        curves, options = self.curves[at], self.options[at]
        bands = [((start, end), options[start, end][number]) for start, end, number in chosen]
        band_of = torch.empty(len(self.order), dtype=torch.int64)
        rows, projections, means = [], [], []
        for number, (run, option) in enumerate(bands):
            ids = self.order[curves.borders[run[0]] : curves.borders[run[1]]]
            band_of[ids] = number
            fitted, projection, mean = curves.fit(run, option.band)
            rows.append(fitted[ids.argsort()].contiguous())
            projections.append(projection)
            means.append(mean)
        layout = Layout(len(self.order), curves.width, tuple(option.band for _, option in bands))
        return Fitted(layout, band_of, rows, projections, means, sum(option.cost for _, option in bands))
