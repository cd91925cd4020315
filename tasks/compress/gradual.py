"""Zeros that come while the model trains: the cubic schedule, by magnitude or by movement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from tasks.compress.masks import magnitude_masks, score_masks
from tasks.finetune.masks import Kept

if TYPE_CHECKING:
    from torch import Tensor, nn

MASKS = 100
"""New masks while the sparsity rises, where nothing else is said."""


def cubic(step: int, first: int, last: int, sparsity: float) -> float:
    """The sparsity at optimiser step ``step``, ``s · (1 - (1 - t)³)`` with t from 0 at ``first`` to 1 at ``last``:
    equation 1 of Zhu & Gupta (1710.01878) from no zeros."""
    if step >= last:
        return sparsity
    done = max(0, step - first) / (last - first)
    return sparsity * (1 - (1 - done) ** 3)


class Gradual:
    """Masks whose sparsity rises (``tasks.finetune.masks.Masks``).

    ``magnitude`` drops the smallest weights (Zhu & Gupta, 1710.01878). ``movement`` drops those with the lowest score
    ``Σ -w · ∂L/∂w`` over the optimiser steps so far: weights that training moves away from 0 score high (Sanh et al.,
    2005.07683, hard movement pruning). There the scores are parameters with an optimiser of their own; here they are
    the plain sums of the mean gradients before clipping.

    As in both papers a weight that is dropped keeps its last value: its score goes on from that value and the gradient
    at 0, and until the masks are the last ones it may come back with it. What is 0 when training starts stays 0.

    Args:
        names: of the parameters that are pruned.
        by: what decides.
        sparsity: at the end; exact.
        scope: whether it holds in every parameter or over all of them.
        ramp: share of the steps after the warm-up in which it rises; the last step has the final masks in any case.
        every: optimiser steps between new masks; None for ``MASKS`` of them.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        by: Literal["magnitude", "movement"],
        sparsity: float,
        scope: Literal["layer", "global"],
        ramp: float,
        every: int | None,
    ) -> None:
        self.names, self.by, self.sparsity = names, by, sparsity
        self.scope: Literal["layer", "global"] = scope
        self.ramp, self.every = ramp, every
        self.first = self.last = self._period = 0
        self._kept: dict[str, Tensor] = {}
        self._parked: dict[str, Tensor] = {}
        self._born: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}

    def start(self, weights: Mapping[str, nn.Parameter], total: int, warmup: int) -> Kept:
        import torch

        self.first = min(warmup, total - 1)
        self.last = min(total - 1, self.first + round(self.ramp * (total - self.first)))
        self._period = self.every or max(1, (self.last - self.first) // MASKS)
        for name in self.names:
            weight = weights[name].detach()
            self._born[name] = weight != 0
            self._kept[name] = self._born[name].clone()
            self._parked[name] = torch.zeros_like(weight)
            if self.by == "movement":
                self._scores[name] = torch.zeros_like(weight)
        return self._kept

    def at(self, step: int, weights: Mapping[str, nn.Parameter]) -> Kept:
        import torch

        if step > self.last:
            return self._kept
        with torch.no_grad():
            # What is dropped is 0 among the weights and stands among the parked; what is kept, the other way round.
            values = {name: weights[name] + self._parked[name] for name in self.names}
            if self.by == "movement":
                self._move(weights, values)
            if step == self.last or (step > self.first and (step - self.first) % self._period == 0):
                self._choose(cubic(step, self.first, self.last, self.sparsity), values)
                for name, mask in self._kept.items():
                    self._parked[name] = values[name].masked_fill(mask, 0)
                    weights[name].copy_(values[name].masked_fill(~mask, 0))
            if step == self.last:
                self._parked.clear()
                self._scores.clear()
        return self._kept

    def settled(self, done: int) -> bool:
        return done > self.last

    def tensors(self) -> Mapping[str, Tensor]:
        parts = {"kept": self._kept, "parked": self._parked, "scores": self._scores}
        return {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> Kept:
        parts = {"kept": self._kept, "parked": self._parked, "scores": self._scores}
        for full, tensor in tensors.items():
            part, _, name = full.partition(".")
            parts[part][name] = tensor.to(parts[part][name].device)
        return self._kept

    def _move(self, weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        import torch

        for name, score in self._scores.items():
            gradient = weights[name].grad
            if gradient is not None and bool(torch.isfinite(gradient).all()):  # fp16 skips the step of an overflow
                score.addcmul_(values[name], gradient, value=-1)

    def _choose(self, sparsity: float, values: Mapping[str, Tensor]) -> None:
        if self.by == "magnitude":
            self._kept.update(magnitude_masks(values, sparsity, self.scope))
            return
        lowest = float("-inf")
        scores = {name: score.masked_fill(~self._born[name], lowest) for name, score in self._scores.items()}
        masks = score_masks(scores, sparsity, self.scope)
        self._kept.update({name: mask & self._born[name] for name, mask in masks.items()})
