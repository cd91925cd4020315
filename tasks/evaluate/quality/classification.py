"""Text-classification: what is predicted, and how sure of it the model is."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from tasks.data.encoded import Encoded
from tasks.evaluate import bootstrap
from tasks.evaluate.quality.batches import by_length, cut, padded
from tasks.evaluate.runners import Runner
from tasks.evaluate.scores import Sample, Scores
from tasks.evaluate.subject import Scored, Subject

MARK = "label"
"""The column that only the scores of this application have."""

OUTPUTS = 1000
"""Examples whose outputs are kept as text."""


def score(subject: Subject) -> Scored:
    """``correct``, ``predicted``, ``label`` and ``probability`` of each document.

    The probabilities of the windows of a document are averaged. With one label a document they are ``[N]``, and the
    probability is that of the prediction; with several each is ``[N, C]`` but ``correct``, which asks for all of them,
    and the probability is that of the label.
    """
    runner, rows = cast(Runner, subject.runner), subject.rows
    labels = np.asarray(rows.labels, np.int32)
    several = labels.ndim == 2
    shares = _shares(subject, runner, several)
    _, first, group = np.unique(np.asarray(rows.document), return_index=True, return_inverse=True)
    windows = np.bincount(group)
    averaged = np.zeros((len(first), shares.shape[1]))
    np.add.at(averaged, group, shares)
    averaged /= windows[:, None]
    labels = labels[first]
    if several:
        predicted = (averaged > 0.5).astype(np.int32)
        correct = (predicted == labels).all(1) & np.isfinite(averaged).all(1)
        probability = averaged
    else:
        predicted = np.where(np.isfinite(averaged), averaged, -1).argmax(1).astype(np.int32)
        probability = averaged.max(1)
        correct = (predicted == labels) & np.isfinite(probability)
    scores = {
        "correct": correct.astype(np.uint8),
        "predicted": predicted,
        "label": labels,
        "probability": probability.astype(np.float32),
    }
    facts = {"documents": len(first)} if len(first) < len(rows) else {}
    return Scored(scores, _outputs(subject, scores, first, windows), facts)


def sample(scores: Scores) -> Sample:
    """Documents are resampled; the Matthews coefficient and the calibration of several labels are of all decisions."""
    predicted, label = scores["predicted"].astype(np.int64), scores["label"].astype(np.int64)
    probability, correct = scores["probability"], scores["correct"]
    if label.ndim == 2:
        f1, mcc = bootstrap.macro_f1_of_labels(predicted, label), bootstrap.matthews_of_labels(predicted, label)
        probability, right = np.maximum(probability, 1 - probability), predicted == label
    else:
        f1, mcc, right = bootstrap.macro_f1(predicted, label), bootstrap.matthews(predicted, label), correct
    statistics = {
        "accuracy": bootstrap.ratio_of_sums(correct.astype(np.float64), np.ones(len(correct))),
        "f1": f1,
        "mcc": mcc,
        "calibration_error": bootstrap.calibration_error(probability, right),
    }
    return Sample("examples", len(label), statistics, (label,))


def _shares(subject: Subject, runner: Runner, several: bool) -> np.ndarray:
    """The probability of each class in each row, float64 [N, C]."""
    rows, total = subject.rows, len(subject.rows)
    tokens_of = cut(rows, runner.length)
    shares = np.zeros((total, 0))
    done = 0
    for batch in by_length(rows.lengths(), runner.batch or subject.spec.batch_size):
        ids, mask = padded([tokens_of(int(row)) for row in batch], runner, subject.text.pad)
        logits = runner.logits(ids, mask)[: len(batch)].astype(np.float64)
        if not done:
            shares = np.full((total, logits.shape[1]), np.nan)
        shares[batch] = _sigmoid(logits) if several else _softmax(logits)
        done += len(batch)
        subject.progress(done, total)
    return shares


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * logits))


def _outputs(subject: Subject, scores: Scores, first: np.ndarray, windows: np.ndarray) -> list[dict[str, Any]]:
    rows, counts = subject.rows, subject.rows.lengths()
    found = []
    for place, row in enumerate(first[:OUTPUTS].tolist()):
        text = subject.read([int(token) for token in rows.input_ids[row, : counts[row]]])
        one: dict[str, Any] = {
            "input": text if windows[place] == 1 else f"{text} …",
            "expected": _name(rows, scores["label"][place]),
            "output": _name(rows, scores["predicted"][place]),
        }
        if scores["probability"].ndim == 1:
            probability = float(scores["probability"][place])
            one["probability"] = round(probability, 4) if np.isfinite(probability) else None
        found.append(one)
    return found


def _name(rows: Encoded, value: np.ndarray) -> str:
    """The name of a class number, or of the labels that are set."""
    numbers = np.flatnonzero(value).tolist() if value.ndim else [int(value)]
    names = [rows.label_names[number] if number < len(rows.label_names) else str(number) for number in numbers]
    return ", ".join(names) or "none"
