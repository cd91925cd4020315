"""Text-classification: texts cut to the length, or split into windows, with the number of their label."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.schema.pipeline import DataSpec
from tasks.context import StepError
from tasks.data.bad_rows import BadRow
from tasks.data.encode.job import Job, counted, padded, room
from tasks.data.encoded import Encoded
from tasks.data.labels import agree, model_labels, numbers_of, ordered, unseen
from tasks.data.readers import Record, records

if TYPE_CHECKING:
    import numpy as np


def label_names(data: DataSpec, model: Path | None) -> tuple[str, ...]:
    """The labels in the order of their numbers.

    They come from the training data, whole numbers in numerical order, else by name, or are the columns that hold them;
    where the model is a classifier with these labels already, in its order and with its names.

    Args:
        data: the data block; its training split is read.
        model: the folder of a model, or None.

    Raises:
        StepError: a record is unfit, or there are fewer than two labels.
    """
    found = data_labels(data)
    config = model / "config.json" if model is not None else None
    if config is not None and config.is_file():
        return agree(found, model_labels(json.loads(config.read_text(encoding="utf-8")))) or found
    return found


def data_labels(data: DataSpec) -> tuple[str, ...]:
    """The distinct labels of the training data as they stand there, in order; or the columns that hold them.

    Raises:
        StepError: a record is unfit, or there are fewer than two labels.
    """
    if not isinstance(data.fields.label, str):
        return data.fields.label
    found = ordered(str(record.label) for record in records(data, "train", "text-classification"))
    if len(found) < 2:
        limit = f" within train_limit {data.train_limit}" if data.train_limit else ""
        alone = ", ".join(found)
        raise StepError(f"data.train: {data.train} has the label {alone!r} alone{limit}; a classifier needs two")
    return found


def encode(job: Job) -> Encoded:
    """One example a record; with ``data.windows`` as many as it takes, each with its label and special tokens.

    Raises:
        StepError: the length has no room, a label of the evaluation data is unknown, or nothing is left.
    """
    import numpy as np

    data, core = job.data, job.tokenizer.core
    length, overlap = data.max_length, data.windows or 0
    numbers = numbers_of(data_labels(data), job.names)
    special = room(core, length, "max_length")
    if overlap >= length - special:
        raise StepError(
            f"data.windows {overlap} leaves no new token in a window of {length - special}; write less than that"
        )
    core.enable_truncation(length, stride=overlap)
    rows: list[np.ndarray] = []
    labels: list[Any] = []
    documents: list[int] = []
    number = 0
    for batch in job.batches():
        encodings = core.encode_batch([record.text for record in batch])
        for record, encoding in zip(batch, encodings, strict=True):
            try:
                label = _number(record, numbers)
                if not encoding.ids:
                    raise BadRow(
                        f"{record.place}: the tokenizer makes no token of this text; remove the record", "no token"
                    )
            except BadRow as error:
                job.bad.add(error)
                continue
            if not job.keeps(counted(encoding, special, overlap)):
                continue
            job.cut["texts cut at data.max_length"] += data.windows is None and bool(encoding.overflowing)
            windows = [encoding] if data.windows is None else [encoding, *encoding.overflowing]
            rows += [np.array(window.ids, dtype=np.int32) for window in windows]
            labels += [label] * len(windows)
            documents += [number] * len(windows)
            number += 1
    job.check_some_left(len(rows), "holds no record")
    ids, mask = padded(rows, length, job.tokenizer.pad)
    return Encoded(
        ids,
        mask,
        np.array(labels, dtype=np.int32 if isinstance(data.fields.label, str) else np.uint8),
        np.array(documents, dtype=np.int32),
        np.zeros(len(rows), dtype=np.int32),
        job.names,
        pad=job.tokenizer.pad,
    )


def _number(record: Record, numbers: Mapping[str, int]) -> int | list[int]:
    """The number of a record's label, or 0 and 1 for each of several."""
    if isinstance(record.label, tuple):
        having = {numbers[name] for name in record.label}
        return [int(number in having) for number in range(len(numbers))]
    label = str(record.label)
    if label not in numbers:
        raise unseen(label, record.place, numbers)
    return numbers[label]
