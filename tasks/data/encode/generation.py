"""Text-generation: documents cut into windows, none of which crosses documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.context import StepError
from tasks.data.encode.job import Job, padded
from tasks.data.encoded import Encoded
from tasks.data.tokens import TextTokenizer

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Encoding


def encode(job: Job) -> Encoded:
    """Windows of ``data.max_length`` tokens; the last of a document is padded, and one of a single token (nothing to
    score) is dropped. BOS and EOS stand around a document where the tokenizer defines them.

    Raises:
        StepError: the length has no room, or nothing is left.
    """
    import numpy as np

    length, tokenizer = job.data.max_length, job.tokenizer
    if length < 2:
        raise StepError(f"data.max_length is {length}: a window needs two tokens, the first is not scored; raise it")
    rows: list[np.ndarray] = []
    documents: list[int] = []
    covered: list[int] = []
    number = 0
    for batch in job.batches():
        encodings = tokenizer.core.encode_batch([record.text for record in batch], add_special_tokens=False)
        for record, encoding in zip(batch, encodings, strict=True):
            if not job.keeps(len(encoding.ids)):
                continue
            ids, ends = _document(record.text, encoding, tokenizer)
            for start in range(0, len(ids), length):
                window = ids[start : start + length]
                if len(window) > 1:
                    rows.append(window)
                    documents.append(number)
                    covered.append(int(ends[start + len(window) - 1] - ends[start]))
            number += 1
    job.check_some_left(len(rows), "holds no text of two tokens or more")
    ids, mask = padded(rows, length, tokenizer.pad)
    return Encoded(ids, mask, None, np.array(documents, np.int32), np.array(covered, np.int32), pad=tokenizer.pad)


def _document(text: str, encoding: Encoding, tokenizer: TextTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids with BOS and EOS, and for each the bytes of the text up to its end."""
    import numpy as np

    ids = np.array(encoding.ids, dtype=np.int32)
    ends = tokenizer.ends(text, encoding)
    if tokenizer.bos is not None:
        ids, ends = np.insert(ids, 0, tokenizer.bos), np.insert(ends, 0, 0)
    if tokenizer.eos is not None:
        ids, ends = np.append(ids, tokenizer.eos), np.append(ends, ends[-1] if len(ends) else 0)
    return ids.astype(np.int32), ends
