"""``preprocessor_config.json``: how a speech model's input is made from audio."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.context import StepError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "preprocessor_config.json"

RATE = 16_000
"""Samples a second that a model from ``config:`` hears."""

_POSITIONS = 50
"""Whisper's source positions for a second of audio: one for two frames of 10 ms."""


def audio_limit(config: PretrainedConfig) -> float | None:
    """Seconds of audio that the model hears at once, where it takes frames of mel bands; None where any length will
    do."""
    return config.max_source_positions / _POSITIONS if hasattr(config, "num_mel_bins") else None


def features_for(config: PretrainedConfig) -> Any:
    """The feature extractor of a model that has none of its own, as its configuration demands it.

    Raises:
        StepError: the model's window is no whole number of seconds, which the extractor cannot cut.
    """
    from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

    limit = audio_limit(config)
    if limit is None:
        return Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True, return_attention_mask=True)
    if not limit.is_integer():
        raise StepError(
            f"max_source_positions {config.max_source_positions} is {limit:g} s of audio, and the features are cut "
            f"in whole seconds; write a multiple of {_POSITIONS}"
        )
    return WhisperFeatureExtractor(feature_size=config.num_mel_bins, sampling_rate=RATE, chunk_length=int(limit))


def write_features(config: PretrainedConfig, out: Path, source: Path | None = None) -> None:
    """Write ``preprocessor_config.json`` into ``out``: that of the folder ``source`` where it has one.

    Raises:
        StepError: the one in ``source`` cannot be read or does not fit the model, or none can be made.
    """
    from transformers import AutoFeatureExtractor

    extractor = None
    if source is not None and any((source / name).is_file() for name in (FILE, "processor_config.json")):
        try:
            extractor = AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for a folder that it cannot read
            raise StepError(f"{source}: the feature extractor cannot be read: {str(error).splitlines()[0]}") from error
        mels = getattr(config, "num_mel_bins", extractor.feature_size)
        if audio_limit(config) is not None and extractor.feature_size != mels:
            raise StepError(f"{source / FILE} makes {extractor.feature_size} mel bands, the model takes {mels}")
    (extractor or features_for(config)).save_pretrained(out)
