"""Which of several sizes each layer takes, so that together they fit a budget and disturb the outputs least."""

from __future__ import annotations

from collections.abc import Sequence


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
    totals: list[tuple[int, float]] = [(0, 0.0)]
    steps: list[list[tuple[int, int]]] = []
    for layer, choices in enumerate(options):
        reached = sorted(
            (size + more, cost + extra, number, option)
            for number, (size, cost) in enumerate(totals)
            for option, (more, extra) in enumerate(choices)
            if size + more + behind[layer] <= budget
        )
        kept, lowest = [], float("inf")
        for size, cost, number, option in reached:
            if cost < lowest:
                lowest = cost
                kept.append((size, cost, number, option))
        if not kept:
            return None
        totals = [(size, cost) for size, cost, _, _ in kept]
        steps.append([(number, option) for _, _, number, option in kept])
    chosen, at = [], len(totals) - 1
    for layer in reversed(range(len(options))):
        at, option = steps[layer][at]
        chosen.append(option)
    return chosen[::-1]
