"""How a table of tokens is cut into bands, and what that takes in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.adaptive_input.rounding import BITS, FLOAT, bytes_of
from tasks.models.transforms import whole

if TYPE_CHECKING:
    from torch import Tensor

MOST_BANDS = 16
"""Bands that a table can have: the index gives a token four bits."""

_HEADER = 160
"""Bytes that the head of the file gives to a tensor, at most."""


@dataclass(frozen=True)
class Band:
    """Tokens of one precision.

    Args:
        count: how many.
        levels: bits and the number of columns of a token's row that have them, by falling bits: the directions in
            which the tokens differ most have more. One level of 16 bits are float16, and of ``FLOAT`` what is trained.
        projected: whether a projection makes vectors of the rows; without one the rows are the vectors, all columns
            have the same bits, and each row has a scale.
    """

    count: int
    levels: tuple[tuple[int, int], ...]
    projected: bool = True

    @property
    def rank(self) -> int:
        """Numbers of a token's row."""
        return sum(columns for _, columns in self.levels)

    @property
    def most(self) -> int:
        """The bits of its finest column."""
        return self.levels[0][0]

    @property
    def bits(self) -> int | list[int]:
        """Of each row where there is no projection, and else of each column, [rank]."""
        return [bits for bits, columns in self.levels for _ in range(columns)] if self.projected else self.most

    @property
    def projection_bits(self) -> list[int]:
        """Of each row of the projection, [rank]."""
        return [bits for bits, columns in self.projection_levels for _ in range(columns)]

    @property
    def projection_levels(self) -> list[tuple[int, int]]:
        """Bits of the rows of its projection, and how many have them."""
        return [(projection_bits(bits), columns) for bits, columns in self.levels]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"count": self.count, "levels": [list(level) for level in self.levels], "projected": self.projected}

    def told(self) -> str:
        """In a few words."""
        bits = [bits for bits, _ in self.levels]
        span = f"{bits[-1]} to {bits[0]} bits" if len(bits) > 1 else f"{bits[0]} bit{'s' if bits[0] > 1 else ''}"
        return f"{self.count} tokens of rank {self.rank} in {span}"


@dataclass(frozen=True)
class Layout:
    """A table [rows, width] in bands, the most frequent tokens first."""

    rows: int
    width: int
    bands: tuple[Band, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each band begins when all of them lie one behind the other."""
        return tuple(sum(band.count for band in self.bands[:at]) for at in range(len(self.bands)))

    @property
    def bytes(self) -> int:
        """What the file holds of the table, its index and the names of its tensors included."""
        return index_bytes(self.rows) + sum(band_bytes(band, self.width) for band in self.bands)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"rows": self.rows, "width": self.width, "bands": [band.record() for band in self.bands]}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Layout:
        """The layout of a ``record``.

        Raises:
            ValueError: no table is like that.
        """
        bands = tuple(_band(number, band) for number, band in enumerate(record["bands"]))
        found = cls(whole(record["rows"], "the number of rows"), whole(record["width"], "the width"), bands)
        found._check()
        return found

    def _check(self) -> None:
        if not 1 <= len(self.bands) <= MOST_BANDS:
            raise ValueError(f"a table has 1 to {MOST_BANDS} bands and not {len(self.bands)}")
        for number, band in enumerate(self.bands):
            each = [bits for bits, _ in band.levels]
            if not each:
                raise ValueError(f"band {number} has no columns")
            if not set(each) <= {FLOAT, *BITS} or each != sorted(set(each), reverse=True):
                raise ValueError(f"band {number} has the bits {each}")
            alone = len(each) == 1 and (band.projected or band.rank == self.width)
            if band.rank > self.width or not (alone or (band.projected and band.most < 16)):
                raise ValueError(f"band {number} has {band.rank} columns of {each} bits, the table {self.width}")
        if sum(band.count for band in self.bands) != self.rows:
            raise ValueError(f"the bands have {sum(band.count for band in self.bands)} tokens, the table {self.rows}")


def _band(number: int, record: Mapping[str, Any]) -> Band:
    """The band of a ``record``, as far as it is one."""
    if not isinstance(record["projected"], bool):
        raise ValueError(f"projected of band {number} is {record['projected']!r} and neither true nor false")
    levels = tuple(
        (whole(bits, f"the bits of band {number}"), whole(columns, f"the number of columns of band {number}"))
        for bits, columns in record["levels"]
    )
    return Band(whole(record["count"], f"the number of tokens of band {number}"), levels, record["projected"])


def index_bytes(rows: int) -> int:
    """Bytes of the index, four bits a token."""
    return (rows + 1) // 2 + _HEADER


def projection_bits(bits: int) -> int:
    """Bits of the direction behind a column of ``bits``: as many as make its error a small share of the column's."""
    return bits if bits >= 16 else {1: 4, 2: 5, 3: 6}.get(bits, 8)


def band_bytes(band: Band, width: int) -> int:
    """Bytes of a band: its rows, their scales, the projection, and the mean where there is one."""
    mean = 0 if band.most == FLOAT else 2 * width + _HEADER
    if not band.projected:
        return mean + bytes_of(band.count, width, band.most) + (1 + (band.most < 16)) * _HEADER
    if band.most >= 16:
        return mean + sum(bytes_of(n, band.rank, band.most) for n in (band.count, width)) + 2 * _HEADER
    rows = sum(columns * -(-band.count * bits // 8) for bits, columns in band.levels)
    projection = sum(columns * -(-width * bits // 8) for bits, columns in band.projection_levels)
    return mean + rows + projection + 2 * band.rank + 3 * _HEADER


def least_bytes(rows: int, width: int, bits: Sequence[int], bands: int = 1) -> int:
    """Bytes of the smallest table of ``rows`` tokens in so many bands: the least rank, the fewest bits."""
    counts = [rows // bands] * (bands - 1)
    counts.append(rows - sum(counts))
    return index_bytes(rows) + min(
        sum(band_bytes(least_band(count, width, each), width) for count in counts) for each in bits
    )


def least_band(count: int, width: int, bits: int) -> Band:
    """The smallest band of ``bits``."""
    rank = least_rank(width)
    return Band(count, ((bits, rank),), projected=bits < 16 or rank < width)


def softmax_bytes(bands: int, width: int) -> int:
    """Bytes of what an adaptive softmax over at most ``bands`` bands has beside the table."""
    return 4 * (bands - 1) * width + _HEADER


def least_rank(width: int) -> int:
    """The smallest rank that a band of a table of ``width`` may have."""
    return min(8, width)


def positions(band_of: Tensor, layout: Layout) -> Tensor:
    """Where the row of each token is when the bands lie one behind the other, int32 [rows].

    Within a band the rows are in the order of the ids, so that the band of each token is all that has to be stored.
    """
    import torch

    found = torch.empty(layout.rows, dtype=torch.int32, device=band_of.device)
    for number, (band, start) in enumerate(zip(layout.bands, layout.starts, strict=True)):
        found[band_of == number] = torch.arange(start, start + band.count, dtype=torch.int32, device=band_of.device)
    return found


def pack_index(band_of: Tensor) -> Tensor:
    """The band of each token, two to a byte: uint8 [(rows + 1) // 2]; the first has the low half."""
    import torch
    from torch.nn.functional import pad

    pairs = pad(band_of.to(torch.uint8), (0, len(band_of) % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack_index(index: Tensor, rows: int) -> Tensor:
    """The bands of ``pack_index``, uint8 [rows]."""
    import torch

    return torch.stack([index & 15, index >> 4], 1).flatten()[:rows]
