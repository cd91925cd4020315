"""Speech recognition: word and character error rates of what the model writes, by jiwer."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from tasks.evaluate import bootstrap
from tasks.evaluate.quality.written import identity, outputs, write
from tasks.evaluate.scores import Sample, Scores
from tasks.evaluate.subject import Scored, Subject

MARK = "words"
"""The column that only the scores of this application have."""


def score(subject: Subject) -> Scored:
    """Edits and lengths of each utterance, in words and in characters, and who is who.

    ``words`` and ``characters`` int64 [N, 2]: substitutions, deletions and insertions together, and the length of the
    reference; ``reference`` uint32 [N].
    """
    spoken = [subject.read_written(ids) for ids in write(subject)]
    references = list(subject.rows.references)
    described, normalise = NORMALISE[subject.spec.normalise]
    seconds = np.asarray(subject.rows.seconds).tolist()
    inputs = [f"audio {number}, {length:.1f} s" for number, length in enumerate(seconds, 1)]
    return Scored(
        statistics(spoken, references, normalise) | {"reference": identity(references)},
        outputs(inputs, references, spoken),
        {"normalise": described, "jiwer": version("jiwer"), "audio_seconds": float(sum(seconds))},
    )


def statistics(
    spoken: Sequence[str], references: Sequence[str], normalise: Callable[[str], str]
) -> dict[str, np.ndarray]:
    """``words`` and ``characters``: edits and length of each utterance, int64 [N, 2]; either text may be empty."""
    from jiwer import process_characters, process_words

    heard, said = ([normalise(text) for text in texts] for texts in (spoken, references))
    found = {"words": process_words(said, heard), "characters": process_characters(said, heard)}
    return {name: np.array([_row(*pair) for pair in _pairs(result)], np.int64) for name, result in found.items()}


def sample(scores: Scores) -> Sample:
    """Utterances are resampled; an error rate is all edits over all words or characters of the references."""
    statistics = {
        name: bootstrap.ratio_of_sums(*scores[column].T.astype(np.float64))
        for name, column in (("wer", "words"), ("cer", "characters"))
    }
    return Sample("utterances", len(scores["words"]), statistics, (scores["reference"],))


def basic(text: str) -> str:
    """Lower case, apostrophes dropped, other punctuation as spaces, single spaces."""
    lower = unicodedata.normalize("NFKC", text).lower().replace("'", "").replace("’", "")
    kept = (" " if unicodedata.category(sign).startswith("P") else sign for sign in lower)
    return " ".join("".join(kept).split())


NORMALISE: Mapping[str, tuple[str, Callable[[str], str]]] = {
    "basic": ("basic: NFKC, lower case, no apostrophes, other punctuation as spaces, single spaces", basic),
    "none": ("none", lambda text: text),
}
"""What ``evaluate.normalise`` does to both texts before they are compared, in words and as a function."""


def _pairs(result: Any) -> Sequence[tuple[Any, Any]]:
    return list(zip(result.alignments, result.references, strict=True))


def _row(alignment: Sequence[Any], reference: Sequence[str]) -> tuple[int, int]:
    """Edits and the length of the reference of one utterance."""
    edits = sum(
        max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        for chunk in alignment
        if chunk.type != "equal"
    )
    return edits, len(reference)
