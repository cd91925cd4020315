"""Examples put together into the inputs of one call of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tasks.data.encoded import Encoded

IGNORED = -100
"""The label of padding, which no loss counts."""


def collate(encoded: Encoded, rows: np.ndarray, pad_to: int | None = None) -> dict[str, np.ndarray]:
    """The examples ``rows`` as the model's ``forward`` takes them by name; int32 and float32.

    ``input_ids`` and ``attention_mask`` [B, L], or ``input_features`` [B, M, F], or ``input_values`` and
    ``attention_mask`` [B, S]; and ``labels`` where there are any: class numbers [B], several labels an example [B, C],
    or the ids that are to be written [B, T], ``IGNORED`` where they are padded.

    Args:
        encoded: the data.
        rows: which examples, [B].
        pad_to: tokens or samples of each example, which is cut or padded to them; default: those of the longest. A
            model that demands a number of frames gets it in any case.
    """
    make = _text if encoded.features is None else _frames if encoded.feature_frames else _samples
    batch = make(encoded, np.asarray(rows), pad_to)
    if encoded.target_ids is not None and encoded.target_mask is not None:
        width = max(1, int(encoded.target_mask[rows].sum(axis=1).max(initial=1)))
        batch["labels"] = np.where(encoded.target_mask[rows, :width], encoded.target_ids[rows, :width], IGNORED)
    elif encoded.labels is not None:
        batch["labels"] = encoded.labels[rows].astype(np.int32)
    return batch


def _text(encoded: Encoded, rows: np.ndarray, pad_to: int | None) -> dict[str, np.ndarray]:
    mask = np.asarray(encoded.attention_mask[rows], np.int32)
    width = pad_to or max(1, int(mask.sum(axis=1).max(initial=1)))
    ids, mask = np.asarray(encoded.input_ids[rows, :width]), mask[:, :width]
    missing = ((0, 0), (0, width - ids.shape[1]))
    return {
        "input_ids": np.pad(ids, missing, constant_values=encoded.pad),
        "attention_mask": np.pad(mask, missing),
    }


def _frames(encoded: Encoded, rows: np.ndarray, pad_to: int | None) -> dict[str, np.ndarray]:
    """Frames of a fixed number: what is encoded ends with silence, which fills up the rest."""
    assert encoded.features is not None
    assert encoded.feature_frames is not None
    batch = np.empty((len(rows), encoded.feature_frames, encoded.features.shape[1]), np.float32)
    for at, row in enumerate(rows.tolist()):
        frames = encoded.features_of(row)
        batch[at, : len(frames)] = frames
        batch[at, len(frames) :] = frames[-1]
    return {encoded.feature_input: np.ascontiguousarray(batch.transpose(0, 2, 1))}


def _samples(encoded: Encoded, rows: np.ndarray, pad_to: int | None) -> dict[str, np.ndarray]:
    width = pad_to or max(1, int(encoded.lengths()[rows].max(initial=1)))
    batch = np.zeros((len(rows), width), np.float32)
    mask = np.zeros((len(rows), width), np.int32)
    for at, row in enumerate(rows.tolist()):
        samples = encoded.features_of(row)[:width]
        batch[at, : len(samples)] = samples
        mask[at, : len(samples)] = 1
    return {encoded.feature_input: batch, "attention_mask": mask}
