"""Latency, throughput, the speed of writing, and peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.evaluate import bootstrap
from tasks.evaluate.scores import Sample, metric

PERCENTILES = {"latency_p50": 0.5, "latency_p90": 0.9, "latency_p99": 0.99}
FEWEST_BEYOND = 5
"""An interval of a percentile needs so many samples beyond it: 10 for the median, 50 for p90, 500 for p99."""
FEWEST_INPUTS = 2 * FEWEST_BEYOND
"""An interval of the speed of writing needs so many inputs."""


def time_calls(calls: Sequence[Callable[[], object]], *, warmup: int, repeats: int) -> np.ndarray:
    """Seconds of each of ``repeats`` calls, float [repeats], after ``warmup`` calls that are not counted.

    The calls are taken in turn, and again from the first. Each must return only when its work is done (on a GPU:
    synchronise).
    """
    for index in range(warmup):
        calls[index % len(calls)]()
    return np.array([_timed(calls[index % len(calls)])[0] for index in range(repeats)])


@dataclass(frozen=True)
class Written:
    """The speed of writing, one input after the other.

    Args:
        first: seconds from each input to its first token, [n].
        whole: seconds from each input to its last token, [n].
        tokens: tokens that were written, [n].
        audio: seconds of audio of each input, [n]; empty where the inputs are text.
        inputs: a number for each input, by which two measurements know that they had the same.
        what: what was written, in words.
    """

    first: Sequence[float]
    whole: Sequence[float]
    tokens: Sequence[int]
    audio: Sequence[float]
    inputs: Sequence[int]
    what: str = ""

    def sample(self) -> Sample:
        """The metrics of writing as figures of a resample of the inputs."""
        first, whole, tokens, audio = (
            np.asarray(column, np.float64) for column in (self.first, self.whole, self.tokens, self.audio)
        )
        statistics = {
            "time_to_first_token": bootstrap.quantile(first, 0.5),
            "tokens_per_second": bootstrap.ratio_of_sums(tokens, whole),
        }
        if len(audio):
            statistics["real_time_factor"] = bootstrap.ratio_of_sums(whole, audio)
        return Sample("inputs", len(first), statistics, (np.asarray(self.inputs),))

    def metrics(self, *, resamples: int, confidence: float, seed: int) -> dict[str, dict[str, Any]]:
        """The metrics with their intervals, without where the inputs are too few."""
        sample = self.sample()
        if sample.size >= FEWEST_INPUTS:
            return sample.metrics(resamples=resamples, confidence=confidence, seed=seed)
        return {name: metric(sample.value(name), n=sample.size) for name in sample.statistics}


def time_writing(
    inputs: Sequence[Callable[[int], int]],
    limit: int,
    what: str,
    *,
    at_once: bool,
    audio: Sequence[float],
    ids: Sequence[int],
) -> Written:
    """Time how each input is written from, alone, after one that is not counted.

    Args:
        inputs: for each input a call that writes so many tokens at most and says how many it wrote.
        limit: tokens to write at most.
        what: is written, in words.
        at_once: whether all tokens come at the same time, as with CTC.
        audio: seconds of audio of each input; empty where the inputs are text.
        ids: a number for each input.
    """
    inputs[0](limit)
    first, whole, tokens = [], [], []
    for call in inputs:
        started = [] if at_once else [_timed(lambda call=call: call(1))[0]]
        seconds, count = _timed(lambda call=call: call(limit))
        first.append((started or [seconds])[0])
        whole.append(seconds)
        tokens.append(count)
    return Written(first, whole, tokens, audio, ids, what)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter_ns()
    result = call()
    return (time.perf_counter_ns() - start) / 1e9, result


def metrics(
    seconds: np.ndarray, batch: int, *, resamples: int, confidence: float, seed: int
) -> dict[str, dict[str, Any]]:
    """p50, p90 and p99 in seconds, and the throughput (batch over p50, examples a second), with intervals."""
    found = {}
    for name, share in PERCENTILES.items():
        calls = _calls(name, seconds, ())
        values = None if calls is None else bootstrap.replicates(calls.statistics[name], calls.size, resamples, seed)
        bounds = None if values is None else bootstrap.interval(values, confidence)
        found[name] = metric(float(np.quantile(seconds, share)), bounds, n=len(seconds))
    median = found["latency_p50"]
    bounds = None if median["low"] is None else (batch / median["high"], batch / median["low"])
    found["throughput"] = metric(batch / median["value"], bounds, n=len(seconds))
    return found


def sampled(name: str, record: Mapping[str, Any]) -> Sample | None:
    """The calls or inputs of an evaluation's record that a speed was measured on; None where they are too few to say
    how sure it is, or none were kept."""
    if name in PERCENTILES:
        return _calls(name, np.asarray(record.get("latency_samples", ()), float), record.get("latency_inputs", ()))
    kept = record.get("writing_samples")
    sample = Written(**kept).sample() if kept else None
    enough = sample is not None and name in sample.statistics and sample.size >= FEWEST_INPUTS
    return sample if enough else None


def _calls(name: str, seconds: np.ndarray, inputs: Sequence[int]) -> Sample | None:
    share = PERCENTILES[name]
    if (1 - share) * len(seconds) < FEWEST_BEYOND - 1e-9:
        return None
    identity = (np.asarray(inputs),) if len(inputs) else ()
    return Sample("calls", len(seconds), {name: bootstrap.quantile(seconds, share)}, identity)
