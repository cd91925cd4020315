"""Audio from wav, flac and ogg files: checked by its header, decoded, brought to one channel and one rate.

A manifest comes from a stranger. It names files inside its own folder only, and nothing is decoded that its header
says is too long.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data.bad_rows import BadRow

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from soundfile import SoundFile

RATES = (8_000, 48_000)
"""The lowest and the highest rate of audio that is taken, samples a second."""

FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG")

_CUT_WAV = re.compile(r"^\s*data : (\d+) \(should be (\d+)\)", re.MULTILINE)
_CUT_OGG = "lacks an end-of-stream bit"
_UNKNOWN_LENGTH = 2**31 - 2**16
"""Programs that write into a pipe declare about so many bytes, or more: they do not know how many there will be."""

_COUNTED = 2**60
"""More frames than that stand for a header without their number."""


@dataclass(frozen=True)
class Recording:
    """Audio in memory: ``samples`` float32 [S], one channel, -1 to 1; ``rate`` samples a second."""

    samples: np.ndarray
    rate: int


Audio = Path | bytes | Recording
"""A file, the bytes of one, or samples."""


def audio_of(value: Any, folder: Path | None, column: str, place: str) -> Audio:
    """The audio that a record's column names.

    A path is relative to ``folder`` and stays inside it. Links that stand there are followed: whoever laid out the
    folder put them there, the manifest cannot.

    Args:
        value: a path, the mapping of ``bytes`` and ``path`` that data sets of the hub have, or a ``Recording``.
        folder: the folder of the data file; None where there is none.
        column: the name of the column, for messages.
        place: of the record, for messages.

    Raises:
        BadRow: it names none, or one outside the folder.
    """
    if isinstance(value, Recording):
        return value
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return value["bytes"]
        value = value.get("path")
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise BadRow(f"{place}: column {column!r} names no audio file; write its path", "no audio file named")
    if folder is None:
        raise BadRow(f"{place}: column {column!r} is a path, and this source has no folder", "no audio file named")
    base = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(base, value))
    if os.path.commonpath([base, path]) != base:
        raise BadRow(
            f"{place}: {value!r} lies outside the folder of the data file; move the audio beside it",
            "audio outside the folder",
        )
    return Path(path)


def seconds_of(audio: Audio, limit: float, place: str) -> float:
    """How long the audio is by its header, in seconds; nothing is decoded.

    Raises:
        BadRow: it is missing, no audio, empty, longer than ``limit`` seconds, or of a rate or shape that is not taken.
    """
    name = _named(audio)
    if isinstance(audio, Recording):
        _check_length(len(audio.samples), audio.rate, limit, name, place)
        return len(audio.samples) / audio.rate
    with _opened(audio, name, place) as file:
        _check_header(file, limit, name, place)
        return file.frames / file.samplerate


def decoded(audio: Audio, limit: float, place: str) -> Recording:
    """The audio in memory, the mean of its channels.

    Raises:
        BadRow: as ``seconds_of``; or the file is damaged, cut short or silent, or holds values that are no numbers.
    """
    import numpy as np

    name = _named(audio)
    recording = audio if isinstance(audio, Recording) else _read(audio, limit, name, place)
    samples = recording.samples
    _check_length(len(samples), recording.rate, limit, name, place)
    if not np.isfinite(samples).all():
        at = int(np.argmin(np.isfinite(samples)))
        raise BadRow(
            f"{place}: {name} has a sample that is no finite number, the first at {at / recording.rate:.3f} s; "
            "write the file anew",
            "samples that are no numbers",
        )
    if not samples.any():
        raise BadRow(f"{place}: {name} is silent, every sample is 0; remove the record", "silent audio")
    return recording


def resampled(recording: Recording, rate: int) -> np.ndarray:
    """Its samples, float32 [S], at ``rate`` samples a second."""
    import numpy as np

    if recording.rate == rate:
        return recording.samples
    import soxr

    return soxr.resample(recording.samples, recording.rate, rate, quality="HQ").astype(np.float32, copy=False)


def _named(audio: Audio) -> str:
    return str(audio) if isinstance(audio, Path) else "the audio"


@contextmanager
def _opened(audio: Path | bytes, name: str, place: str) -> Iterator[SoundFile]:
    import soundfile

    try:
        if isinstance(audio, Path):
            if not stat.S_ISREG(audio.stat().st_mode):
                raise BadRow(f"{place}: {name} is not a file; name an audio file", "audio is not a file")
            source: Any = str(audio)
        else:
            source = io.BytesIO(audio)
        with soundfile.SoundFile(source) as file:
            yield file
    except FileNotFoundError as error:
        raise BadRow(
            f"{place}: {name} does not exist; correct the path or remove the record", "no such audio"
        ) from error
    except OSError as error:
        raise BadRow(f"{place}: {name} cannot be read: {error.strerror}", "audio cannot be read") from error
    except soundfile.SoundFileError as error:
        empty = isinstance(audio, Path) and audio.stat().st_size == 0
        if empty or audio == b"":
            raise BadRow(
                f"{place}: {name} is an empty file; record it anew or remove the record", "empty audio"
            ) from error
        reason = str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(".")
        raise BadRow(
            f"{place}: {name} is damaged or no audio ({reason}); write it as wav, flac or ogg", "damaged audio"
        ) from error


def _check_header(file: SoundFile, limit: float, name: str, place: str) -> None:
    low, high = RATES
    if file.format not in FORMATS:
        raise BadRow(f"{place}: {name} is {file.format}; write it as wav, flac or ogg", "audio of another format")
    if not low <= file.samplerate <= high:
        raise BadRow(
            f"{place}: {name} has {file.samplerate} samples a second; {low} to {high} are taken, convert it",
            "audio of another rate",
        )
    if file.channels > 2:
        raise BadRow(
            f"{place}: {name} has {file.channels} channels; mix it down to one or two", "audio of many channels"
        )
    cut = _CUT_WAV.search(file.extra_info)
    if _CUT_OGG in file.extra_info or (cut and int(cut[2]) + 1 < int(cut[1]) < _UNKNOWN_LENGTH):
        raise BadRow(f"{place}: {name} is cut short; copy it anew or remove the record", "truncated audio")
    if file.frames > _COUNTED:
        raise BadRow(f"{place}: {name} does not say how long it is; write it anew", "audio of unknown length")
    _check_length(file.frames, file.samplerate, limit, name, place)


def _check_length(frames: int, rate: int, limit: float, name: str, place: str) -> None:
    if frames <= 0:
        raise BadRow(f"{place}: {name} holds no sample; record it anew or remove the record", "empty audio")
    if frames > limit * rate:
        raise BadRow(
            f"{place}: {name} is {frames / rate:.1f} s long; at most {limit:g} s are taken, cut it or raise "
            "data.max_duration",
            "audio too long",
        )


def _read(audio: Path | bytes, limit: float, name: str, place: str) -> Recording:
    with _opened(audio, name, place) as file:
        _check_header(file, limit, name, place)
        samples = file.read(dtype="float32", always_2d=True)
        if len(samples) != file.frames:
            raise BadRow(f"{place}: {name} is cut short; copy it anew or remove the record", "truncated audio")
        return Recording(samples.mean(axis=1, dtype="float32"), file.samplerate)
