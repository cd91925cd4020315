"""Speech recognition: what the model hears, and the transcript that it is to write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.data.audio import decoded, resampled
from tasks.data.bad_rows import BadRow
from tasks.data.encode.features import Features, one_thread, open_features
from tasks.data.encode.job import Job
from tasks.data.encode.targets import character_ids, config_of, fitted, write_ids
from tasks.data.encoded import Encoded, FeatureFile
from tasks.data.files import shown

if TYPE_CHECKING:
    import numpy as np

    from tasks.data.encode.targets import Written
    from tasks.data.readers import Record
    from tasks.data.tokens import TextTokenizer


def encode(job: Job) -> Encoded:
    """One example a recording. The features go straight into the artifact's folder, so that memory holds one at a time.

    A transcript is never cut: a model that learns to stop early cannot be told from one that hears badly.

    Raises:
        StepError: the model folder does not say how it hears, or nothing is left.
    """
    import numpy as np

    tokenizer, data = job.tokenizer, job.data
    features = open_features(tokenizer.folder, config_of(tokenizer.folder))
    targets: list[list[int]] = []
    references: list[str] = []
    seconds: list[float] = []
    with one_thread(), FeatureFile(job.folder) as file:
        for batch in job.batches():
            texts = [record.text for record in batch]
            written = character_ids(texts, tokenizer) if features.characters else write_ids(texts, tokenizer, None)
            for record, target in zip(batch, written, strict=True):
                try:
                    _check(target, record, data.max_length, tokenizer)
                    samples = _samples(record, features, data.max_duration)
                except BadRow as error:
                    job.bad.add(error)
                    continue
                length = len(samples) / features.rate
                if not job.keeps(target.tokens, seconds=length):
                    continue
                file.append(features.make(samples))
                seconds.append(length)
                targets.append(target.ids)
                references.append(record.text)
    job.check_some_left(len(targets), "holds no recording")
    ids, mask = fitted(targets, tokenizer.pad)
    return Encoded(
        None,
        None,
        None,
        np.arange(len(targets), dtype=np.int32),
        np.zeros(len(targets), np.int32),
        target_ids=ids,
        target_mask=mask,
        references=tuple(references),
        features=file.open(),
        feature_ends=np.array(file.ends, np.int64),
        seconds=np.array(seconds, np.float32),
        feature_input=features.input,
        feature_frames=features.frames,
        pad=tokenizer.pad,
    )


def _check(target: Written, record: Record, limit: int, tokenizer: TextTokenizer) -> None:
    if not target.tokens:
        raise BadRow(f"{record.place}: the tokenizer makes no token of this transcript; remove the record", "no token")
    if len(target.ids) > limit:
        raise BadRow(
            f"{record.place}: the transcript has {len(target.ids)} tokens, data.max_length allows {limit}; raise it, "
            "or cut the recording",
            "transcript too long",
        )
    unknown = tokenizer.unknown
    if unknown is not None and 2 * target.ids.count(unknown) > len(target.ids):
        raise BadRow(
            f"{record.place}: the tokenizer does not know most characters of {shown(record.text)}; are they of the "
            "alphabet, and of the case, that the model writes?",
            "characters that the tokenizer does not know",
        )


def _samples(record: Record, features: Features, limit: float) -> np.ndarray:
    """The audio as the model hears it, no longer than the data allows and the model takes at once."""
    assert record.audio is not None
    samples = resampled(decoded(record.audio, limit, record.place), features.rate)
    if features.samples is not None and len(samples) > features.samples:
        raise BadRow(
            f"{record.place}: {len(samples) / features.rate:.1f} s of audio, the model hears "
            f"{features.samples / features.rate:g} s at once; lower data.max_duration and cut longer recordings",
            "audio too long",
        )
    return samples
