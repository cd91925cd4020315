"""What the benches share: progress on the terminal, and intervals of what they measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tasks.evaluate.bootstrap import interval, quantile, ratio_of_sums, replicates

RESAMPLES = 2000
PAUSE = 15.0
"""Seconds between two lines of progress of one step."""


def teller(name: str) -> Callable[[Mapping[str, Any]], None]:
    """An ``emit`` for a step's context that prints its notes and, now and then, how far it is."""
    began, last = time.monotonic(), [0.0]

    def tell(event: Mapping[str, Any]) -> None:
        spent = time.monotonic() - began
        if event["event"] == "note":
            print(f"  {name}, {spent:.0f} s: {event['text']}", file=sys.stderr, flush=True)
        elif event["event"] == "progress" and spent - last[0] >= PAUSE:
            last[0] = spent
            print(
                f"  {name}, {spent:.0f} s: {event['done']:.0f} of {event['total']:.0f} {event['unit']}",
                file=sys.stderr,
                flush=True,
            )

    return tell


def with_interval(value: float, values: np.ndarray, form: str) -> str:
    """A figure with the central 95 % of its replicates."""
    found = interval(values, 0.95)
    return f"{value:{form}}" + (f" [{found[0]:{form}}, {found[1]:{form}}]" if found else "")


def times_faster(slow: Sequence[float], fast: Sequence[float]) -> str:
    """The ratio of the medians of two measurements whose rounds were taken in turn, resampled with the same draws."""
    both = [np.asarray(seconds) for seconds in (slow, fast)]
    ratios = [replicates(quantile(seconds, 0.5), len(seconds), RESAMPLES, 0) for seconds in both]
    return with_interval(float(np.median(both[0]) / np.median(both[1])), ratios[0] / ratios[1], ".2f")


def milliseconds(seconds: Sequence[float]) -> str:
    """The median of a measurement with its interval, in ms."""
    found = np.asarray(seconds) * 1e3
    return with_interval(float(np.median(found)), replicates(quantile(found, 0.5), len(found), RESAMPLES, 0), ".2f")


def share_right(right: np.ndarray) -> str:
    """The accuracy of answers, bool [N], with its interval."""
    ones = np.ones(len(right))
    return with_interval(
        float(right.mean()), replicates(ratio_of_sums(right * 1.0, ones), len(right), RESAMPLES, 0), ".1%"
    )


def share_of(right: np.ndarray, base: np.ndarray) -> str:
    """The accuracy as a share of another model's on the same examples, both resampled with the same draws."""
    found = replicates(ratio_of_sums(right * 1.0, base * 1.0), len(right), RESAMPLES, 0)
    return with_interval(float(right.mean() / base.mean()), found, ".1%")
