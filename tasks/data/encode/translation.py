"""Translation: the text that is read, and the one that is to be written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.data.bad_rows import BadRow
from tasks.data.encode.job import Job, counted, padded, room
from tasks.data.encode.targets import fitted, write_ids
from tasks.data.encoded import Encoded

if TYPE_CHECKING:
    import numpy as np


def encode(job: Job) -> Encoded:
    """One example a pair. Both sides are cut to their lengths, the end mark kept, and the cut ones are counted.

    Raises:
        StepError: a length has no room, or nothing is left.
    """
    import numpy as np

    data, tokenizer = job.data, job.tokenizer
    target_length = data.max_target_length or data.max_length
    special = room(tokenizer.core, data.max_length, "max_length")
    sources: list[np.ndarray] = []
    targets: list[list[int]] = []
    references: list[str] = []
    for batch in job.batches():
        tokenizer.core.enable_truncation(data.max_length)
        encodings = tokenizer.core.encode_batch([record.text for record in batch])
        tokenizer.core.no_truncation()
        name = "max_target_length" if data.max_target_length else "max_length"
        written = write_ids([record.target or "" for record in batch], tokenizer, target_length, name)
        for record, encoding, target in zip(batch, encodings, written, strict=True):
            ours = counted(encoding, special)
            if not (ours and target.tokens):
                job.bad.add(
                    BadRow(f"{record.place}: the tokenizer makes no token of one side; remove the pair", "no token")
                )
                continue
            if not job.keeps(ours, target.tokens):
                continue
            job.cut["sources cut at data.max_length"] += bool(encoding.overflowing)
            job.cut[f"translations cut at data.{name}"] += target.cut
            sources.append(np.array(encoding.ids, np.int32))
            targets.append(target.ids)
            references.append(record.target or "")
    job.check_some_left(len(sources), "holds no pair")
    ids, mask = padded(sources, data.max_length, tokenizer.pad)
    target_ids, target_mask = fitted(targets, tokenizer.pad)
    count = len(sources)
    return Encoded(
        ids,
        mask,
        None,
        np.arange(count, dtype=np.int32),
        np.zeros(count, np.int32),
        target_ids=target_ids,
        target_mask=target_mask,
        references=tuple(references),
        pad=tokenizer.pad,
    )
