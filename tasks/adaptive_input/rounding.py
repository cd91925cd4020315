"""Rows in codes of 1 to 8 bits with one scale each, packed without a gap, or as float16.

The rows of a matrix may differ in their bits: where ``bits`` is said to be of each row, it is one number for all of
them or as many as there are rows.

A code ``c`` of ``b`` bits stands for ``(c - (2**b - 1) / 2) * scale``: the levels lie symmetrically around 0, so that
one bit is a sign. A row of zeros has the scale 0 and stays zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

FLOAT = 32
"""The bits of what is still to be trained: float32, rounded to nothing."""

BITS = (16, 8, 6, 5, 4, 3, 2, 1)
"""The widths that a row may have; 16 is float16, without a scale."""

_GAUSSIAN = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335, 5: 0.188, 6: 0.104, 8: 0.0308}
"""The step between levels that loses least of a normal variable of variance 1 (Max, 1960)."""

_TRIED = (0.7, 0.85, 1.0, 1.15, 1.35)
"""Steps that are tried for a row, as shares of the one for a normal variable."""


def bytes_of(rows: int, columns: int, bits: int) -> int:
    """Bytes that ``rows`` rows take, their scales included."""
    return rows * columns * bits // 8 if bits >= 16 else rows * (-(-columns * bits // 8) + 2)


def scales_of(rows: Tensor, bits: int | Sequence[int]) -> Tensor:
    """The scale of each row of ``rows`` [N, R], of ``bits`` each, that loses least of those tried, float16 [N]."""
    import torch

    rows, top = rows.float(), _top(rows, bits)
    each = [bits] * len(rows) if isinstance(bits, int) else bits
    spread = rows.square().mean(1).sqrt() * torch.tensor([_GAUSSIAN[one] for one in each], device=rows.device)
    best = rows.abs().amax(1) / (top[:, 0] / 2)
    least = _error(rows, best, top)
    for share in _TRIED:
        scale = spread * share
        error = _error(rows, scale, top)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best.clamp(max=65504.0).half()


def to_codes(rows: Tensor, scale: Tensor, bits: int | Sequence[int]) -> Tensor:
    """The nearest codes, uint8 [N, R], of ``rows`` [N, R] at ``scale`` [N], of ``bits`` each."""
    import torch

    return _placed(rows.float(), scale.float(), _top(rows, bits)).to(torch.uint8)


def values(codes: Tensor, scale: Tensor, bits: int | Sequence[int]) -> Tensor:
    """What ``codes`` [N, R] of ``bits`` each stand for, float32."""
    return (codes.float() - _top(codes, bits) / 2) * scale.float()[:, None]


def rounded(rows: Tensor, bits: int | Sequence[int]) -> Tensor:
    """``rows`` [N, R] as they will be read back, float32."""
    if isinstance(bits, int) and bits >= 16:
        return rows.half().float() if bits == 16 else rows
    scale = scales_of(rows, bits)
    return values(to_codes(rows, scale, bits), scale, bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below ``2**bits`` [N, R], bit by bit: uint8 [N, ceil(R * bits / 8)]. The lowest bit of a code comes first,
    and the lowest bit of a byte."""
    import torch
    from torch.nn.functional import pad

    if bits == 8:
        return codes
    one = torch.arange(8, dtype=torch.uint8, device=codes.device)
    stream = ((codes[..., None] >> one[:bits]) & 1).flatten(1)
    stream = pad(stream, (0, -stream.shape[1] % 8)).view(len(codes), -1, 8)
    return (stream << one).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, columns: int, bits: int) -> Tensor:
    """The codes of ``pack``, uint8 [N, columns]."""
    import torch

    if bits == 8:
        return packed
    one = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed[..., None] >> one) & 1).flatten(1)[:, : columns * bits].view(len(packed), columns, bits)
    return (stream << one[:bits]).sum(-1, dtype=torch.uint8)


def pack_levels(codes: Tensor, levels: Sequence[tuple[int, int]]) -> Tensor:
    """Codes [N, R] whose rows differ in their bits, one packed row behind the other: uint8, one dimension.

    Args:
        codes: uint8.
        levels: bits and the number of rows that have them, in the order of the rows.
    """
    import torch

    sizes = [size for _, size in levels]
    parts = [pack(part, bits).flatten() for (bits, _), part in zip(levels, codes.split(sizes), strict=True)]
    return torch.cat(parts)


def unpack_levels(packed: Tensor, columns: int, levels: Sequence[tuple[int, int]]) -> Tensor:
    """The codes of ``pack_levels``, uint8 [N, columns]."""
    import torch

    found = []
    for (bits, size), part in zip(levels, packed.split([n * -(-columns * b // 8) for b, n in levels]), strict=True):
        found.append(unpack(part.view(size, -1), columns, bits))
    return torch.cat(found)


def through(rows: Tensor, scale: Tensor, bits: int | Sequence[int]) -> Tensor:
    """``rows`` as the codes at ``scale`` will say them, for training: backwards the rounding counts as the identity
    within the levels' reach, and the scale learns by it (Esser et al., 1902.08153)."""
    top = _top(rows, bits)
    inside = (rows / scale[:, None].clamp_min(1e-12) + top / 2).clamp_min(0).minimum(top)
    return (inside + (inside.round() - inside).detach() - top / 2) * scale[:, None]


def _top(rows: Tensor, bits: int | Sequence[int]) -> Tensor:
    """The largest code of each row, float32 [N, 1]."""
    import torch

    each = torch.tensor([bits] * len(rows) if isinstance(bits, int) else list(bits), device=rows.device)
    return (2.0**each - 1)[:, None]


def _placed(rows: Tensor, scale: Tensor, top: Tensor) -> Tensor:
    return (rows / scale[:, None].clamp_min(1e-12) + top / 2).round().clamp_min(0).minimum(top)


def _error(rows: Tensor, scale: Tensor, top: Tensor) -> Tensor:
    scale = scale.clamp(max=65504.0).half().float()
    return ((_placed(rows, scale, top) - top / 2) * scale[:, None] - rows).square().sum(1)
