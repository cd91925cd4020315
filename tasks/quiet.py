"""How much of the machine other processes use while something is measured."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

DISTURBED = 0.1
"""Share of the cores; where others use more, a latency says little about the model."""

SHORTEST = 0.1
"""Seconds; the system counts in hundredths, so that nobody can tell for a shorter block."""

T = TypeVar("T")


@dataclass
class Others:
    """What other processes did in a block: ``share`` is the part of all cores that they used, from 0 to 1; None before
    the block's end, and where nobody can tell."""

    share: float | None = None


@contextlib.contextmanager
def busy_share() -> Iterator[Others]:
    """Find out what share of the machine others use in the block: the time in which its cores are busy, less the time
    that this process computes. What other guests of the same host take away counts too."""
    others = Others()
    before = _clocks()
    try:
        yield others
    finally:
        wall, busy, own = (end - start for end, start in zip(_clocks(), before, strict=True))
        if wall >= SHORTEST:
            others.share = max(0.0, (busy - own) / (wall * (os.cpu_count() or 1)))


def undisturbed(measure: Callable[[], T], what: str) -> tuple[T, str | None]:
    """Take a measurement, and once more where others disturbed it.

    Args:
        measure: takes it.
        what: it is, in words, for example ``the latency``.

    Returns:
        What was found, by the calmer of two tries where both were disturbed; and a note that says so, else None.
    """
    tries = []
    for _ in range(2):
        with busy_share() as others:
            found = measure()
        if others.share is None or others.share <= DISTURBED:
            return found, None
        tries.append((others.share, found))
    share, found = min(tries, key=lambda attempt: attempt[0])
    used = f"other processes used {share:.0%} of the machine's {os.cpu_count()} cores while {what} was taken"
    return found, f"{used}, in the calmer of two tries; measure again on an idle machine before you rely on it"


def _clocks() -> tuple[float, float, float]:
    """Seconds that passed, that the machine's cores were busy, and that this process computed."""
    import psutil

    spent = psutil.cpu_times()
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")  # a guest's time is part of the user's
    return time.perf_counter(), sum(getattr(spent, kind, 0.0) for kind in kinds), time.process_time()
