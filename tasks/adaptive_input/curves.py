"""What a band of tokens loses in so many dimensions and bits, measured; and the fit of the band that was chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.adaptive_input.layout import Band, band_bytes, least_rank, projection_bits
from tasks.adaptive_input.rounding import rounded

if TYPE_CHECKING:
    import numpy as np
    from torch import Generator, Tensor

SAMPLED = 256
"""Rows of a run on which the error of rounding is measured; what is lost by the rank is exact."""

_SEGMENTS = 9
_SMALLEST = 16
"""Segments of a table, and tokens in the first one, at least."""

_ROUNDS = 2
"""How often rows and projection are fitted to each other as they will be stored."""


@dataclass(frozen=True)
class Option:
    """A band as it might be: its bytes, and the share of the table's weighted energy that it loses."""

    band: Band
    bytes: int
    cost: float


def segments(weights: np.ndarray, counts: np.ndarray, smallest: int = _SMALLEST, most: int = _SEGMENTS) -> list[int]:
    """Where a band may begin and end, in tokens by falling weight: each segment twice the one before it, from the end,
    and a border where the tokens begin that the data never has.

    Args:
        weights: falling, [V].
        counts: occurrences in the same order, [V].
        smallest: tokens of the first segment, at least.
        most: segments.
    """
    size = len(weights)
    found = {0, size}
    border = size
    while border // 2 >= smallest and len(found) <= most - 1:
        border //= 2
        found.add(border)
    unseen = int((counts > 0).sum())
    if smallest <= unseen <= size - smallest and bool((counts[:unseen] > 0).all()):
        found.add(unseen)
    return sorted(found)


