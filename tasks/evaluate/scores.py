"""Scores of single examples, and what is computed from a sample of them.

One file, ``scores.safetensors``, beside ``evaluation.json``: gates resample it again, paired with the scores of another
artifact on the same examples. What its columns are is said by the application that made them, in
``tasks.evaluate.quality``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.evaluate import bootstrap

FILE = "scores.safetensors"

Scores = Mapping[str, np.ndarray]
"""Columns with one row an example."""


@dataclass(frozen=True)
class Sample:
    """The units that are resampled, and the metrics as figures of a resample.

    Args:
        unit: what is drawn, in the plural, for example ``sentences``.
        size: how many there are.
        statistics: each metric as a figure of a resample.
        identity: what two artifacts that were given the same examples have in common; empty where draws of one say
            nothing about draws of another.
    """

    unit: str
    size: int
    statistics: Mapping[str, bootstrap.Statistic]
    identity: tuple[np.ndarray, ...] = ()

    def value(self, metric: str) -> float:
        """The metric on the sample itself; NaN where there is nothing to compute it from."""
        return float(self.statistics[metric](np.arange(self.size)[None])[0]) if self.size else math.nan

    def metrics(self, *, resamples: int, confidence: float, seed: int) -> dict[str, dict[str, Any]]:
        """Each metric with its interval.

        Args:
            resamples: behind each interval.
            confidence: coverage of each interval, 0 to 1.
            seed: of the draws.
        """
        found = {}
        for name, statistic in self.statistics.items():
            bounds = None
            if self.size > 1:
                bounds = bootstrap.interval(bootstrap.replicates(statistic, self.size, resamples, seed), confidence)
            found[name] = metric(self.value(name), bounds, n=self.size) | {"resampled": self.unit}
        return found

    def same_units(self, other: Sample) -> bool:
        """Whether both scored the same examples, so that they can be resampled with the same draws."""
        alike = (self.unit, self.size, len(self.identity)) == (other.unit, other.size, len(other.identity))
        pairs = zip(self.identity, other.identity, strict=True) if alike else ()
        return bool(self.identity) and alike and all(np.array_equal(one, two) for one, two in pairs)


def metric(value: float | None, bounds: tuple[float, float] | None = None, n: int | None = None) -> dict[str, Any]:
    """One entry of an evaluation's ``metrics``; what is no finite number becomes None, as JSON knows no other."""
    finite = value is not None and math.isfinite(value)
    low, high = bounds if finite and bounds is not None else (None, None)
    return {"value": value if finite else None, "low": low, "high": high, "n": n}


def read(folder: Path) -> Scores | None:
    """The scores that an evaluation wrote; None where it wrote none."""
    from safetensors.numpy import load_file

    path = folder / FILE
    return load_file(path) if path.is_file() else None


def write(folder: Path, scores: Scores) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(column) for name, column in scores.items()}, folder / FILE)
