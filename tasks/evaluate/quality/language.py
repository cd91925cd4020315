"""Text-generation: the likelihood of every token of the evaluation texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from tasks.evaluate import bootstrap
from tasks.evaluate.quality.batches import by_length, padded
from tasks.evaluate.runners import Runner
from tasks.evaluate.scores import Sample, Scores
from tasks.evaluate.subject import Scored, Subject

MARK = "nll"
"""The column that only the scores of this application have."""

FEWEST_DOCUMENTS = 10
"""Below so many documents an interval from resampled documents is far too narrow; windows are resampled instead."""

PROMPTS = 10
"""Texts that are continued, to show what the model writes."""

_LOGITS_BYTES = 256 << 20
"""The logits of one batch stay below this; a large vocabulary shrinks the batch."""


@dataclass(frozen=True)
class Segment:
    """Tokens ``start`` to ``end`` of one row."""

    row: int
    start: int
    end: int


def windows(count: np.ndarray, limit: int | None) -> list[Segment]:
    """Rows cut into segments of at most ``limit`` tokens.

    Neighbours share one token, which is context only, so every token but a row's first is scored exactly once.
    """
    if limit is not None and limit < 2:
        return []
    found = []
    for row, tokens in enumerate(count.tolist()):
        step = (tokens or 1) if limit is None else limit - 1
        found += [Segment(row, start, min(start + step + 1, tokens)) for start in range(0, max(tokens - 1, 0), step)]
    return found


def score(subject: Subject) -> Scored:
    """``nll`` (nats, summed over a window), ``tokens``, ``bytes`` and ``document`` of each window, [N]."""
    runner, rows = cast(Runner, subject.runner), subject.rows
    count = rows.lengths()
    segments = windows(count, runner.length)
    nll, tokens = np.zeros(len(count)), np.zeros(len(count), np.int64)
    fits = _LOGITS_BYTES // (4 * max(runner.vocabulary, 1) * int(count.max(initial=1)))
    size = runner.batch or max(1, min(subject.spec.batch_size, fits))
    done = 0
    for batch in by_length(np.array([segment.end - segment.start for segment in segments], np.int64), size):
        chosen = [segments[index] for index in batch]
        pieces = [np.asarray(rows.input_ids[segment.row, segment.start : segment.end]) for segment in chosen]
        sums = runner.nll(*padded(pieces, runner, subject.text.pad))[: len(batch)]
        for segment, total in zip(chosen, sums, strict=True):
            nll[segment.row] += total
            tokens[segment.row] += segment.end - segment.start - 1
        done += len(batch)
        subject.progress(done, len(segments))
    scores = {
        "nll": nll,
        "tokens": tokens,
        "bytes": np.asarray(rows.text_bytes, np.int64),
        "document": np.asarray(rows.document, np.int32),
    }
    return Scored(scores, _continuations(subject, runner), {"scored_tokens": int(tokens.sum())})


def sample(scores: Scores) -> Sample:
    """Documents, as the windows of one are not independent; windows where the documents are few."""
    document = scores["document"]
    columns = {name: np.asarray(scores[name], np.float64) for name in ("nll", "tokens", "bytes")}
    numbers, group = np.unique(document, return_inverse=True)
    whole = len(numbers) >= FEWEST_DOCUMENTS
    if whole:
        columns = {name: np.bincount(group, weights=column) for name, column in columns.items()}
    mean = bootstrap.ratio_of_sums(columns["nll"], columns["tokens"])
    statistics = {
        "perplexity": lambda indices: _exp(mean(indices)),
        "bits_per_byte": bootstrap.ratio_of_sums(columns["nll"] / math.log(2), columns["bytes"]),
    }
    return Sample("documents" if whole else "windows", len(columns["nll"]), statistics, (document,))


def room(subject: Subject) -> tuple[int, int]:
    """Tokens of a prompt and tokens to write after it: as the spec says, or as many as the artifact has positions."""
    prompt, limit = subject.spec.generation.prompt, subject.limit
    most = subject.runner.positions if isinstance(subject.runner, Runner) else None
    if most is not None and prompt + limit > most:
        prompt = max(1, min(prompt, most // 2))
        limit = max(1, min(limit, most - prompt))
    return prompt, limit


def _continuations(subject: Subject, runner: Runner) -> list[dict[str, Any]]:
    """The first texts, and what the model writes after their first tokens."""
    rows, counts = subject.rows, subject.rows.lengths()
    length, limit = room(subject)
    starts = np.flatnonzero(np.diff(np.asarray(rows.document), prepend=-1))[:PROMPTS]
    found = []
    for row in starts.tolist():
        prompt = np.asarray(rows.input_ids[row, : min(length, max(1, counts[row] - 1))], np.int32)
        output = runner.generate(prompt, limit, subject.text.eos)
        expected = rows.input_ids[row, len(prompt) : min(len(prompt) + limit, counts[row])].tolist()
        texts = (subject.read(ids) for ids in (prompt.tolist(), expected, output))
        found.append(dict(zip(("input", "expected", "output"), texts, strict=True)))
    return found


def _exp(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(values)
