"""How a table of tokens is cut into bands, and what that takes in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.adaptive_input.rounding import FLOAT, bytes_of

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
        rank: numbers of a token's row; where it is the table's width there is no projection behind it.
        bits: of each of them; ``FLOAT`` where they are trained.
    """

    count: int
    rank: int
    bits: int


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
        bands = [{"count": band.count, "rank": band.rank, "bits": band.bits} for band in self.bands]
        return {"rows": self.rows, "width": self.width, "bands": bands}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Layout:
        """The layout of a ``record``."""
        bands = tuple(Band(int(band["count"]), int(band["rank"]), int(band["bits"])) for band in record["bands"])
        return cls(int(record["rows"]), int(record["width"]), bands)


def index_bytes(rows: int) -> int:
    """Bytes of the index, four bits a token."""
    return (rows + 1) // 2 + _HEADER


def projection_bits(bits: int) -> int:
    """Bits of the projection behind rows of ``bits``."""
    return bits if bits >= 16 else 8


def band_bytes(band: Band, width: int) -> int:
    """Bytes of a band: rows with their scales, the mean where there is one, and likewise the projection."""
    total, tensors = bytes_of(band.count, band.rank, band.bits), 1 + (band.bits < 16)
    if band.bits != FLOAT:
        total, tensors = total + 2 * width, tensors + 1
    if band.rank < width:
        bits = projection_bits(band.bits)
        total, tensors = total + bytes_of(band.rank, width, bits), tensors + 1 + (bits < 16)
    return total + tensors * _HEADER


def least_bytes(rows: int, width: int, bits: Sequence[int]) -> int:
    """Bytes of the smallest table of ``rows`` tokens: one band, the least rank, the fewest bits."""
    rank = least_rank(width)
    return index_bytes(rows) + min(band_bytes(Band(rows, rank, each), width) for each in bits)


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
