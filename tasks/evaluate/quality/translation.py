"""Translation: BLEU and chrF++ of what the model writes, by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from tasks.evaluate import bootstrap
from tasks.evaluate.quality.written import identity, outputs, write
from tasks.evaluate.scores import Sample, Scores
from tasks.evaluate.subject import Scored, Subject

MARK = "bleu"
"""The column that only the scores of this application have."""

_ORDERS = 4
_CHRF_BETA = 2


def score(subject: Subject) -> Scored:
    """The statistics of each sentence from which sacrebleu computes the scores of a corpus, and who is who.

    ``bleu`` int64 [N, 10]: tokens of the translation and of the reference, then matches and n-grams of each order up to
    4; ``chrf`` int64 [N, 24]: n-grams of the translation, of the reference and matches for six orders of characters and
    two of words; ``reference`` uint32 [N].
    """
    translations = [subject.read_written(ids) for ids in write(subject)]
    references = list(subject.rows.references)
    kept = outputs(_sources(subject), references, translations)
    return Scored(
        statistics(translations, references) | {"reference": identity(references)},
        kept,
        {"signatures": {name: metric.get_signature().format() for name, metric in _metrics().items()}},
    )


def statistics(translations: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """``bleu`` and ``chrf``, the sums over a corpus being what its score follows from."""
    return {
        name: np.array(metric._extract_corpus_statistics(translations, [references]), np.int64)
        for name, metric in _metrics().items()
    }


def sample(scores: Scores) -> Sample:
    """Sentences are resampled; a resample's score is that of the corpus, from the summed statistics."""
    bleu, chrf = scores["bleu"], scores["chrf"]
    statistics = {
        "bleu": bootstrap.of_sums(bleu, corpus_bleu),
        "chrf": bootstrap.of_sums(chrf, corpus_chrf),
        "length_ratio": bootstrap.ratio_of_sums(bleu[:, 0].astype(np.float64), bleu[:, 1].astype(np.float64)),
    }
    return Sample("sentences", len(bleu), statistics, (scores["reference"],))


def corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU with exponential smoothing, as sacrebleu's ``BLEU.compute_bleu``, of many corpora at once.

    Args:
        sums: the summed statistics of each corpus, [B, 10].

    Returns:
        float [B], 0 to 100.
    """
    hypothesis, reference = sums[:, 0], sums[:, 1]
    correct, total = sums[:, 2 : 2 + _ORDERS], sums[:, 2 + _ORDERS :]
    zeros = np.cumsum(correct == 0, axis=1)
    matches = np.where(correct == 0, 0.5**zeros, correct)
    with np.errstate(divide="ignore", invalid="ignore"):
        penalty = np.where(hypothesis < reference, np.exp(1 - reference / hypothesis), 1.0)
        precision = np.exp(np.log(100.0 * matches / total).mean(axis=1))
    defined = (correct > 0).any(axis=1) & (total > 0).all(axis=1)
    return np.where(defined, penalty * precision, 0.0)


def corpus_chrf(sums: np.ndarray) -> np.ndarray:
    """chrF++ with the effective order, as sacrebleu's ``CHRF``, of many corpora at once.

    Args:
        sums: the summed statistics of each corpus, [B, 24].

    Returns:
        float [B], 0 to 100.
    """
    hypothesis, reference, match = sums.reshape(len(sums), -1, 3).transpose(2, 0, 1)
    counted = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(counted.sum(axis=1), 1)
    precision, recall = (
        np.divide(match, below, out=np.zeros(match.shape), where=counted).sum(axis=1) / orders
        for below in (hypothesis, reference)
    )
    factor = _CHRF_BETA**2
    below = factor * precision + recall
    return 100 * np.divide((1 + factor) * precision * recall, below, out=np.zeros(len(sums)), where=below > 0)


@cache
def _metrics() -> dict[str, Any]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return {"bleu": BLEU(tokenize="13a"), "chrf": CHRF(word_order=2, beta=_CHRF_BETA)}


def _sources(subject: Subject) -> list[str]:
    rows, counts = subject.rows, subject.rows.lengths()
    return [subject.read(rows.input_ids[row, : counts[row]].tolist()) for row in range(len(rows))]