def ranks(width: int, count: int) -> list[int]:
    """The ranks that are tried for ``count`` tokens of ``width``: steps of about a third, multiples of 8."""
    found, rank = [], float(least_rank(width))
    while rank < min(width, count):
        found.append(int(rank) // 8 * 8 or int(rank))
        rank = max(rank * 1.35, found[-1] + 8)
    return [*dict.fromkeys(found), width]


@dataclass(frozen=True)
class Metric:
    """What a difference of vectors counts: ``‖x half‖²``; ``back`` undoes ``half``. Both [D, D]."""

    half: Tensor
    back: Tensor


def metric(width: int, moment: Tensor | None, share: float) -> Metric:
    """The metric in which a head's error is that of its scores.

    Args:
        width: of the vectors.
        moment: the second moment of what comes into the head, [D, D]; None for a table that is looked up alone.
        share: of the error of the scores, beside that of the vectors themselves.
    """
    import torch

    whole = torch.eye(width, dtype=torch.float64)
    if moment is not None:
        scaled = moment.double() * (width / moment.double().trace().clamp_min(1e-30))
        whole = (1 - share) * whole + share * scaled
    values, vectors = torch.linalg.eigh(whole)
    root = values.clamp_min(1e-6).sqrt()
    return Metric((vectors * root @ vectors.T).float(), (vectors / root @ vectors.T).float())


class Curves:
    """The error curves of every run of segments of a table.

    Args:
        table: float32 [V, D], tokens by falling weight.
        weights: what each token's error counts, float64 [V].
        borders: of the segments.
        generator: draws the rotations.
        measure: what a difference counts.
        centred: whether bands have a mean.
    """

    def __init__(
        self,
        table: Tensor,
        weights: Tensor,
        borders: Sequence[int],
        generator: Generator,
        measure: Metric,
        centred: bool = True,
    ) -> None:
        self.table, self.weights, self.borders = table, weights, list(borders)
        self.width = table.shape[1]
        self.measure, self.centred = measure, centred
        self.energy = float((weights * self._squared(table)).sum()) or 1.0
        self._turns: dict[int, Tensor] = {}
        self._generator = generator

    @property
    def segments(self) -> int:
        return len(self.borders) - 1

    def runs(self) -> Iterator[tuple[int, int]]:
        """Every run of segments."""
        return ((i, j) for i in range(self.segments) for j in range(i + 1, self.segments + 1))

    def options(self, run: tuple[int, int], bits: Sequence[int]) -> list[Option]:
        """What a run can be as one band, by rank and bits, those left out that another beats in bytes and error."""
        import torch

        rows, weights, mean = self._part(run)
        rows = rows - mean
        values, vectors = _principal(rows @ self.measure.half, weights)
        at = torch.linspace(0, len(rows) - 1, min(SAMPLED, len(rows))).round().long()
        some, counted = rows[at], weights[at] * (weights.sum() / weights[at].sum())
        found = []
        for rank in ranks(self.width, len(rows)):
            basis = None if rank == self.width else self._basis(vectors, rank)
            lost = 0.0 if basis is None else float(values[rank:].sum())
            placed = some if basis is None else some @ self.measure.half @ vectors[:, :rank] @ self.turn(rank)
            wanted = some if basis is None else placed @ basis
            for each in bits:
                kept = rounded(placed, each)
                if basis is not None:
                    kept = kept @ rounded(basis, projection_bits(each))
                wrong = float((counted * self._squared(kept - wanted)).sum())
                band = Band(len(rows), rank, each)
                found.append(Option(band, band_bytes(band, self.width), max(lost + wrong, 0.0) / self.energy))
        return _best(found)

    def turn(self, rank: int) -> Tensor:
        """A rotation of ``rank`` dimensions: it spreads the few large ones evenly, so that one scale fits a row."""
        import torch

        if rank not in self._turns:
            drawn = torch.randn(rank, rank, generator=self._generator, dtype=torch.float64)
            self._turns[rank] = torch.linalg.qr(drawn).Q.float()
        return self._turns[rank]

    def fit(self, run: tuple[int, int], band: Band) -> tuple[Tensor, Tensor | None, Tensor]:
        """Rows [count, rank], projection [rank, width] and mean [width] of a band, float32 and not yet rounded.

        The projection spans the directions in which the weighted rows are largest (GroupReduce, Chen et al.,
        1806.06950). Rows are then fitted to the projection as it will be stored, and it to them, in turns, and what
        loses least is kept.
        """
        import torch

        rows, weights, mean = self._part(run)
        rows = rows - mean
        if band.rank == self.width:
            return rows, None, mean
        seen = rows @ self.measure.half
        basis = self._basis(_principal(seen, weights)[1], band.rank)
        best: tuple[float, Tensor, Tensor] | None = None
        for _ in range(_ROUNDS):
            stored = rounded(basis, projection_bits(band.bits))
            reached = (stored @ self.measure.half).T.double()
            placed = torch.linalg.lstsq(reached, seen.T.double()).solution.T.float()
            kept = rounded(placed, band.bits)
            lost = float((weights * self._squared(kept @ stored - rows)).sum())
            if best is None or lost < best[0]:
                best = lost, placed, basis
            heavy = kept.double() * weights[:, None]
            square = heavy.T @ kept.double()
            square += torch.eye(band.rank, dtype=torch.float64) * (1e-6 * float(square.trace()) / band.rank + 1e-30)
            basis = torch.linalg.solve(square, heavy.T @ rows.double()).float()
        assert best is not None
        return best[1], best[2], mean

    def _basis(self, vectors: Tensor, rank: int) -> Tensor:
        """The projection [rank, D] onto the first of ``vectors`` [D, D], turned."""
        return self.turn(rank).T @ vectors[:, :rank].T @ self.measure.back

    def _squared(self, difference: Tensor) -> Tensor:
        """What each row of a difference counts, float64 [N]."""
        return (difference @ self.measure.half).double().square().sum(1)

    def _part(self, run: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The rows and weights of a run, and the mean as it will be stored."""
        start, end = self.borders[run[0]], self.borders[run[1]]
        rows, weights = self.table[start:end], self.weights[start:end]
        mean = (weights @ rows.double() / weights.sum() * self.centred).half().float()
        return rows, weights, mean


def _principal(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Energies by falling size [D], and the directions as columns [D, D], of weighted rows."""
    import torch

    heavy = rows.double() * weights[:, None]
    values, vectors = torch.linalg.eigh(heavy.T @ rows.double())
    return values.flip(0).clamp_min(0), vectors.flip(1).float()


def _best(options: list[Option]) -> list[Option]:
    """Those that no other beats in bytes and cost."""
    found: list[Option] = []
    for option in sorted(options, key=lambda one: (one.bytes, one.cost)):
        if math.isfinite(option.cost) and (not found or option.cost < found[-1].cost):
            found.append(option)
    return found
