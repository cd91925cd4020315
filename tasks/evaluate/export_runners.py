"""Exported files in their own runtimes; nothing of torch is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tasks.data.encoded import Encoded
from tasks.evaluate.runners import Inputs, Runner, Writer


def open_file(path: Path, threads: int) -> Runner | Writer:
    """The exported file, as what its inputs say that it is."""
    from tasks.export.runtime import open_export

    model = open_export(path, threads)
    return ExportWriter(model) if hasattr(model, "write") else ExportRunner(model)


class ExportRunner:
    """A classifier or a scorer of text."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.batch: int | None = model.batch
        self.length: int | None = model.length
        self.positions: int | None = model.positions
        self.rescores: bool = model.rescores
        # A file of fixed shape makes the same of every batch; else it is the caller who says how much there is.
        self.vocabulary: int = 0 if model.batch else model.vocab or 0

    def logits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.asarray(self.model.run(ids, mask), np.float32)

    def nll(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        logits = self.logits(ids, mask)
        return np.array([_row_nll(logits[row], ids[row], int(mask[row].sum())) for row in range(len(ids))])

    def generate(self, prompt: np.ndarray, limit: int, eos: int | None) -> list[int]:
        return self.model.generate(prompt.tolist(), limit, eos)

    def caller(self, ids: np.ndarray, mask: np.ndarray) -> Callable[[], object]:
        return lambda: self.model.run(ids, mask)


class ExportWriter:
    """An encoder-decoder, or a model for CTC."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.batch: int | None = model.batch
        self.length: int | None = model.length
        self.positions: int | None = model.positions
        self.target_length: int | None = model.target_length
        self.at_once: bool = model.at_once

    def write(self, inputs: Inputs, limit: int) -> list[list[int]]:
        return self.model.write(dict(inputs), limit)

    def logits(self, inputs: Inputs, decoder_ids: np.ndarray | None) -> np.ndarray:
        given = (dict(inputs),) if decoder_ids is None else (dict(inputs), decoder_ids)
        return np.asarray(self.model.logits(*given), np.float32)

    def decoder_ids(self, rows: Encoded, chosen: np.ndarray) -> np.ndarray | None:
        return None


def _row_nll(logits: np.ndarray, ids: np.ndarray, end: int) -> float:
    """Nats of ``ids[1:end]`` under ``logits`` [L, V]."""
    if end < 2:
        return 0.0
    scores = logits[: end - 1].astype(np.float64)
    top = scores.max(1, keepdims=True)
    normaliser = top[:, 0] + np.log(np.exp(scores - top).sum(1))
    return float((normaliser - scores[np.arange(end - 1), ids[1:end]]).sum())
