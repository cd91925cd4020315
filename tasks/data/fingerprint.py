"""What identifies a split: the content of its files, not their names."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec
from tasks.data import builtin, hub
from tasks.data.readers import Record, Split, files_of, records, source_of


def fingerprint(data: DataSpec, split: Split, task: Task) -> str:
    """A hash of everything that determines the records of a split and how they are cut: the content of the data files
    and of the audio that they name, and the fields of the data block. A file that moved keeps its fingerprint.

    Raises:
        StepError: the source does not exist, or the hub cannot say which revision it is.
    """
    source = source_of(data, split)
    parts = [_content(source, split), _audio(data, split, task), _shape(data, split)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def audio_digest(record: Record) -> str | None:
    """A hash of the content of a record's audio; None where it cannot be read."""
    if isinstance(record.audio, Path):
        try:
            return _digest_now(record.audio)
        except OSError:
            return None
    if isinstance(record.audio, bytes):
        return hashlib.sha256(record.audio).hexdigest()
    return record.audio and hashlib.sha256(record.audio.samples.tobytes()).hexdigest()


def _shape(data: DataSpec, split: Split) -> dict[str, Any]:
    """The fields of the data block that shape a split, whatever the sources are called."""
    other = {"train_limit"} if split == "eval" else {"eval_limit"}
    unused = {"train", "eval"} | other | ({"filter"} if split == "eval" else set())
    return data.model_dump(mode="json", exclude=unused)


def _audio(data: DataSpec, split: Split, task: Task) -> list[str | None]:
    """Hashes of the audio files that the data files name."""
    source = source_of(data, split)
    if task != "speech-recognition" or source.startswith((builtin.PREFIX, hub.PREFIX)):
        return []
    readable = data.model_copy(update={"on_bad_row": "skip"})
    return [audio_digest(record) for record in records(readable, split, task) if isinstance(record.audio, Path)]


def _content(source: str, split: Split) -> object:
    if source.startswith(builtin.PREFIX):
        return _digest_of_builtin(source, split)
    if source.startswith(hub.PREFIX):
        return hub.revision(source, split)
    return [[file.suffix.lower(), _digest_now(file)] for file in files_of(source)]


@lru_cache(maxsize=32)
def _digest_of_builtin(source: str, split: Split) -> str:
    from tasks.keys import digest_json, source_digest

    corpus = builtin.find(source)
    return digest_json([split, source_digest(corpus.rows) if corpus.generated else list(corpus.rows(split))])


def _digest_now(file: Path) -> str:
    stat = file.stat()
    return _digest(str(file), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2**20)
def _digest(path: str, size: int, mtime_ns: int) -> str:
    """The hash of a file's content; size and time of change stand for the content within one process."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
