"""Attention in buckets by plain torch: what ``tasks.attention.kernel`` computes, on any device, where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.attention.lsh import Call

HIDDEN = -1e30
"""A score that counts nothing: finite, so that no gradient becomes NaN."""

Part = tuple["Tensor", "Tensor", "Tensor"]
"""Numbers of rows [N], their outputs over some keys [N, E], and the logarithms of the masses of these keys [N]."""


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``tasks.attention.kernel.forward``."""
    import torch

    batch, groups = call.key.shape[:2]
    heads, rows = call.query.shape[1:3]
    hashed = call.hashed
    marks = torch.einsum("bglf,gcf->bglc", hashed.features(call.key).float(), hashed.table) + hashed.bias[:, None]
    code = marks.argmax(-1).int()
    if call.seen is not None:
        code = code.masked_fill(~call.seen[:, None], -1)
    probe = torch.full((batch, heads, rows, call.probes), -1, dtype=torch.int32, device=code.device)
    out = torch.empty(batch, rows, heads, call.value.shape[-1], device=code.device)
    lse = torch.empty(batch, heads, rows, device=code.device)
    per = heads // groups
    for b in range(batch):
        for g in range(groups):
            mine = slice(g * per, (g + 1) * per)
            query, key, value = (part.float() for part in (call.query[b, mine], call.key[b, g], call.value[b, g]))
            made, mass = _piece(call, g, query, key, value, code[b, g], probe[b, mine], chosen=False)
            out[b, :, mine], lse[b, mine] = made.transpose(0, 1), mass
    return out, lse, code, probe


