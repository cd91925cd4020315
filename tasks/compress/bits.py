"""Which of several sizes each layer takes, so that together they fit a budget and disturb the outputs least."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def choose(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int] | None:
    """The multiple-choice knapsack, solved exactly: one option of each layer, least cost, bytes within the budget.

    Dynamic programming over bytes, layer by layer. Only totals that no other beats in bytes and cost are kept, which
    never loses the best (Nemhauser & Ullmann, 1969); as layers of a model come in few shapes, they stay few.

    Args:
        options: for each layer its options as (bytes, cost); bytes are whole, costs finite.
        budget: bytes that all layers together may take.

    Returns:
        The option of each layer; of equal costs the one with fewer bytes. None where even the smallest do not fit.
    """
    least = [min(size for size, _ in choices) for choices in options]
    behind = [sum(least[layer + 1 :]) for layer in range(len(options))]
    sizes, costs = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for layer, choices in enumerate(options):
        size = np.concatenate([sizes + more for more, _ in choices])
        cost = np.concatenate([costs + extra for _, extra in choices])
        number = np.tile(np.arange(len(sizes)), len(choices))
        option = np.repeat(np.arange(len(choices)), len(sizes))
        order = np.lexsort((cost, size))
        order = order[size[order] + behind[layer] <= budget]
        if not len(order):
            return None
        lowest = np.minimum.accumulate(cost[order])
        beats = np.concatenate([[True], cost[order][1:] < lowest[:-1]])
        kept = order[beats]
        sizes, costs = size[kept], cost[kept]
        steps.append((number[kept], option[kept]))
    chosen, at = [], len(sizes) - 1
    for number, option in reversed(steps):
        chosen.append(int(option[at]))
        at = number[at]
    return chosen[::-1]
