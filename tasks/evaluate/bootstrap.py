"""Percentile bootstrap: intervals of a figure that was computed from a sample.

Efron, "Bootstrap methods: another look at the jackknife" (1979); paired use as in Koehn, "Statistical significance
tests for machine translation evaluation" (2004): two systems are resampled with the same draws, so that what both find
hard cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""Takes draws, int [B, n] of indices into the sample, and gives the figure of each resample, float [B]."""

_CHUNK = 2_000_000
"""Indices drawn at a time; bounds the memory, and shapes the stream of draws, so it is a constant."""


def draws(units: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of ``resamples`` resamples with replacement, in chunks int [b, units]; the same seed, the same draws."""
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // max(units, 1))
    for start in range(0, resamples, rows):
        yield generator.integers(0, units, size=(min(rows, resamples - start), units))


def replicates(statistic: Statistic, units: int, resamples: int, seed: int) -> np.ndarray:
    """The figure of every resample, float [resamples]."""
    if units < 1:
        return np.full(resamples, np.nan)
    return np.concatenate([statistic(chunk) for chunk in draws(units, resamples, seed)])


def interval(values: np.ndarray, confidence: float) -> tuple[float, float] | None:
    """The central ``confidence`` of the replicates; None where a replicate is no number."""
    if values.size == 0 or not np.isfinite(values).all():
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)


def ratio_of_sums(numerator: np.ndarray, denominator: np.ndarray) -> Statistic:
    """Sum of one column over the sum of another; both float [n]."""

    def statistic(indices: np.ndarray) -> np.ndarray:
        below = denominator[indices].sum(1)
        return np.divide(numerator[indices].sum(1), below, out=np.full(len(indices), np.nan), where=below > 0)

    return statistic


def quantile(sample: np.ndarray, share: float) -> Statistic:
    """The ``share`` quantile of a sample, float [n]."""
    return lambda indices: np.quantile(sample[indices], share, axis=1)


def of_sums(columns: np.ndarray, figure: Callable[[np.ndarray], np.ndarray]) -> Statistic:
    """A figure that follows from sums over the sample.

    Args:
        columns: what is summed, float or int [n, k]; sums of integers, and of float32, come out exact.
        figure: sums [B, k] to the figure of each resample [B].
    """
    values = np.asarray(columns, np.float64)

    def statistic(indices: np.ndarray) -> np.ndarray:
        return figure(_counts(indices, len(values)) @ values)

    return statistic


def macro_f1(predicted: np.ndarray, label: np.ndarray) -> Statistic:
    """F1 averaged over the classes that occur among predictions or labels; both int [n], not negative.

    As scikit-learn's ``f1_score(average="macro")``: a class without a true positive counts as 0.
    """
    classes = int(max(predicted.max(initial=0), label.max(initial=0))) + 1

    def statistic(indices: np.ndarray) -> np.ndarray:
        guess, truth = predicted[indices], label[indices]
        both = _counts(guess, classes) + _counts(truth, classes)
        return _macro_f1(_counts(truth, classes, guess == truth), both)

    return statistic


def macro_f1_of_labels(predicted: np.ndarray, label: np.ndarray) -> Statistic:
    """F1 averaged over the labels of a multi-label problem that occur; both 0 or 1, int [n, c].

    As scikit-learn's ``f1_score(average="macro", zero_division=0)`` where every label occurs in the resample.
    """
    classes = predicted.shape[1]
    columns = np.concatenate([predicted & label, predicted + label], axis=1)
    return of_sums(columns, lambda sums: _macro_f1(sums[:, :classes], sums[:, classes:]))


def matthews(predicted: np.ndarray, label: np.ndarray) -> Statistic:
    """Matthews correlation coefficient of all classes; both int [n], not negative.

    As scikit-learn's ``matthews_corrcoef`` (Gorodkin, "Comparing two K-category assignments by a K-category correlation
    coefficient", 2004): 0 where the predictions or the labels are all of one class.
    """
    classes = int(max(predicted.max(initial=0), label.max(initial=0))) + 1

    def statistic(indices: np.ndarray) -> np.ndarray:
        guess, truth = predicted[indices], label[indices]
        total = float(indices.shape[1])
        hits = (guess == truth).sum(1)
        of_guess, of_truth = _counts(guess, classes), _counts(truth, classes)
        return _correlation(
            hits * total - (of_guess * of_truth).sum(1),
            total**2 - np.square(of_guess).sum(1),
            total**2 - np.square(of_truth).sum(1),
        )

    return statistic


def matthews_of_labels(predicted: np.ndarray, label: np.ndarray) -> Statistic:
    """Matthews correlation coefficient of all decisions of a multi-label problem, each label of each example one
    decision; both 0 or 1, int [n, c]."""
    columns = np.stack([(predicted & label).sum(1), predicted.sum(1), label.sum(1)], axis=1)
    decisions = predicted.shape[1]

    def figure(sums: np.ndarray) -> np.ndarray:
        both, guessed, true = sums.T
        total = float(len(predicted) * decisions)
        return _correlation(total * both - guessed * true, guessed * (total - guessed), true * (total - true))

    return of_sums(columns, figure)


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> Statistic:
    """Expected calibration error: the mean of |accuracy - confidence| over bins of equal width, weighed by their size.

    Guo et al., "On calibration of modern neural networks" (2017).

    Args:
        confidence: the probability of each decision, 0 to 1, [n] or [n, c]; a bin holds its upper edge.
        correct: whether the decision is right, of the same shape.
        bins: how many.
    """
    shares = confidence.reshape(len(confidence), -1)
    right = correct.reshape(shares.shape).astype(np.float64)
    place = np.clip(np.ceil(shares.astype(np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.zeros((len(shares), bins))
    np.add.at(gap, (np.arange(len(shares))[:, None], place), right - shares)
    return of_sums(gap, lambda sums: np.abs(sums).sum(1) / shares.size)


def _counts(values: np.ndarray, kinds: int, kept: np.ndarray | None = None) -> np.ndarray:
    """How often each of ``kinds`` numbers stands in each row of ``values`` [B, n], where ``kept``; float [B, kinds]."""
    flat = (values + kinds * np.arange(len(values))[:, None]).ravel()
    weights = None if kept is None else kept.ravel().astype(np.float64)
    found = np.bincount(flat, weights=weights, minlength=len(values) * kinds)
    return found.reshape(len(values), kinds).astype(np.float64)


def _macro_f1(hits: np.ndarray, both: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur, from true positives and predictions plus labels of each class, [B, c]."""
    scores = np.divide(2 * hits, both, out=np.zeros(hits.shape), where=both > 0)
    return scores.sum(1) / np.maximum((both > 0).sum(1), 1)


def _correlation(covariance: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    product = one * other
    return np.divide(covariance, np.sqrt(product), out=np.zeros(len(covariance)), where=product > 0)
