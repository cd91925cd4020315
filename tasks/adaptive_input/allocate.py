"""Which bands a table is cut into, and which rank and bits each gets: exactly, for the least error within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

UNITS = 4096

Runs = Mapping[tuple[int, int], Sequence[tuple[int, float]]]
"""What a run of segments ``(from, to)`` can be as one band: its options as (bytes, cost)."""

Chosen = list[tuple[int, int, int]]
"""Bands as (from, to, option of the run), in order."""


@dataclass(frozen=True)
class Front:
    """Ways to cover the first segments with bands that none beats in bytes and cost, by rising bytes.

    ``before``, ``at`` and ``option`` tell of each the front that it continues, its place there and the option.
    """

    sizes: np.ndarray
    costs: np.ndarray
    before: np.ndarray
    at: np.ndarray
    option: np.ndarray


def allocate(
    tables: Sequence[tuple[int, Runs]],
    most: int,
    budget: int,
    units: int = UNITS,
    fewest: Sequence[int] | None = None,
) -> list[Chosen] | None:
    """Cut every table into at most ``most`` bands and choose an option for each, so that the costs of all tables add up
    to the least that ``budget`` allows.

    Dynamic programming over segments, number of bands and bytes; only totals that no other beats in bytes and cost are
    kept, which never loses the best (Nemhauser & Ullmann, 1969). Bytes are counted in units of ``budget / UNITS``,
    rounded up, so that totals stay few: exact where the budget is at most ``UNITS`` bytes, and else as good as the best
    within a budget that is smaller by a unit a band.

    Args:
        tables: of each the number of its segments and what every run of them can be.
        most: bands of a table.
        budget: bytes that all tables may take.
        units: in which the bytes are counted.
        fewest: bands that each table has at least; None is one.

    Returns:
        The bands of each table; of equal costs those with fewer bytes. None where even the smallest do not fit.
    """
    given, whole = tables, budget
    unit = max(1, budget // units)
    budget //= unit
    tables = [(count, _in_units(runs, unit)) for count, runs in tables]
    fewest = [1] * len(tables) if fewest is None else fewest
    if any(few > min(most, count) for few, (count, _) in zip(fewest, tables, strict=True)):
        return None
    least = [_least(count, runs, most, few) for (count, runs), few in zip(tables, fewest, strict=True)]
    if sum(least) > budget:  # in bytes it may fit, and few ways do where it only just fits
        return None if unit == 1 else allocate(given, most, whole, whole, fewest)
    fronts = [
        _cover(count, runs, most, budget - sum(least) + own) for (count, runs), own in zip(tables, least, strict=True)
    ]
    ends = [_whole(grid, count, few) for grid, (count, _), few in zip(fronts, tables, fewest, strict=True)]
    sizes, costs = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for end in ends:
        size, cost = (sizes[:, None] + end.sizes).ravel(), (costs[:, None] + end.costs).ravel()
        kept = _undominated(size, cost, budget)
        sizes, costs = size[kept], cost[kept]
        steps.append((kept // len(end.sizes), kept % len(end.sizes)))
    at, places = len(sizes) - 1, []
    for earlier, own in reversed(steps):
        places.append(int(own[at]))
        at = int(earlier[at])
    return [
        _trace(grid, end, place, count)
        for grid, end, place, (count, _) in zip(fronts, ends, reversed(places), tables, strict=True)
    ]


def frontier(count: int, runs: Runs, most: int, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and the least cost that a table can have with them, from the smallest to the largest.

    Args:
        count: segments of the table.
        runs: what every run of them can be.
        most: bands.
        units: in which the bytes are counted.
    """
    highest = max(size for size, _ in runs[0, count])
    unit = max(1, highest // units)
    found = _whole(_cover(count, _in_units(runs, unit), most, -(-highest // unit)), count)
    return found.sizes * unit, found.costs


def _least(count: int, runs: Runs, most: int, fewest: int) -> int:
    """The fewest bytes that a table can take in ``fewest`` bands or more: one is not always the smallest way."""
    smallest = {run: min(size for size, _ in options) for run, options in runs.items()}
    found, whole = {0: 0}, []
    for number in range(1, min(most, count) + 1):
        if number >= fewest:
            whole.append(min(size + smallest[start, count] for start, size in found.items()))
        if number < min(most, count):  # a band is left for the rest
            found = {
                end: min(size + smallest[start, end] for start, size in found.items() if start < end)
                for end in range(number, count)
            }
    return min(whole)


def _in_units(runs: Runs, unit: int) -> Runs:
    return {run: [(-(-size // unit), cost) for size, cost in options] for run, options in runs.items()}


def _whole(grid: Mapping[tuple[int, int], Front], count: int, fewest: int = 1) -> Front:
    """The front of all segments, in ``fewest`` bands or more."""
    return _joined({number: front for (number, end), front in grid.items() if end == count and number >= fewest})


def _cover(count: int, runs: Runs, most: int, budget: int) -> dict[tuple[int, int], Front]:
    """The fronts by (bands, segments covered)."""
    nothing = np.zeros(1, np.int64)
    grid = {(0, 0): Front(nothing, np.zeros(1), nothing, nothing, nothing)}
    for number in range(1, min(most, count) + 1):
        for end in range(number, count + 1):
            parts: list[tuple[np.ndarray, ...]] = []
            if number == most and end < count:
                continue  # no band is left for the rest
            for start in range(number - 1, end):
                front = grid.get((number - 1, start))
                if front is None or (number == 1 and start):
                    continue
                options = runs[start, end]
                size = np.concatenate([front.sizes + more for more, _ in options])
                cost = np.concatenate([front.costs + extra for _, extra in options])
                at = np.tile(np.arange(len(front.sizes)), len(options))
                option = np.repeat(np.arange(len(options)), len(front.sizes))
                parts.append((size, cost, np.full(len(size), start), at, option))
            if not parts:
                continue
            size, cost, *origin = (np.concatenate(part) for part in zip(*parts, strict=True))
            kept = _undominated(size, cost, budget)
            if len(kept):
                grid[number, end] = Front(size[kept], cost[kept], *(part[kept] for part in origin))
    return grid


def _joined(fronts: Mapping[int, Front]) -> Front:
    """One front of several; ``before`` is the number of bands there."""
    sizes = np.concatenate([front.sizes for front in fronts.values()])
    costs = np.concatenate([front.costs for front in fronts.values()])
    number = np.concatenate([np.full(len(front.sizes), bands) for bands, front in fronts.items()])
    at = np.concatenate([np.arange(len(front.sizes)) for front in fronts.values()])
    kept = _undominated(sizes, costs, int(sizes.max()))
    return Front(sizes[kept], costs[kept], number[kept], at[kept], at[kept])


def _trace(grid: Mapping[tuple[int, int], Front], end: Front, place: int, count: int) -> Chosen:
    number, at, bands = int(end.before[place]), int(end.at[place]), []
    while number:
        front = grid[number, count]
        start = int(front.before[at])
        bands.append((start, count, int(front.option[at])))
        number, count, at = number - 1, start, int(front.at[at])
    return bands[::-1]


def _undominated(size: np.ndarray, cost: np.ndarray, budget: int) -> np.ndarray:
    """The places of those that no other beats, by rising bytes."""
    order = np.lexsort((cost, size))
    order = order[size[order] <= budget]
    if not len(order):
        return order
    lowest = np.minimum.accumulate(cost[order])
    return order[np.concatenate([[True], cost[order][1:] < lowest[:-1]])]
