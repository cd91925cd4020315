"""Which weights pruning keeps: plain functions from scores to masks. True is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def threshold_masks(weights: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """True where the magnitude is at least ``threshold``; weights that are 0 already are never kept."""
    return {name: weight.abs() >= threshold for name, weight in weights.items()}


def magnitude_masks(
    weights: Mapping[str, Tensor], sparsity: float, scope: Literal["layer", "global"]
) -> dict[str, Tensor]:
    """True for all but the smallest weights by magnitude (Han et al., 1506.02626).

    Exactly ``round(sparsity * n)`` of the ``n`` weights are not kept, of each tensor or of all together; weights that
    are 0 already count among them, and are not kept where there are more. Of equal magnitudes the first go first, in
    the order of ``weights``.

    Args:
        weights: name to tensor, of any shapes.
        sparsity: share of the weights that is not kept, 0 to 1.
        scope: whether the share holds in every tensor or over all of them.
    """
    masks = score_masks({name: weight.abs() for name, weight in weights.items()}, sparsity, scope)
    return {name: mask & (weights[name] != 0) for name, mask in masks.items()}


def score_masks(scores: Mapping[str, Tensor], sparsity: float, scope: Literal["layer", "global"]) -> dict[str, Tensor]:
    """True for all but exactly ``round(sparsity * n)`` lowest of ``n`` scores, of each tensor or of all together; of
    equal scores the first go first."""
    import torch

    if scope == "layer":
        return {name: _all_but_lowest(score.flatten(), sparsity).view(score.shape) for name, score in scores.items()}
    if not scores:
        return {}
    flat = torch.cat([score.flatten() for score in scores.values()])
    parts = _all_but_lowest(flat, sparsity).split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def _all_but_lowest(score: Tensor, sparsity: float) -> Tensor:
    """A mask [n] over scores [n]. Selection instead of sorting: linear in n, and no index for every score."""
    import torch

    count = round(sparsity * score.numel())
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    limit = torch.kthvalue(score, count).values
    keep = score >= limit
    ties = torch.nonzero(score == limit).flatten()
    keep[ties[: count - int((score < limit).sum())]] = False
    return keep


def row_mask(score: Tensor, weight: Tensor, zeros: int) -> Tensor:
    """True for all but the ``zeros`` lowest scores of each row; of equal scores the smaller weight goes first.

    Args:
        score: [rows, columns].
        weight: [rows, columns]; what is 0 already is never kept.
        zeros: of each row.
    """
    import torch

    by_weight = weight.abs().argsort(dim=1, stable=True)
    by_score = score.gather(1, by_weight).argsort(dim=1, stable=True)
    lowest = by_weight.gather(1, by_score)[:, :zeros]
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, lowest, False) & (weight != 0)


def pattern_mask(score: Tensor, weight: Tensor, kept: int, of: int) -> Tensor:
    """True for the ``kept`` highest scores of every ``of`` neighbours in a row (N:M; Zhou et al., 2102.04010).

    Args:
        score: [rows, columns].
        weight: [rows, columns]; what is 0 already is never kept.
        kept: N.
        of: M; the columns are a multiple of it.
    """
    groups = row_mask(score.reshape(-1, of), weight.reshape(-1, of), of - kept)
    return groups.reshape(weight.shape)


def wanda_score(weight: Tensor, squares: Tensor) -> Tensor:
    """``|W_ij| · ‖x_j‖₂`` (Sun et al., 2306.11695), to be compared within a row.

    Args:
        weight: [out, in].
        squares: sum of the squares of each input over the calibration data, [in].
    """
    return weight.abs() * squares.sqrt()


def quantiles(weights: Mapping[str, Tensor]) -> dict[float, float]:
    """Magnitudes below which the shares ``QUANTILES`` of all the weights lie."""
    import torch

    flat = torch.cat([weight.abs().flatten() for weight in weights.values()])
    at = {share: max(1, round(share * flat.numel())) for share in QUANTILES}
    return {share: float(torch.kthvalue(flat, count).values) for share, count in at.items()}
