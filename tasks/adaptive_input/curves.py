"""What a band of tokens loses in so many dimensions and bits, measured; and the fit of the band that was chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from tasks.adaptive_input.layout import Band, band_bytes, least_band, least_rank, projection_bits
from tasks.adaptive_input.rounding import rounded

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SAMPLED = 256
"""Rows of a run on which the error of rounding is measured; what is lost by the rank is exact."""

PLAIN = 0.2
"""What the squared error of the vectors themselves counts in a metric, beside what was seen of the model."""

SMALLEST = 16
"""Tokens of the first segment of a table, at least."""

_SEGMENTS = 9

_ROUNDS = 2
"""How often rows and projection are fitted to each other as they will be stored."""

_ROWS = 32768
"""Rows that are in float64 at a time: a whole large vocabulary would take several times the table."""

_STEP = 1.06
"""By how much the bits of a token grow at least from one profile of bits to the next that is tried."""


@dataclass(frozen=True)
class Option:
    """A band as it might be: its bytes, and the share of the table's weighted energy that it loses."""

    band: Band
    bytes: int
    cost: float


def segments(weights: np.ndarray, counts: np.ndarray, smallest: int = SMALLEST, most: int = _SEGMENTS) -> list[int]:
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
    """The ranks below ``width`` that are tried for ``count`` tokens in float16 or float32: steps of about a third,
    multiples of 8."""
    found, rank = [], float(least_rank(width))
    while rank < min(width, count):
        found.append(int(rank) // 8 * 8 or int(rank))
        rank = max(rank * 1.35, found[-1] + 8)
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Metric:
    """What a difference of vectors counts: ``‖x half‖²``; ``back`` undoes ``half``. Both [D, D]. Times ``scale`` that
    is what it costs the model, by which tables are compared."""

    half: Tensor
    back: Tensor
    scale: float


def metric(width: int, moment: Tensor | None) -> Metric:
    """The metric in which an error counts what it does to the outputs of the model.

    Args:
        width: of the vectors.
        moment: what was seen of the outputs' sensitivity (``sensitivity.moments``), [D, D]; None counts every
            dimension alike.
    """
    import torch

    whole = torch.eye(width, dtype=torch.float64)
    scale = 1.0 if moment is None else float(moment.double().trace()) / width
    if moment is not None and scale > 0:
        whole = PLAIN * whole + (1 - PLAIN) * moment.double() / scale
    values, vectors = torch.linalg.eigh(whole)
    root = values.clamp_min(1e-6).sqrt()
    return Metric((vectors * root @ vectors.T).float(), (vectors / root @ vectors.T).float(), scale)


class Curves:
    """The error curves of every run of segments of a table.

    Args:
        table: float32 [V, D], tokens by falling weight.
        weights: what each token's error counts, float64 [V].
        borders: of the segments.
        measure: what a difference counts.
        centred: whether bands have a mean.
    """

    def __init__(
        self, table: Tensor, weights: Tensor, borders: Sequence[int], measure: Metric, centred: bool = True
    ) -> None:
        self.table, self.weights, self.borders = table, weights, list(borders)
        self.width = table.shape[1]
        self.measure, self.centred = measure, centred
        self.energy = float((weights * self._squared(table)).sum()) or 1.0

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
        for each in bits:
            wrong = float((counted * self._squared(rounded(some, each) - some)).sum())
            found.append((Band(len(rows), ((each, self.width),), projected=False), wrong))
            if each >= 16:
                for rank in ranks(self.width, len(rows)):
                    found.append((Band(len(rows), ((each, rank),)), float(values[rank:].sum())))
        coded = sorted(each for each in bits if each < 16)
        if coded:
            placed = some @ self.measure.half @ vectors
            errors = self._errors(placed, counted, values, vectors, coded)
            found += [(band, _lost(band, errors, coded)) for band in self._profiles(len(rows), errors, coded)]
        return _best([Option(band, band_bytes(band, self.width), max(lost, 0.0) / self.energy) for band, lost in found])

    def _errors(
        self, placed: Tensor, counted: Tensor, values: Tensor, vectors: Tensor, bits: Sequence[int]
    ) -> np.ndarray:
        """What each direction loses without a column and with one of ``bits``, float64 [1 + len(bits), D]: the measured
        share of its energy, and what its rounded projection adds.

        Args:
            placed: sampled rows by direction, [N, D].
            counted: what each counts, [N].
            values: energy of the directions over all rows, [D].
            vectors: the directions, as columns.
            bits: rising.
        """
        import torch

        energy = (counted[:, None] * placed.double().square()).sum(0).clamp_min(1e-30)
        found, basis = [values], self._basis(vectors, self.width)
        for each in bits:
            kept = rounded(placed.T, each).T
            share = (counted[:, None] * (kept - placed).double().square()).sum(0) / energy
            turned = self._squared(rounded(basis, projection_bits(each)) - basis)
            found.append(values * (share + turned))
        return torch.stack(found).numpy()

    def _profiles(self, count: int, errors: np.ndarray, bits: Sequence[int]) -> list[Band]:
        """Bands of ``count`` tokens whose bits lose least by direction for what they take, from few bits to many.

        Each direction's curve of error against bits is made convex; the steps of all of them, those that gain most for
        a bit first, are the best profiles of bits (reverse water-filling, with measured curves).
        """
        sizes = [0, *(8 * count * each + 8 * self.width * projection_bits(each) + 16 for each in bits)]
        steps = [
            (gain, direction, level)
            for direction in range(errors.shape[1])
            for gain, level in _convex(sizes, errors[:, direction])
        ]
        steps.sort(key=lambda step: (-step[0], step[1], step[2]))
        chosen, found = [0] * errors.shape[1], [least_band(count, self.width, bits[0])]
        spent = size = rank = 0
        for _, direction, level in steps:
            size += sizes[level] - sizes[chosen[direction]]
            rank += chosen[direction] == 0
            chosen[direction] = level
            if size < spent * _STEP or rank < least_rank(self.width):
                continue
            spent = size
            ordered = sorted((bits[one - 1] for one in chosen if one), reverse=True)
            found.append(Band(count, tuple((each, len(list(same))) for each, same in groupby(ordered))))
        return found

    def fit(self, run: tuple[int, int], band: Band) -> tuple[Tensor, Tensor | None, Tensor]:
        """Rows [count, rank], projection [rank, width] and mean [width] of a band, float32 and not yet rounded.

        The projection spans the directions in which the weighted rows are largest (GroupReduce, Chen et al.,
        1806.06950). Rows are then fitted to the projection as it will be stored, and it to them, in turns, and what
        loses least is kept.
        """
        import torch

        rows, weights, mean = self._part(run)
        rows = rows - mean
        if not band.projected:
            return rows, None, mean
        seen = rows @ self.measure.half
        basis = self._basis(_principal(seen, weights)[1], band.rank)
        best: tuple[float, Tensor, Tensor] | None = None
        for _ in range(_ROUNDS):
            stored = rounded_projection(basis, band)
            reached = (stored @ self.measure.half).T.double()
            placed = torch.cat(
                [torch.linalg.lstsq(reached, part.T.double()).solution.T.float() for part in seen.split(_ROWS)]
            )
            kept = rounded_rows(placed, band)
            lost = float((weights * self._squared(kept @ stored - rows)).sum())
            if best is None or lost < best[0]:
                best = lost, placed, basis
            square, wanted = _products(kept, kept, weights), _products(kept, rows, weights)
            square += torch.eye(band.rank, dtype=torch.float64) * (1e-6 * float(square.trace()) / band.rank + 1e-30)
            basis = torch.linalg.solve(square, wanted).float()
        assert best is not None
        return best[1], best[2], mean

    def _basis(self, vectors: Tensor, rank: int) -> Tensor:
        """The projection [rank, D] onto the first of ``vectors`` [D, D]."""
        return vectors[:, :rank].T @ self.measure.back

    def _squared(self, difference: Tensor) -> Tensor:
        """What each row of a difference counts, float64 [N]."""
        import torch

        return torch.cat([(part @ self.measure.half).double().square().sum(1) for part in difference.split(_ROWS)])

    def _part(self, run: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The rows and weights of a run, and the mean as it will be stored."""
        start, end = self.borders[run[0]], self.borders[run[1]]
        rows, weights = self.table[start:end], self.weights[start:end]
        parts = zip(weights.split(_ROWS), rows.split(_ROWS), strict=True)
        total = sum((counted @ part.double() for counted, part in parts), weights.new_zeros(self.width))
        mean = (total / weights.sum() * self.centred).half().float()
        return rows, weights, mean


def _principal(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Energies by falling size [D], and the directions as columns [D, D], of weighted rows."""
    import torch

    values, vectors = torch.linalg.eigh(_products(rows, rows, weights))
    return values.flip(0).clamp_min(0), vectors.flip(1).float()


def _products(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """``leftᵀ diag(weights) right`` in float64, of [N, A], [N, B] and [N], [A, B]."""
    import torch

    found = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for one, other, counted in zip(*(given.split(_ROWS) for given in (left, right, weights)), strict=True):
        found += (one.double() * counted[:, None]).T @ other.double()
    return found


def rounded_rows(rows: Tensor, band: Band) -> Tensor:
    """Rows [N, rank] of a band with a projection as they will be read back."""
    return rounded(rows, band.most) if band.most >= 16 else rounded(rows.T, band.bits).T


def rounded_projection(projection: Tensor, band: Band) -> Tensor:
    """A projection [rank, D] as it will be read back."""
    return rounded(projection, band.most if band.most >= 16 else band.projection_bits)


def _convex(sizes: Sequence[int], errors: np.ndarray) -> Iterator[tuple[float, int]]:
    """The corners of the convex curve below ``errors`` by ``sizes``: the gain for each bit up to one, and which."""
    at = 0
    while at < len(sizes) - 1:
        gains = {to: float(errors[at] - errors[to]) / (sizes[to] - sizes[at]) for to in range(at + 1, len(sizes))}
        to = max(gains, key=lambda one: gains[one])
        if gains[to] <= 0:
            return
        yield gains[to], to
        at = to


def _lost(band: Band, errors: np.ndarray, bits: Sequence[int]) -> float:
    """What a band loses whose columns stand for the directions in their order; see ``Curves._errors``."""
    columns = [one for one, size in band.levels for _ in range(size)]
    kept = sum(float(errors[1 + bits.index(one), direction]) for direction, one in enumerate(columns))
    return kept + float(errors[0, band.rank :].sum())


def _best(options: list[Option]) -> list[Option]:
    """Those that no other beats in bytes and cost."""
    found: list[Option] = []
    for option in sorted(options, key=lambda one: (one.bytes, one.cost)):
        if math.isfinite(option.cost) and (not found or option.cost < found[-1].cost):
            found.append(option)
    return found
