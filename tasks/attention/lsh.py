"""Attention in buckets: every query meets the keys of few buckets exactly and all others by the means of theirs.

Keys are hashed once into disjoint buckets. A query estimates the softmax mass of each bucket from the mean of its keys,
``q·k̄ + log n + ½ q·Σq``, meets the keys of the ``probes`` largest and those of a local window one by one, and the
others, with ``residual``, as one key of ``n`` times the weight whose value is their mean value. The parts are merged by
their log-sum-exp, so that with as many probes as buckets the result is that of full attention.

Routing Transformer (Roy et al. 2020, 2003.05997) and clustered attention (Vyas et al. 2020, 2007.04825) group keys so;
here buckets keep their own sizes, only keys are hashed, which leaves queries and keys as the model made them, and what
a causal query knows of the buckets is what came before its local window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from tasks.attention import kernel

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Hashed:
    """How keys are hashed: key ``x`` of group ``g`` goes into bucket ``argmax_c features(x)·table[g, c] + bias[g, c]``.

    Args:
        table: [G, C, F].
        bias: [G, C].
        spread: the variance of the keys of each bucket along one direction, [G, C].
        shift: what is taken off a key before it is hashed, [G, D]; None where nothing is.
        radius: the largest length of a key [G]; a further feature then makes all of them as long, so that directions
            alone decide (the transform of Neyshabur & Srebro 2015, 1410.5518, for maximum inner products).
    """

    table: Tensor
    bias: Tensor
    spread: Tensor
    shift: Tensor | None = None
    radius: Tensor | None = None

    def features(self, key: Tensor) -> Tensor:
        """What of keys [B, G, L, D] is hashed, [B, G, L, F]."""
        import torch

        if self.shift is not None:
            key = key - self.shift[None, :, None].to(key.dtype)
        if self.radius is None:
            return key
        rest = self.radius[None, :, None].to(key.dtype) ** 2 - key.pow(2).sum(-1)
        return torch.cat([key, rest.clamp_min(0).sqrt()[..., None]], -1)


@dataclass(frozen=True)
class Call:
    """One attention.

    Args:
        query: [B, Hq, Lq, D]; ``key`` and ``value`` are [B, G, Lk, D] and [B, G, Lk, E], where Hq is a multiple of G.
        hashed: how keys are hashed.
        seen: which keys may be seen, bool [B, Lk]; None for all.
        probes: buckets that each query looks into.
        window: length of the blocks of the local window; a query meets those from the block before its own to its own,
            or without causality the block behind it too. 0 for none.
        band: a query meets of its local window only keys less than so many positions away; 0 for all.
        causal: whether query ``i`` sees keys up to ``offset + i`` only; it needs a window.
        offset: position of the first query among the keys.
        residual: whether buckets that are not looked into count by their means.
        scale: what scores are multiplied with.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    hashed: Hashed
    seen: Tensor | None = None
    probes: int = 2
    window: int = 0
    band: int = 0
    causal: bool = False
    offset: int = 0
    residual: bool = True
    scale: float = 1.0


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """Outputs [B, Lq, Hq, E] and the logarithm of each row's mass [B, Hq, Lq].

    A row that may see no key has the output 0 and the mass 0. Computed in float32, by compiled code where there is a
    compiler (``tasks.attention.kernel``), else by plain torch (``tasks.attention.plain``); both keep what grows with
    the length alone for the gradient.

    Raises:
        ValueError: a causal attention without a window.
    """
    if call.causal and not call.window:
        raise ValueError("a causal attention needs a window: what it knows of buckets ends before it")
    out, lse = _function().apply(call.query, call.key, call.value, call)
    return out.to(call.query.dtype), lse


@cache
def _function() -> Any:
    import torch

    from tasks.attention import plain

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
            ctx.way = kernel if kernel.usable(call) else plain
            out, lse, code, probe = ctx.way.forward(call)
            ctx.call = call
            ctx.save_for_backward(out, lse, code, probe)
            ctx.mark_non_differentiable(lse)
            return out, lse

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
            call = ctx.call
            made = ctx.way.backward(call, *ctx.saved_tensors, grads[0])
            given = (call.query, call.key, call.value)
            return (*(grad.to(tensor.dtype) for grad, tensor in zip(made, given, strict=True)), None)

    return Attention
