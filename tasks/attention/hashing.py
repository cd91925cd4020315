"""Fitting how keys are hashed: three families of hash functions, all of the form ``argmax_c x·table[c] + bias[c]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.attention.lsh import Hashed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ITERATIONS = 12
_LARGEST_SAMPLE = 16_384


def fit(family: str, keys: Tensor, buckets: int, generator: torch.Generator) -> Hashed:
    """The hash functions of one attention.

    ``centroid``: the nearest of the centres that k-means finds (Lloyd 1982; started as Arthur & Vassilvitskii 2007).
    ``angular``: the nearest of random directions and their opposites (Andoni et al. 2015, 1509.02897), of keys less
    their mean and made equally long. ``e2lsh``: cells of a grid in two random directions, shifted at random (Datar et
    al. 2004), its step taken from the keys' spread.

    Args:
        family: one of the above.
        keys: seen in calibration, [G, N, D].
        buckets: how many; angular takes an even number, one less of an odd one.
        generator: draws the directions and the first centres.
    """
    import torch

    keys = keys.float()
    if keys.shape[1] > _LARGEST_SAMPLE:
        keys = keys[:, torch.randperm(keys.shape[1], generator=generator)[:_LARGEST_SAMPLE]]
    made = {"centroid": _centroids, "angular": _directions, "e2lsh": _grid}[family](keys, buckets, generator)
    return _with_spread(made, keys)


def codes(hashed: Hashed, keys: Tensor) -> Tensor:
    """The bucket of each key [G, N, D], [G, N]."""
    features = hashed.features(keys[None])[0]
    return (features @ hashed.table.transpose(1, 2) + hashed.bias[:, None]).argmax(-1)


def _centroids(keys: Tensor, buckets: int, generator: torch.Generator) -> Hashed:
    import torch

    groups, count, width = keys.shape
    buckets = min(buckets, count)
    table = torch.empty(groups, buckets, width)
    table[:, 0] = keys[:, torch.randint(count, (1,), generator=generator)[0]]
    nearest = torch.full((groups, count), torch.inf)
    for number in range(1, buckets):
        nearest = torch.minimum(nearest, (keys - table[:, number - 1, None]).pow(2).sum(-1))
        chosen = torch.multinomial(nearest + 1e-12, 1, generator=generator)[:, 0]
        table[:, number] = keys[torch.arange(groups), chosen]
    for _ in range(ITERATIONS):
        bias = -table.pow(2).sum(-1) / 2
        code = (keys @ table.transpose(1, 2) + bias[:, None]).argmax(-1)
        sums, held = _by_bucket(code, keys, buckets)
        table = torch.where(held[..., None] > 0, sums / held.clamp_min(1)[..., None], table)
    return Hashed(table, -table.pow(2).sum(-1) / 2, torch.zeros(groups, buckets))


def _directions(keys: Tensor, buckets: int, generator: torch.Generator) -> Hashed:
    import torch

    groups, _, width = keys.shape
    half = max(1, buckets // 2)
    shift = keys.mean(1)
    radius = (keys - shift[:, None]).norm(dim=-1).amax(-1)
    table = torch.randn(groups, half, width + 1, generator=generator)
    table = torch.nn.functional.normalize(torch.cat([table, -table], 1), dim=-1)
    zeros = torch.zeros(groups, 2 * half)
    return Hashed(table, zeros, zeros, shift, radius)


def _grid(keys: Tensor, buckets: int, generator: torch.Generator) -> Hashed:
    import torch

    groups, _, width = keys.shape
    lines = max(1, round(buckets**0.5))
    columns = max(1, buckets // lines)
    directions = torch.linalg.qr(torch.randn(groups, width, 2, generator=generator)).Q
    places = (keys - keys.mean(1, keepdim=True)) @ directions
    wide = 2 * places.std(1)  # the outermost cells are open, so that nothing falls out of the grid
    offset = torch.rand(groups, 2, generator=generator) - 0.5
    axes = [torch.linspace(-1, 1, size) if size > 1 else torch.zeros(1) for size in (lines, columns)]
    steps = torch.tensor([2 / max(1, size - 1) for size in (lines, columns)])
    cells = torch.cartesian_prod(*axes)[None] * wide[:, None] + (offset * steps * wide)[:, None]
    table = cells @ directions.transpose(1, 2)
    return Hashed(table, -cells.pow(2).sum(-1) / 2, torch.zeros(cells.shape[:2]), keys.mean(1))


def _by_bucket(code: Tensor, keys: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """Sums of the keys [G, C, D] and their numbers [G, C]."""
    sums = keys.new_zeros(keys.shape[0], buckets, keys.shape[-1])
    sums.scatter_add_(1, code[..., None].expand_as(keys), keys)
    held = keys.new_zeros(keys.shape[0], buckets)
    return sums, held.scatter_add_(1, code, keys.new_ones(code.shape))


def _with_spread(hashed: Hashed, keys: Tensor) -> Hashed:
    """With the variance of the keys of each bucket about their mean; 0 where there are too few to tell."""
    import torch

    code = codes(hashed, keys)
    sums, held = _by_bucket(code, keys, hashed.table.shape[1])
    mean = sums / held.clamp_min(1)[..., None]
    far = (keys - torch.gather(mean, 1, code[..., None].expand_as(keys))).pow(2).mean(-1)
    squares = keys.new_zeros(held.shape).scatter_add_(1, code, far)
    spread = torch.where(held > 1, squares / (held - 1).clamp_min(1), torch.zeros_like(squares))
    return Hashed(hashed.table, hashed.bias, spread, hashed.shift, hashed.radius)
