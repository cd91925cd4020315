"""What translation and speech recognition share: inputs go in, text comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from zlib import crc32

import numpy as np

from tasks.evaluate.quality.batches import by_length, source
from tasks.evaluate.runners import Writer
from tasks.evaluate.subject import Subject

OUTPUTS = 1000
"""Examples whose outputs are kept as text."""


def write(subject: Subject) -> list[list[int]]:
    """Token ids that the artifact writes for each example, greedily, in the order of the examples."""
    runner, rows = cast(Writer, subject.runner), subject.rows
    written: list[list[int]] = [[] for _ in range(len(rows))]
    done = 0
    for batch in by_length(rows.lengths(), runner.batch or subject.spec.batch_size):
        found = runner.write(source(rows, batch, runner.length), subject.limit)
        for row, ids in zip(batch.tolist(), found, strict=True):
            written[row] = ids
        done += len(batch)
        subject.progress(done, len(rows))
    return written


def outputs(inputs: Sequence[str], references: Sequence[str], written: Sequence[str]) -> list[dict[str, Any]]:
    """``input``, ``expected`` and ``output`` of the first examples."""
    rows = zip(inputs[:OUTPUTS], references[:OUTPUTS], written[:OUTPUTS], strict=True)
    return [{"input": before, "expected": reference, "output": after} for before, reference, after in rows]


def identity(texts: Sequence[str]) -> np.ndarray:
    """A number for each text, uint32 [N], by which two evaluations know that they had the same examples."""
    return np.array([crc32(text.encode("utf-8", "surrogatepass")) for text in texts], np.uint32)