def backward(
    call: Call, out: Tensor, lse: Tensor, code: Tensor, probe: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``tasks.attention.kernel.backward``; what it needs is computed anew, one group of heads at a time."""
    import torch

    made = [torch.zeros_like(given, dtype=torch.float32) for given in (call.query, call.key, call.value)]
    per = call.query.shape[1] // call.key.shape[1]
    for b in range(call.key.shape[0]):
        for g in range(call.key.shape[1]):
            mine = slice(g * per, (g + 1) * per)
            places = (mine, g, g)
            given = [
                tensor[b, place].detach().float().requires_grad_()
                for tensor, place in zip((call.query, call.key, call.value), places, strict=True)
            ]
            with torch.enable_grad():
                part, _ = _piece(call, g, given[0], given[1], given[2], code[b, g], probe[b, mine], chosen=True)
            if not part.requires_grad:  # nothing is met at all
                continue
            found = torch.autograd.grad(part, given, grad[b, :, mine].transpose(0, 1).float(), allow_unused=True)
            for total, place, gradient in zip(made, places, found, strict=True):
                if gradient is not None:
                    total[b, place] = gradient
    return made[0], made[1], made[2]


def spans(rows: int, keys: int, window: int, offset: int, causal: bool) -> Iterator[tuple[slice, int, int]]:
    """Blocks of rows that share a local window, and the keys ``low`` to ``high`` that no bucket shows them: with
    causality all from ``low`` on."""
    if not window:
        yield slice(0, rows), keys, keys
        return
    at = 0
    while at < rows:
        block = (at + offset) // window
        end = min(rows, (block + 1) * window - offset)
        low = min(keys, max(0, (block - 1) * window))
        yield slice(at, end), low, keys if causal else min(keys, (block + 2) * window)
        at = end


def _piece(
    call: Call, group: int, query: Tensor, key: Tensor, value: Tensor, code: Tensor, probe: Tensor, *, chosen: bool
) -> tuple[Tensor, Tensor]:
    """Outputs [H, Lq, E] and masses [H, Lq] of the queries [H, Lq, D] that share the keys [Lk, D]. Buckets are written
    into ``probe`` [H, Lq, P] unless they are ``chosen``."""
    import torch

    heads, rows, _ = query.shape
    scaled = query * call.scale
    numbers = torch.arange(heads * rows, device=code.device).view(heads, rows)
    lows = torch.empty(rows, dtype=torch.long, device=code.device)
    highs = torch.empty_like(lows)
    parts: list[Part] = []
    for span, low, high in spans(rows, len(key), call.window, call.offset, call.causal):
        lows[span], highs[span] = low, high
        at = numbers[:, span].reshape(-1)
        mine = scaled[:, span].reshape(len(at), -1)
        masses, values = _masses(call, group, mine, key, value, code, low, high)
        if not chosen:
            probe[:, span] = _choose(masses, call.probes).view(heads, span.stop - span.start, call.probes)
        if call.residual:
            buckets = probe[:, span].reshape(len(at), call.probes, 1)
            looked = (buckets == torch.arange(masses.shape[1], device=code.device)).any(1)
            parts.append((at, *_softmax(masses.masked_fill(looked, HIDDEN), values)))
        stop = min(len(key), span.stop + call.offset if call.causal else high)
        if call.window and stop > low:
            scores = mine @ key[low:stop].T
            hidden = (code[low:stop] < 0)[None].expand_as(scores)
            places = torch.arange(span.start, span.stop, device=code.device).repeat(heads) + call.offset
            far = places[:, None] - torch.arange(low, stop, device=code.device)
            if call.causal:
                hidden = hidden | (far < 0)
            if call.band:
                hidden = hidden | (far.abs() >= call.band)
            parts.append((at, *_softmax(scores.masked_fill(hidden, HIDDEN), value[low:stop])))
    flat, looking = scaled.reshape(heads * rows, -1), probe.reshape(heads * rows, call.probes)
    for bucket in range(call.hashed.table.shape[1]):
        at = (looking == bucket).any(-1).nonzero()[:, 0]
        held = (code == bucket).nonzero()[:, 0]
        if len(at) and len(held):
            row = at % rows
            local = (held[None] >= lows[row][:, None]) & (held[None] < highs[row][:, None])
            scores = (flat[at] @ key[held].T).masked_fill(local, HIDDEN)
            parts.append((at, *_softmax(scores, value[held])))
    out, lse = _merge(parts, heads * rows, value)
    return out.view(heads, rows, -1), lse.view(heads, rows)


def _masses(
    call: Call, group: int, query: Tensor, key: Tensor, value: Tensor, code: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Estimated logarithms of the mass of each bucket [N, C], and the mean values [C, E]."""
    import torch

    count = call.hashed.table.shape[1]
    outside = torch.ones_like(code, dtype=torch.bool)
    outside[low:high] = False
    member = torch.nn.functional.one_hot(code.long().clamp_min(0), count) * ((code >= 0) & outside)[:, None]
    share = member.float() / member.sum(0).clamp_min(1)
    held = member.sum(0)
    spread = 0.5 * query.pow(2).sum(-1, keepdim=True) * call.hashed.spread[group]
    masses = query @ (share.T @ key).T + held.clamp_min(1).log() + spread
    return masses.masked_fill(held == 0, HIDDEN), share.T @ value


def _choose(masses: Tensor, count: int) -> Tensor:
    """The buckets of most mass, int32 [N, P]; -1 where fewer have keys."""
    import torch

    found = torch.full((len(masses), count), -1, dtype=torch.int32, device=masses.device)
    best = masses.detach().topk(min(count, masses.shape[1]), dim=1)
    found[:, : best.indices.shape[1]] = best.indices.masked_fill(best.values <= HIDDEN, -1).int()
    return found


def _softmax(scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def _merge(parts: list[Part], rows: int, value: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    if not parts:
        return value.new_zeros(rows, value.shape[-1]), value.new_full((rows,), -torch.inf)
    at, outs, masses = (torch.cat(column) for column in zip(*parts, strict=True))
    most = torch.full((rows,), HIDDEN, device=value.device).scatter_reduce(0, at, masses.detach(), "amax")
    weight = (masses - most[at]).exp() * (masses > HIDDEN / 2)
    total = value.new_zeros(rows).index_add(0, at, weight)
    out = value.new_zeros(rows, value.shape[-1]).index_add(0, at, outs * weight[:, None])
    return out / total.clamp_min(1e-30)[:, None], torch.where(
        total > 0, most + total.clamp_min(1e-30).log(), -torch.inf
    )
