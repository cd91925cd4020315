"""Attention in chunks of sorted queries and keys, as Reformer does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_HIDDEN = -1e30


def draw_rotations(groups: int, rounds: int, width: int, buckets: int, generator: torch.Generator) -> Tensor:
    """Random directions [G, rounds, D + 1, buckets / 2]; with their opposites they are the buckets."""
    import torch

    return torch.randn(groups, rounds, width + 1, max(1, buckets // 2), generator=generator)


def attend_in_chunks(
    query: Tensor, key: Tensor, value: Tensor, rotations: Tensor, chunk: int, seen: Tensor | None, scale: float
) -> Tensor:
    """The output [B, Lq, H, E] of sort-and-chunk attention (Kitaev et al. 2020, 2001.04451).

    In each round queries and keys are sorted by angular hash; a chunk of queries meets the ``2 · chunk`` keys about the
    bucket of its middle query, and a pair that meets in several rounds counts once. Departs from the article where it
    changes the model: queries are not made keys, nor keys normalised; for the hash all keys are made equally long
    by one more number. Which keys stand in a chunk depends on the whole sequence, so that there is no causal form.

    Args:
        query: [B, H, Lq, D].
        key: [B, G, Lk, D], where H is a multiple of G; ``value`` is [B, G, Lk, E].
        value: see ``key``.
        rotations: [G, rounds, D + 1, buckets / 2].
        chunk: queries that are computed together.
        seen: which keys may be seen, bool [B, Lk]; None for all.
        scale: what scores are multiplied with.
    """
    import torch

    per = query.shape[1] // key.shape[1]
    key, value = (given.repeat_interleave(per, 1) for given in (key, value))
    rotations = rotations.repeat_interleave(per, 0)
    keys = key.shape[2]
    wide = min(2 * chunk, keys)
    rounds = [_sorted(query, key, rotations[:, number], chunk, wide, seen) for number in range(rotations.shape[1])]
    parts, masses = [], []
    for order, starts, held, place in rounds:
        at = (starts[..., None] + torch.arange(wide, device=key.device)).clamp(0, keys - 1)
        met = held.gather(2, at.flatten(2)).view(at.shape)  # [B, H, chunks, wide], numbers of keys
        queries = _rows(query, order).unflatten(2, (-1, chunk)) * scale
        scores = queries @ _rows(key, met.flatten(2)).unflatten(2, met.shape[2:]).transpose(-1, -2)
        times = torch.stack([_meets(order, met, other[1], other[3], chunk, wide) for other in rounds]).sum(0)
        scores = scores - times.clamp_min(1).log()
        if seen is not None:
            hidden = ~seen[:, None].expand(-1, key.shape[1], -1).gather(2, met.flatten(2)).view(met.shape)
            scores = scores.masked_fill(hidden[..., None, :], _HIDDEN)
        out = scores.softmax(-1) @ _rows(value, met.flatten(2)).unflatten(2, met.shape[2:])
        back = place[0]
        parts.append(_rows(out.flatten(2, 3), back))
        masses.append(scores.logsumexp(-1).flatten(2).gather(2, back))
    weight = torch.stack(masses).softmax(0)[..., None]
    alive = torch.stack(masses).amax(0)[..., None] > _HIDDEN / 2
    return ((torch.stack(parts) * weight).sum(0) * alive).transpose(1, 2).contiguous()


def _sorted(
    query: Tensor, key: Tensor, rotations: Tensor, chunk: int, wide: int, seen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The queries' order, padded to whole chunks by repeating the last, [B, H, N]; where each chunk's keys start among
    the sorted ones [B, H, chunks]; the keys' order [B, H, Lk]; places of queries and of keys in their orders."""
    import torch

    with torch.no_grad():
        squares = key.pow(2).sum(-1)
        if seen is not None:
            squares = squares.masked_fill(~seen[:, None], 0)
        rest = (squares.amax(-1, keepdim=True) - squares).clamp_min(0).sqrt()
        codes = []
        for features in (torch.nn.functional.pad(query, (0, 1)), torch.cat([key, rest[..., None]], -1)):
            turned = features.float() @ rotations
            codes.append(torch.cat([turned, -turned], -1).argmax(-1))
        buckets = 2 * rotations.shape[-1]
        if seen is not None:
            codes[1] = codes[1].masked_fill(~seen[:, None], buckets)
        order, held = (code.argsort(dim=-1, stable=True) for code in codes)
        places = order.argsort(-1), held.argsort(-1)
        short = -order.shape[-1] % chunk
        order = torch.cat([order, order[..., -1:].expand(*order.shape[:2], short)], -1)
        middle = codes[0].gather(2, order).unflatten(2, (-1, chunk))[..., chunk // 2]
        count = torch.zeros(*key.shape[:2], buckets + 1, device=key.device, dtype=torch.long)
        count.scatter_add_(2, codes[1], torch.ones_like(codes[1]))
        ends = count.cumsum(-1)
        centre = (ends.gather(2, middle) * 2 - count.gather(2, middle)) // 2
        return order, (centre - wide // 2).clamp(0, key.shape[2] - wide), held, places


def _meets(order: Tensor, met: Tensor, starts: Tensor, places: tuple[Tensor, Tensor], chunk: int, wide: int) -> Tensor:
    """Whether the pairs of the queries ``order`` [B, H, N] with the keys ``met`` [B, H, chunks, wide] meet in the round
    that the other tensors describe, as numbers [B, H, chunks, chunk, wide]."""
    mine = starts.gather(2, places[0].gather(2, order) // chunk).unflatten(2, (-1, chunk))[..., None]
    at = places[1].gather(2, met.flatten(2)).view(met.shape)[..., None, :]
    return ((at >= mine) & (at < mine + wide)).float()


def _rows(tensor: Tensor, at: Tensor) -> Tensor:
    return tensor.gather(2, at[..., None].expand(*at.shape, tensor.shape[-1]))
