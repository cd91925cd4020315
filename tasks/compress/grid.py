"""Rounding of weights to few bits with one scale a group of inputs, and two of them to a byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

HIGHEST = {4: 7, 8: 127}
"""The largest code by bits; the smallest is -8 with 4 bits and -127 with 8."""

LOWEST = {4: -8, 8: -127}

_HALF = (2.0**-17, 65504.0)
"""Magnitudes that fp16 holds to 7 bits or more."""


@dataclass(frozen=True)
class Rounded:
    """A weight matrix in codes.

    Args:
        codes: int8 [rows, columns].
        scale: float16, or float32 where a scale is beyond fp16's range, [rows, groups].
        group: inputs of a row that share a scale; the last group may have fewer.
        bits: 4 or 8.
        clipped: share of the weights that lie more than one step outside what the codes reach.
    """

    codes: Tensor
    scale: Tensor
    group: int
    bits: int
    clipped: float = 0.0

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, float32 [rows, columns]."""
        return expand(self.codes, self.scale, self.group)


def round_to(weight: Tensor, bits: int, group: int | None) -> Rounded:
    """Round to the nearest code.

    With 8 bits the largest magnitude of a group is the code 127 or -127. With 4 it is -8, whichever its sign, for which
    the scale may be negative: all 16 codes are used, and 0 stays 0 (the layout Q4_0 of llama.cpp).

    Args:
        weight: float [rows, columns].
        bits: 4 or 8.
        group: inputs of a row that share a scale; None for the whole row.
    """
    import torch

    weight = weight.detach().float()
    columns = weight.shape[1]
    size = min(group or columns, columns)
    scale = torch.cat([scale_of(part, bits)[:, None] for part in weight.split(size, dim=1)], dim=1)
    wide = spread(scale, size, columns)
    return Rounded(to_codes(weight, wide, bits), stored_scale(scale), size, bits, clipped(weight, wide, bits))


def scale_of(weight: Tensor, bits: int) -> Tensor:
    """The scale of each row of one group, float32 [rows] as it will be stored; 1 for a row of zeros.

    Args:
        weight: float32 [rows, columns].
        bits: 4 or 8.
    """
    import torch

    magnitude, at = weight.abs().max(dim=1)
    scale = weight.gather(1, at[:, None])[:, 0] / LOWEST[4] if bits == 4 else magnitude / HIGHEST[8]
    fits = (scale.abs() >= _HALF[0]) & (scale.abs() <= _HALF[1])
    return torch.where(fits, scale.half().float(), torch.where(scale == 0, torch.ones_like(scale), scale))


def to_codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest codes, int8, of ``weight`` at a ``scale`` that is as large or broadcasts."""
    import torch

    return torch.round(weight / scale).clamp(LOWEST[bits], HIGHEST[bits]).to(torch.int8)


def clipped(weight: Tensor, scale: Tensor, bits: int) -> float:
    """Share of the weights that lie more than one step outside what the codes reach."""
    codes = weight / scale
    outside = (codes < LOWEST[bits] - 1) | (codes > HIGHEST[bits] + 1)
    return outside.float().mean().item() if outside.numel() else 0.0


def stored_scale(scale: Tensor) -> Tensor:
    """As float16 where that loses nothing, which it never does for scales of ``scale_of`` in fp16's range."""
    half = scale.half()
    return half if bool((half.float() == scale).all()) else scale.float()


def spread(scale: Tensor, group: int, columns: int) -> Tensor:
    """A scale for every weight, float32 [rows, columns]."""
    if scale.shape[1] == 1:
        return scale.float().expand(-1, columns)
    return scale.float().repeat_interleave(group, dim=1)[:, :columns]


def expand(codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """The weights that ``codes`` [rows, columns] stand for, float32."""
    return codes.float() * spread(scale, group, codes.shape[1])


def pack_pairs(codes: Tensor) -> Tensor:
    """Codes of 4 bits, two a byte: uint8 [rows, (columns + 1) // 2].

    The low halves of a row's bytes are its first columns, the high halves the others, so that each half unpacks into
    one stretch. Each is the code + 8; the last high half of an odd row is the code 0.
    """
    import torch

    rows, columns = codes.shape
    half = (columns + 1) // 2
    moved = torch.full((rows, 2 * half), -LOWEST[4], dtype=torch.uint8, device=codes.device)
    moved[:, :columns] = (codes - LOWEST[4]).to(torch.uint8)
    return moved[:, :half] | (moved[:, half:] << 4)


def unpack_pairs(packed: Tensor, columns: int) -> Tensor:
    """The codes of ``pack_pairs``, int8 [rows, columns]."""
    import torch

    both = torch.cat([packed & 15, packed >> 4], dim=1)[:, :columns]
    return both.to(torch.int8) + LOWEST[4]
