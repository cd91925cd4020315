"""``builtin:tone-digits``: numbers of one to four digits, spoken in tones by invented speakers.

Every digit is a word of three sounds, every sound two formants at fixed frequencies, and the order of the sounds tells
the words apart: no word has a sound of its own. Speakers differ in pitch, in the size of the head (which moves the
formants), tempo, loudness and the noise around them, and glide from sound to sound. It is no speech: good for seeing a
recogniser learn, and no evidence of its quality on people.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Literal

from tasks.data.audio import Recording

if TYPE_CHECKING:
    import numpy as np

TRAIN, EVAL = 1500, 200
RATE = 8000
"""Samples a second."""

WORDS: dict[str, tuple[str, str, str]] = {
    "zero": ("s", "i", "o"),
    "one": ("o", "a", "n"),
    "two": ("t", "u", "o"),
    "three": ("s", "u", "i"),
    "four": ("n", "o", "a"),
    "five": ("t", "a", "i"),
    "six": ("s", "i", "t"),
    "seven": ("s", "e", "n"),
    "eight": ("e", "i", "t"),
    "nine": ("n", "a", "e"),
}

_FORMANTS = {
    "a": (750, 1250),
    "e": (480, 1900),
    "i": (300, 2300),
    "o": (460, 850),
    "u": (320, 1050),
    "n": (250, 1500),
    "s": (1700, 3000),
    "t": (1000, 2700),
}
"""Hertz; below half of ``RATE`` for every speaker."""

_PEAK = 32767


@cache
def read(split: Literal["train", "eval"]) -> tuple[tuple[Recording, str], ...]:
    """The recordings of a split with what is said, always the same."""
    return tuple(utterances(split))


def utterances(split: Literal["train", "eval"]) -> Iterator[tuple[Recording, str]]:
    """The same, made one by one."""
    count, seed = (TRAIN, 20240611) if split == "train" else (EVAL, 20240612)
    source = random.Random(seed)
    return (_utterance(source, seed * 1_000_000 + number) for number in range(count))


def _utterance(source: random.Random, noise: int) -> tuple[Recording, str]:
    """One speaker says one to four digits. ``random()`` alone gives the same numbers in every Python version."""
    import numpy as np

    def between(low: float, high: float) -> float:
        return low + (high - low) * source.random()

    words = [list(WORDS)[int(source.random() * len(WORDS))] for _ in range(1 + int(source.random() * 4))]
    pitch, head, tempo = between(90, 240), between(0.88, 1.12), between(0.8, 1.25)
    loudness, hiss = between(0.08, 0.8), between(0.01, 0.12)
    formants, level = [], []
    for word in words:
        pause = int(RATE * between(0.04, 0.12) / tempo)
        formants.append(np.zeros((pause, 2)))
        level.append(np.zeros(pause))
        for sound in WORDS[word]:
            length = int(RATE * between(0.07, 0.1) / tempo)
            formants.append(np.tile(np.array(_FORMANTS[sound]) * (head * between(0.97, 1.03)), (length, 1)))
            level.append(np.full(length, between(0.8, 1.0)))
    rest = int(RATE * 0.08)
    formants.append(np.zeros((rest, 2)))
    level.append(np.zeros(rest))
    hertz, volume = _smooth(np.concatenate(formants)), _smooth(np.concatenate(level)[:, None])[:, 0]
    times = np.arange(len(volume)) / RATE
    voice = 0.6 + 0.4 * np.sin(2 * np.pi * pitch * times + 0.3 * np.sin(2 * np.pi * 5 * times))
    tones = np.sin(2 * np.pi * np.cumsum(hertz, axis=0) / RATE) @ np.array([0.65, 0.35])
    sound = loudness * (volume * voice * tones + hiss * _noise(len(volume), noise))
    # Whole numbers: the last bits of a sine differ between processors.
    whole = np.clip(np.rint(sound * _PEAK), -_PEAK, _PEAK)
    return Recording((whole / (_PEAK + 1)).astype(np.float32), RATE), " ".join(words)


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over 15 ms around every sample, down the first axis."""
    import numpy as np

    half = int(RATE * 0.015) // 2
    edges = np.pad(values, ((half + 1, half), (0, 0)), mode="edge")
    sums = np.cumsum(edges, axis=0)
    return (sums[2 * half + 1 :] - sums[: -2 * half - 1]) / (2 * half + 1)


def _noise(count: int, seed: int) -> np.ndarray:
    """About normal, from a stream that numpy promises not to change: sums of four 16-bit numbers."""
    import numpy as np

    raw = np.random.PCG64(seed).random_raw(count).astype("<u8").view("<u2").reshape(count, 4)
    low, high = (raw[:, at].astype(np.int64) + raw[:, at + 1] for at in (0, 2))
    return (low + high - 4 * 32767.5) / 37837.2
