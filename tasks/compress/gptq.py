"""GPTQ: rounding that makes up, in the inputs not rounded yet, for what it did to those before."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tasks.compress.grid import (
    Rounded,
    clipped,
    expand,
    round_to,
    scale_of,
    spread,
    stored_scale,
    to_codes,
)

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128
"""Columns after which the others are caught up with; within them one column at a time."""

_TRIES = 6


def gptq(
    weight: Tensor, hessian: Tensor, bits: int, group: int | None, damping: float = 0.01, act_order: bool = False
) -> tuple[Rounded, int]:
    """Round a weight matrix so that its outputs change little (Frantar et al., 2210.17323).

    Columns are rounded one after the other; what is lost in one is made up for in those that follow, by the inverse of
    the inputs' second moments. The scale of a group is taken from its weights as they are when the group is reached,
    with ``act_order`` from the weights as they came. Beyond the paper: what is 0 stays 0, so that a pruned model keeps
    its zeros and its pattern (the joint compression of SparseGPT, 2301.00774), and each row keeps the rounding to the
    nearest where that disturbs its outputs less, so that no row is ever worse off.

    Args:
        weight: float [rows, columns].
        hessian: the mean of x xᵀ over the inputs x, float [columns, columns].
        bits: 4 or 8.
        group: inputs of a row that share a scale; None for the whole row.
        damping: share of the mean of the diagonal that is added to it.
        act_order: whether columns are rounded from the largest second moment to the smallest.

    Returns:
        The codes, and how many rows kept the rounding to the nearest.
    """
    import torch

    weight = weight.detach().float()
    nearest = round_to(weight, bits, group)
    columns = weight.shape[1]
    size = nearest.group
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = _inverse_factor(hessian[order][:, order], damping).to(weight.dtype)
    given = spread(nearest.scale, size, columns)[:, order] if act_order else None
    left = weight[:, order].clone()
    pruned = left == 0
    codes = torch.zeros_like(left)
    wanted = torch.zeros_like(left)
    scales = []
    scale = left[:, 0]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.zeros_like(left[:, start:end])
        for at in range(start, end):
            if given is not None:
                scale = given[:, at]
            elif at % size == 0:
                ahead = left[:, at : at + size].clone()
                # The block's later columns are up to date, those behind it are not yet.
                if at + size > end > at:
                    ahead[:, end - at :] -= errors[:, : at - start] @ upper[start:at, end : at + size]
                scale = scale_of(ahead.masked_fill(pruned[:, at : at + size], 0), bits)
                scales.append(scale)
            column = left[:, at].clone()
            wanted[:, at] = column.masked_fill(pruned[:, at], 0)
            codes[:, at] = to_codes(wanted[:, at], scale, bits)
            error = (column - codes[:, at] * scale) / upper[at, at]
            left[:, at:end] -= error[:, None] * upper[at, at:end]
            errors[:, at - start] = error
        left[:, end:] -= errors @ upper[start:end, end:]
    back = torch.argsort(order)
    scale = nearest.scale.float() if given is not None else torch.stack(scales, dim=1)
    return _better_rows(weight, hessian, nearest, codes[:, back], wanted[:, back], scale)


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """The mean square of what a change of the weights does to each output, float [rows].

    Args:
        difference: new minus old weights, [rows, columns].
        hessian: the mean of x xᵀ, [columns, columns].
    """
    difference = difference.to(hessian.dtype)
    return ((difference @ hessian) * difference).sum(dim=1)


def _better_rows(
    weight: Tensor, hessian: Tensor, nearest: Rounded, codes: Tensor, wanted: Tensor, scale: Tensor
) -> tuple[Rounded, int]:
    import torch

    size, bits = nearest.group, nearest.bits
    codes = codes.to(torch.int8)
    ours = output_error(expand(codes, scale, size) - weight, hessian)
    theirs = output_error(nearest.weight - weight, hessian)
    kept = ~(ours < theirs)
    codes = torch.where(kept[:, None], nearest.codes, codes)
    scale = torch.where(kept[:, None], nearest.scale.float(), scale)
    wanted = torch.where(kept[:, None], weight, wanted)
    share = clipped(wanted, spread(scale, size, weight.shape[1]), bits)
    return replace(nearest, codes=codes, scale=stored_scale(scale), clipped=share), int(kept.sum())


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse, float64; damped more where it does not exist, as with few inputs."""
    import torch

    hessian = hessian.double().clone()
    dead = hessian.diagonal() <= 0
    hessian.diagonal()[dead] = 1.0
    mean = hessian.diagonal().mean()
    for _ in range(_TRIES):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, wrong = torch.linalg.cholesky_ex(damped)
        if not wrong:
            upper, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not wrong:
                return upper
        damping *= 10
    return torch.diag(torch.ones_like(mean).expand(len(hessian)))  # rounds to the nearest
