"""SparseGPT: what is pruned is made up for by the weights that are not decided on yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.compress.masks import pattern_mask, score_masks
from tasks.context import StepError

if TYPE_CHECKING:
    from torch import Tensor


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    block: int | None = None,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Prune a matrix so that ``‖(W' - W) X‖²`` stays small, and update the weights that are kept.

    Frantar & Alistarh, 2301.00774, algorithm 1. Columns are decided on from left to right; with ``F`` the inverse of
    the Hessian of the columns from j on, setting ``w_ij`` to 0 costs ``w_ij² / F_jj`` and is made up for by
    ``w_i -= w_ij / F_jj · F_j`` on the columns behind j. All the inverses come from one Cholesky factor of ``H⁻¹``. The
    mask of a block of columns is chosen when its turn comes, from the weights as updated so far.

    Departures: exactly ``round(sparsity · n)`` weights of the blocks up to each one are 0; the weights of inputs that
    were always 0 are the first to go, smaller ones first, where the original drops all of them; the factor is computed
    in float64.

    Args:
        weight: [out, in].
        hessian: ``X Xᵀ`` over the calibration data in any scale, [in, in].
        sparsity: share of the weights that becomes 0; or
        pattern: (N, M): N of every M neighbours in a row are kept.
        block: columns whose mask is chosen together without a pattern, and whose updates reach the columns behind them
            together; rounded up to a multiple of M with one. None for an eighth of the columns, 16 to the paper's 128:
            where there are few columns, a mask that follows the updates errs less.
        damping: share of the mean of the Hessian's diagonal that is added to it.

    Returns:
        The new weights, float32 [out, in], and what is kept of them, bool [out, in].

    Raises:
        StepError: the Hessian is not positive definite.
    """
    import torch

    columns = weight.shape[1]
    work = weight.detach().float().clone()
    born = work != 0
    kept = torch.ones_like(born)
    factor, dead = _factor(hessian, damping)

    def scored(start: int, end: int) -> Tensor:
        cost = (work[:, start:end] / factor.diagonal()[start:end]).square()
        # What costs nothing is below 0, and the smallest weights are lowest.
        cost = torch.where(dead[start:end], -1 / (1 + work[:, start:end].abs()), cost)
        return cost.masked_fill(~born[:, start:end], float("-inf"))

    block = block or min(128, max(16, columns // 8))
    if pattern is not None:
        block = -(-block // pattern[1]) * pattern[1]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part = work[:, start:end]
        if pattern is None:
            done, wanted = (round((sparsity or 0.0) * len(work) * at) for at in (start, end))
            kept[:, start:end] = score_masks({"": scored(start, end)}, (wanted - done) / part.numel(), "layer")[""]
            kept &= born
        errors = torch.zeros_like(part)
        for at in range(start, end):
            if pattern is not None and at % pattern[1] == 0:
                group = slice(at, at + pattern[1])
                kept[:, group] = pattern_mask(scored(at, at + pattern[1]), work[:, group], *pattern) & born[:, group]
            column = work[:, at]
            error = column.masked_fill(kept[:, at], 0) / factor[at, at]
            work[:, at:end] -= error[:, None] * factor[at, at:end]
            column.masked_fill_(~kept[:, at], 0)  # what the subtraction rounded
            errors[:, at - start] = error
        work[:, end:] -= errors @ factor[start:end, end:]
    return work, kept


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the damped inverse, float32 [in, in], and which inputs were always 0, bool [in]."""
    import torch

    damped = hessian.double()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    alive = diagonal[~dead]
    damped = damped + torch.diag(torch.where(dead, 1.0, damping * (alive.mean() if len(alive) else 1.0)))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise StepError(
            f"the Hessian of a layer is not positive definite with damping {damping:g}; raise damping, for example to "
            f"{10 * damping:g}, or calibration_examples"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float(), dead
