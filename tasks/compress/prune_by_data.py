"""Pruning by what comes into each layer for training examples: Wanda and SparseGPT, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.compress.masks import pattern_mask, row_mask, wanda_score
from tasks.compress.sparsegpt import sparsegpt
from tasks.compress.walk import walk
from tasks.context import StepError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.data.encoded import Encoded
    from tasks.models.layout import LinearLayer


@dataclass(frozen=True)
class Rule:
    """How a matrix is pruned from its inputs.

    Args:
        gather: inputs [T, in] to what is summed over the examples.
        prune: weights [out, in] and that sum to the new weights and what is kept of them, bool [out, in].
    """

    gather: Callable[[Tensor], Tensor]
    prune: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def by_wanda(sparsity: float | None, pattern: tuple[int, int] | None) -> Rule:
    """Wanda (Sun et al., 2306.11695): of each output's weights the ones with the smallest ``|w| · ‖x‖₂`` become 0,
    exactly ``round(sparsity · in)`` of them or by the pattern (N, M); the others stay as they are."""

    def prune(weight: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        score = wanda_score(weight, squares)
        if pattern is not None:
            kept = pattern_mask(score, weight, *pattern)
        else:
            kept = row_mask(score, weight, round((sparsity or 0.0) * weight.shape[1]))
        return weight.masked_fill(~kept, 0), kept

    return Rule(lambda x: x.square().sum(0), prune)


def by_sparsegpt(
    sparsity: float | None, pattern: tuple[int, int] | None, block: int | None = None, damping: float = 0.01
) -> Rule:
    """SparseGPT; see ``tasks.compress.sparsegpt``."""

    def prune(weight: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
        return sparsegpt(weight, products, sparsity=sparsity, pattern=pattern, block=block, damping=damping)

    return Rule(lambda x: x.T @ x, prune)


def prune_by_data(
    network: nn.Module,
    layers: Mapping[str, LinearLayer],
    data: Encoded,
    rule: Rule,
    *,
    device: str = "cpu",
    progress: Callable[[float, float, str], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Prune ``layers`` in place. The inputs of a block are those that the blocks pruned before it give.

    Args:
        network: a model in eval mode, on ``device``.
        layers: by their names.
        data: the calibration examples.
        rule: how.
        progress: called with blocks done, blocks in all, and ``blocks``.

    Returns:
        The masks by parameter name, in the shapes of the parameters; and how many vectors came into each layer.

    Raises:
        StepError: the parts of the model are not described, or what comes into a layer is not finite.
    """
    import torch

    totals: dict[str, Tensor] = {}
    vectors = dict.fromkeys(layers, 0)
    masks: dict[str, Tensor] = {}
    latest: tuple[Tensor, Tensor] | None = None

    def see(name: str, x: Tensor) -> None:
        nonlocal latest
        # Queries, keys and values have one input; as it is held here, its memory cannot hold another one meanwhile.
        if latest is None or latest[0].data_ptr() != x.data_ptr() or latest[0].shape != x.shape:
            latest = x, rule.gather(x)
        totals[name] = totals[name] + latest[1] if name in totals else latest[1]
        vectors[name] += len(x)

    def change(names: tuple[str, ...]) -> None:
        nonlocal latest
        latest = None
        for name in names:
            layer, total = layers[name], totals.pop(name)
            if not bool(torch.isfinite(total).all()):
                raise StepError(
                    f"what comes into {name} for the training examples is not finite; is the model one that works, and "
                    "does it need a wider type than it is stored in?"
                )
            weight, kept = rule.prune(layer.matrix.detach(), total)
            with torch.no_grad():
                layer.matrix.copy_(weight)
            masks[layer.weight_name] = kept if layer.kind == "linear" else kept.T

    walk(network, frozenset(layers), data, see, change, device=device, progress=progress)
    return masks, vectors
