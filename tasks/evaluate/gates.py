"""Judging gates: a limit holds, does not hold, or the sample is too small to say; whatever cannot be computed fails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import numpy as np

from specs.schema.gates import GateSpec, points
from specs.schema.metrics import METRICS, Metric
from specs.schema.pipeline import EvaluateSpec
from tasks.context import Evaluation
from tasks.evaluate import bootstrap, format, quality, scores, speed

Status = Literal["passed", "failed", "inconclusive", "missing"]


@dataclass(frozen=True)
class Verdict:
    """What became of one gate on one step.

    Args:
        gate: the gate as text.
        step: the step judged.
        metric: its metric.
        unit: of value, interval, limit and margin: the metric's own, ``points``, ``%`` or ``x``.
        value: the figure compared with the limit: the metric, its drop or its gain; None where there is none.
        low, high: the interval of the value; None where nothing was sampled.
        limit: the number it is compared with.
        margin: how far the value is on the right side of the limit; negative on the wrong side.
        status: ``missing`` where the value cannot be computed, which counts as a failure.
        paired: whether the same examples were resampled on both sides.
        message: one line for people.
    """

    gate: str
    step: str
    metric: str
    unit: str
    value: float | None
    low: float | None
    high: float | None
    limit: float
    margin: float | None
    status: Status
    paired: bool
    message: str

    def shown(self, value: float | None) -> str:
        """A value, a bound or a margin as people write it."""
        return shown(self.metric, self.unit, value)


def shown(metric: str, unit: str, value: float | None) -> str:
    """A number of a gate: in the metric's own form, or as points, per cent or a factor."""
    return format.figure(metric, value) if unit == METRICS[metric].unit else format.human(value, unit)


@dataclass(frozen=True)
class _Figure:
    value: float
    bounds: tuple[float, float] | None
    paired: bool = False


class _Missing(Exception):
    """The figure cannot be computed; the text says why."""


def judge(
    gates: Iterable[GateSpec],
    evaluations: Mapping[str, Evaluation],
    leaves: Sequence[str],
    spec: EvaluateSpec,
    seed: int,
) -> list[Verdict]:
    """The verdict on each gate, for each step it applies to.

    A limit is judged by the interval at ``spec.confidence``: on the right side throughout it is passed, on the wrong
    side throughout failed, and inconclusive where the interval straddles the limit. A value equal to the limit holds.
    A drop or gain resamples both artifacts with the same draws where both scored the same examples.

    Args:
        gates: of the spec.
        evaluations: by step id, the baseline and every ``relative_to`` among them.
        leaves: the final steps; a gate without a step is on each that has the metric.
        spec: resamples and confidence.
        seed: of the draws; every gate has its own stream, so the order of gates changes nothing.
    """
    verdicts = []
    for gate in gates:
        for step in [gate.step] if gate.step is not None else _steps(gate, evaluations, leaves):
            verdicts.append(_judge_one(gate, step, evaluations, spec, seed))
    return verdicts


def overall(verdicts: Iterable[Verdict]) -> Literal["passed", "failed", "inconclusive"]:
    """What all verdicts together say; no gates at all is passed."""
    found = {verdict.status for verdict in verdicts}
    if found & {"failed", "missing"}:
        return "failed"
    return "inconclusive" if "inconclusive" in found else "passed"


def _steps(gate: GateSpec, evaluations: Mapping[str, Evaluation], leaves: Sequence[str]) -> Sequence[str]:
    """Final steps that have the metric, or ought to; one that was not evaluated ought to."""
    metric = METRICS[gate.metric]
    return [leaf for leaf in leaves if leaf not in evaluations or _ought(metric, evaluations[leaf])] or leaves[-1:]


def _ought(metric: Metric, evaluation: Evaluation) -> bool:
    kind = evaluation.record.get("kind")
    applies = {
        "any": True,
        "model": kind in ("model", "swapped", "packed"),
        "derived": kind in ("packed", "export"),
        "npu": bool(evaluation.record.get("npu")),
    }
    return metric.name in evaluation.metrics or applies[metric.of]


def _judge_one(
    gate: GateSpec, step: str, evaluations: Mapping[str, Evaluation], spec: EvaluateSpec, seed: int
) -> Verdict:
    metric, limit = METRICS[gate.metric], gate.limit.number
    unit = {"drop": gate.limit.unit or metric.unit, "gain": "x"}.get(gate.form, metric.unit)
    stream = (seed * 1_000_003 + crc32(f"{gate}|{step}".encode())) % 2**63
    try:
        figure = _figure(gate, metric, step, evaluations, spec, stream)
    except _Missing as reason:
        message = f"{step}: {gate}: {reason}, so the gate fails"
        return Verdict(str(gate), step, gate.metric, unit, None, None, None, limit, None, "missing", False, message)
    upper = gate.form in ("at_most", "drop")
    status = _status(figure, limit, upper=upper)
    margin = limit - figure.value if upper else figure.value - limit
    low, high = figure.bounds if figure.bounds is not None else (None, None)
    what = {"drop": "drop of ", "gain": "gain in "}.get(gate.form, "")
    measured = shown(gate.metric, unit, figure.value)
    if low is not None and high is not None:
        measured += f" [{shown(gate.metric, unit, low)}, {shown(gate.metric, unit, high)}]"
    verb = {"passed": "holds", "failed": "does not hold", "inconclusive": "is inconclusive"}[status]
    message = f"{step}: {gate} {verb}: {what}{gate.metric} is {measured}"
    if status == "inconclusive":
        message += "; the interval straddles the limit: evaluate on more examples, or move the limit"
    return Verdict(
        str(gate), step, gate.metric, unit, figure.value, low, high, limit, margin, status, figure.paired, message
    )


