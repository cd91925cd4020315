"""Which weights pruning keeps: plain functions from weights to masks."""

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
    import torch

    if scope == "layer":
        return {
            name: _keep_largest(weight.abs().flatten(), sparsity).view(weight.shape) for name, weight in weights.items()
        }
    if not weights:
        return {}
    flat = torch.cat([weight.abs().flatten() for weight in weights.values()])
    parts = _keep_largest(flat, sparsity).split([weight.numel() for weight in weights.values()])
    return {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def _keep_largest(magnitude: Tensor, sparsity: float) -> Tensor:
    """A mask [n] over magnitudes [n]. Selection instead of sorting: linear in n, and no index for every weight."""
    import torch

    count = round(sparsity * magnitude.numel())
    keep = magnitude != 0
    if count == 0:
        return keep
    limit = torch.kthvalue(magnitude, count).values
    keep &= magnitude >= limit
    ties = torch.nonzero(magnitude == limit).flatten()
    keep[ties[: count - int((magnitude < limit).sum())]] = False
    return keep


def quantiles(weights: Mapping[str, Tensor]) -> dict[float, float]:
    """Magnitudes below which the shares ``QUANTILES`` of all the weights lie."""
    import torch

    flat = torch.cat([weight.abs().flatten() for weight in weights.values()])
    at = {share: max(1, round(share * flat.numel())) for share in QUANTILES}
    return {share: float(torch.kthvalue(flat, count).values) for share, count in at.items()}
