"""What a speech model hears, as its ``preprocessor_config.json`` says: log-mel frames, or normalised samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.schema.suggest import nearest
from tasks.context import StepError

if TYPE_CHECKING:
    import numpy as np

FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Features:
    """How audio becomes the input of a model.

    Args:
        input: what the model calls it.
        rate: samples a second that ``make`` takes.
        frames: the number of frames that the model demands; None where any will do.
        samples: how many it hears at once; None for any number.
        characters: whether the model writes a character for every frame (CTC), and no end mark.
        make: samples float32 [S] to features, float32 [F, M] or [S].
    """

    input: str
    rate: int
    frames: int | None
    samples: int | None
    characters: bool
    make: Callable[[np.ndarray], np.ndarray]


def open_features(folder: Path, config: Mapping[str, Any]) -> Features:
    """The features of the model folder ``folder``, whose ``config.json`` is ``config``.

    Raises:
        StepError: the folder does not say, or says what is not known here.
    """
    file = folder / FILE
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        kind = str(fields["feature_extractor_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StepError(f"{folder} has no readable {FILE} ({error}); name the folder of a speech model") from error
    if kind not in _KINDS:
        raise StepError(f"{file}: features of the kind {kind!r} are not known; {nearest(kind, _KINDS)}")
    try:
        return _KINDS[kind](fields, config)
    except (ValueError, TypeError, KeyError) as error:
        raise StepError(f"{file}: {' '.join(str(error).split())}") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: transforms of a second of audio are done before a second thread has begun."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _log_mel(fields: Mapping[str, Any], config: Mapping[str, Any]) -> Features:
    """Whisper's frames. Behind the audio stand only as many as hear it, and one of silence: all others are like it."""
    import numpy as np
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(**{**fields, "dither": 0.0})  # dither is random
    rate, hop, window = extractor.sampling_rate, extractor.hop_length, extractor.n_fft
    frames = 2 * int(config["max_source_positions"])

    def make(samples: np.ndarray) -> np.ndarray:
        length = min(frames, -(-(len(samples) + window) // hop) + 1) * hop
        heard = np.pad(samples[:length], (0, max(0, length - len(samples))))
        made = extractor(heard, sampling_rate=rate, padding="longest", max_length=length, return_tensors="np")
        return np.ascontiguousarray(made["input_features"][0].T, dtype=np.float32)

    return Features("input_features", rate, frames, frames * hop, False, make)


def _samples(fields: Mapping[str, Any], config: Mapping[str, Any]) -> Features:
    """wav2vec2's samples, of zero mean and unit variance where it is to normalise."""
    import numpy as np
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor(**fields)
    rate = extractor.sampling_rate

    def make(samples: np.ndarray) -> np.ndarray:
        made = extractor(samples, sampling_rate=rate, return_tensors="np")
        return np.ascontiguousarray(made["input_values"][0], dtype=np.float32)

    return Features("input_values", rate, None, None, True, make)


_KINDS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Features]] = {
    "WhisperFeatureExtractor": _log_mel,
    "Wav2Vec2FeatureExtractor": _samples,
}