def _status(figure: _Figure, limit: float, *, upper: bool) -> Status:
    slack = 1e-9 * max(1.0, abs(limit))  # 0.5 - 0.485 is a little more than 0.015
    low, high = figure.bounds if figure.bounds is not None else (figure.value, figure.value)
    if not upper:
        low, high, limit = -high, -low, -limit
    if high <= limit + slack:
        return "passed"
    return "failed" if low > limit + slack else "inconclusive"


def _figure(
    gate: GateSpec,
    metric: Metric,
    step: str,
    evaluations: Mapping[str, Evaluation],
    spec: EvaluateSpec,
    seed: int,
) -> _Figure:
    mine = _evaluated(step, evaluations)
    value, bounds = _entry(mine, step, metric)
    if gate.form in ("at_least", "at_most"):
        return _Figure(value, bounds)
    theirs = _evaluated(gate.relative_to, evaluations)
    reference, reference_bounds = _entry(theirs, gate.relative_to, metric)

    def compare(value: Any, reference: Any) -> Any:
        return _compare(gate, metric, value, reference)

    figure = float(compare(np.float64(value), np.float64(reference)))
    if not math.isfinite(figure):
        raise _Missing(f"{gate.form} is undefined, as {metric.name} of {gate.relative_to} is {reference:g}")
    if mine.path == theirs.path:
        return _Figure(figure, (figure, figure), paired=True)
    resampled = _resampled(metric, mine, theirs, spec, seed)
    if resampled is not None:
        values, references, paired = resampled
        found = bootstrap.interval(compare(values, references), spec.confidence)
        if found is None:
            raise _Missing(f"{gate.form} of {metric.name} is undefined in some resamples")
        return _Figure(figure, found, paired)
    if bounds is None and reference_bounds is None:
        return _Figure(figure, None)
    # Only the ends of the intervals are known: the worst of their combinations is wider than need be, never too narrow.
    ends = [
        float(compare(np.float64(one), np.float64(other)))
        for one in bounds or (value,)
        for other in reference_bounds or (reference,)
    ]
    return _Figure(figure, (min(ends), max(ends)))


def _compare(gate: GateSpec, metric: Metric, value: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The drop in points or per cent, or the gain as a factor; arrays or scalars."""
    higher = metric.better == "higher"
    with np.errstate(divide="ignore", invalid="ignore"):
        if gate.form == "gain":
            return value / reference if higher else reference / value
        worse = reference - value if higher else value - reference
        scale = {"points": points(metric) or math.nan, "": 1.0}
        return worse * scale[gate.limit.unit] if gate.limit.unit in scale else worse / np.abs(reference) * 100


def _evaluated(step: str, evaluations: Mapping[str, Evaluation]) -> Evaluation:
    if step not in evaluations:
        raise _Missing(f"{step} was not evaluated")
    return evaluations[step]


def _entry(evaluation: Evaluation, step: str, metric: Metric) -> tuple[float, tuple[float, float] | None]:
    entry = evaluation.metrics.get(metric.name)
    if entry is None:
        raise _Missing(f"{step} has no {metric.name}")
    value, low, high = entry.get("value"), entry.get("low"), entry.get("high")
    if value is None or not math.isfinite(value):
        raise _Missing(f"{metric.name} of {step} is not a finite number")
    if low is not None and high is not None:
        return value, (low, high)
    if metric.quality:
        raise _Missing(f"{metric.name} of {step} has no interval, as there are too few examples")
    return value, None


def _resampled(
    metric: Metric, mine: Evaluation, theirs: Evaluation, spec: EvaluateSpec, seed: int
) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """Replicates of the metric on both sides, and whether they share their draws; None where nothing was sampled."""
    one, other = (_sample(metric, side) for side in (mine, theirs))
    if one is None or other is None or not one.size or not other.size:
        return None
    paired = one.same_units(other)
    values = bootstrap.replicates(one.statistics[metric.name], one.size, spec.bootstrap, seed)
    references = bootstrap.replicates(
        other.statistics[metric.name], other.size, spec.bootstrap, seed if paired else seed + 1
    )
    return values, references, paired


def _sample(metric: Metric, evaluation: Evaluation) -> scores.Sample | None:
    if not metric.quality:
        return speed.sampled(metric.name, evaluation.record)
    kept = scores.read(evaluation.path)
    sample = quality.sample(kept) if kept is not None else None
    return sample if sample is not None and metric.name in sample.statistics else None
