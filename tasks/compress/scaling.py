"""How much each input of a layer is scaled before its weights are rounded: AWQ and SmoothQuant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tasks.compress.gptq import output_error

if TYPE_CHECKING:
    from torch import Tensor

GRID = 20
"""Values of AWQ's alpha that are tried, from 0 on; 0 scales nothing."""

_LEAST = 1e-4


def awq_scale(
    weights: Sequence[Tensor], hessian: Tensor, magnitude: Tensor, rounding: Sequence[Callable[[Tensor], Tensor]]
) -> tuple[Tensor, float]:
    """What to multiply the weights' columns with, so that the inputs that matter lose less (Lin et al., 2306.00978).

    The scale is ``magnitude ** alpha``, with the alpha of the grid for which the rounded layers' outputs differ least
    from the float ones'. The paper measures behind the whole block; here it is behind the layers themselves, for which
    the second moments of the inputs suffice.

    Args:
        weights: of the layers that share the input, float [rows, columns] each.
        hessian: the mean of x xᵀ over the inputs x, float [columns, columns].
        magnitude: the mean of |x| over the inputs, float [columns].
        rounding: for each layer, weights to what is stored of them.

    Returns:
        The scale, float32 [columns], all 1 where nothing helps, and its alpha.
    """
    import torch

    best, scale, alpha = None, torch.ones_like(magnitude), 0.0
    for step in range(GRID):
        tried = magnitude.clamp_min(_LEAST) ** (step / GRID)
        tried = tried / (tried.max() * tried.min()).sqrt()
        error = 0.0
        for weight, rounded in zip(weights, rounding, strict=True):
            difference = rounded(weight * tried) / tried - weight
            error += output_error(difference, hessian).sum().item()
        if best is None or error < best:
            best, scale, alpha = error, tried, step / GRID
    return scale.float(), alpha


def smooth_scale(weights: Sequence[Tensor], largest: Tensor, alpha: float) -> Tensor:
    """What to multiply the weights' columns with, and divide the inputs by, so that neither has outliers (Xiao et al.,
    2211.10438): ``max|x| ** alpha / max|w| ** (1 - alpha)``.

    Args:
        weights: of the layers that share the input, float [rows, columns] each.
        largest: max |x| of each input over the examples, float [columns].
        alpha: share of the difficulty that moves into the weights.
    """
    import torch

    heaviest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    scale = largest.clamp_min(_LEAST) ** alpha / heaviest.clamp_min(_LEAST) ** (1 - alpha)
    idle = (largest <= 0) | (heaviest <= 0)
    return torch.where(idle, torch.ones_like(scale), scale.clamp_min(_LEAST)).float()
