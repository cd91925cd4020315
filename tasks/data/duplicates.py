"""Records whose input stands in the data more than once, within a split or in both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from tasks.data.fingerprint import audio_digest
from tasks.data.readers import Record


@dataclass
class Inputs:
    """The inputs of a split: texts, or the contents of audio files.

    Args:
        exact: digests of the inputs as they are.
        alike: digests of texts in lower case with single spaces; of audio the same as ``exact``.
        repeated: records whose input stands earlier in the split.
        repeated_alike: the same, and those that differ from an earlier one in case and space alone.
    """

    exact: set[bytes] = field(default_factory=set)
    alike: set[bytes] = field(default_factory=set)
    repeated: int = 0
    repeated_alike: int = 0

    def add(self, keys: tuple[bytes, bytes]) -> None:
        """Take in a record, by what ``keys_of`` says of it."""
        exact, alike = keys
        self.repeated += exact in self.exact
        self.repeated_alike += alike in self.alike
        self.exact.add(exact)
        self.alike.add(alike)


@dataclass
class Leak:
    """Records of the evaluation split whose input stands in the training split.

    Args:
        train: the inputs of the training split.
        exact: how many stand there as they are.
        alike: the same, and those that differ in case and space alone.
        first: the place of the first.
    """

    train: Inputs
    exact: int = 0
    alike: int = 0
    first: str = ""

    def add(self, keys: tuple[bytes, bytes], place: str) -> None:
        """Take in a record of the evaluation split."""
        exact, alike = keys
        self.exact += exact in self.train.exact
        if alike in self.train.alike:
            self.alike += 1
            self.first = self.first or place

    def warning(self, records: int) -> str:
        """What to say of it, given how many records the evaluation split has; empty where there is none."""
        if not self.alike:
            return ""
        return (
            f"data.eval: {self.alike} of {records} records stand in data.train too ({self.exact} exactly, the first at "
            f"{self.first}); quality is measured on what was learned by heart, remove them from one of the two"
        )


def keys_of(record: Record) -> tuple[bytes, bytes]:
    """Digests of a record's input, as it is and without case and spaces."""
    if record.audio is not None:
        key = _digest(audio_digest(record) or record.place)
        return key, key
    return _digest(record.text), _digest(" ".join(record.text.casefold().split()))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
