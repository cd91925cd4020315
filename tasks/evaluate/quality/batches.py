"""How examples are put together into the inputs of one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from tasks.data.collate import collate
from tasks.data.encoded import Encoded
from tasks.evaluate.runners import Runner


def by_length(tokens: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Indices in batches of ``size``, long with long, so that little is padded."""
    order = np.argsort(-tokens, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def padded(pieces: list[np.ndarray], runner: Runner, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int [B, L]: padded on the right to the longest, or to an export's fixed shape."""
    count = runner.batch or len(pieces)
    width = runner.length or max(len(piece) for piece in pieces)
    ids = np.full((count, width), pad, np.int32)
    mask = np.zeros((count, width), np.int32)
    for row in range(count):
        piece = pieces[min(row, len(pieces) - 1)]  # a row to spare repeats the last one; an empty mask may give NaN
        ids[row, : len(piece)] = piece
        mask[row, : len(piece)] = 1
    return ids, mask


def cut(rows: Encoded, limit: int | None) -> Callable[[int], np.ndarray]:
    """How the text of a row is shortened to ``limit`` tokens: row number to token ids.

    A last token that all rows share is the tokenizer's end mark and is kept, as truncation by the tokenizer would.
    """
    count = rows.lengths()
    marked = _end_mark(rows) is not None

    def tokens_of(row: int) -> np.ndarray:
        ids = np.asarray(rows.input_ids[row, : count[row]])
        if limit is None or len(ids) <= limit:
            return ids
        return np.append(ids[: limit - 1], ids[-1]) if marked and limit > 1 else ids[:limit]

    return tokens_of


def source(rows: Encoded, chosen: np.ndarray, limit: int | None) -> dict[str, np.ndarray]:
    """The inputs of the examples ``chosen`` without what is to be written; what an export has no room for is cut."""
    inputs = {name: array for name, array in collate(rows, chosen).items() if name != "labels"}
    if limit is None or all(array.shape[-1] <= limit for array in inputs.values()):
        return inputs
    short = {name: np.ascontiguousarray(array[..., :limit]) for name, array in inputs.items()}
    mark = _end_mark(rows) if "input_ids" in inputs and limit > 1 else None
    if mark is not None:
        short["input_ids"][rows.lengths()[chosen] > limit, limit - 1] = mark
    return short


def shape_of(inputs: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Examples of a batch, and tokens, frames or samples of each, padding included."""
    first = next(iter(inputs.values()))
    return len(first), first.shape[-1]


def _end_mark(rows: Encoded) -> int | None:
    last = {int(rows.input_ids[row, tokens - 1]) for row, tokens in enumerate(rows.lengths().tolist()) if tokens}
    return last.pop() if len(last) == 1 and len(rows) > 1 else None
