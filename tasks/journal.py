"""The record of a run on disk: append-only files of events, and what surrounds a run (environment, git state).

A run never waits for its tracking server. Every event is first a line in ``<run folder>/journal/<writer>.jsonl``; from
there ``tasks.tracking`` sends it on, in its own time.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import subprocess
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from specs.schema.redaction import redact_spec, redact_values
from specs.schema.suggest import nearest
from tasks.artifacts.files import sync_folder
from tasks.keys import processor

Event = Mapping[str, Any]

DURABLE = frozenset({"run_start", "step_start", "step_end", "gate", "register", "run_end"})
"""Events after which the file is forced to disk. Metrics and files are many, and may be lost with the power."""

EVENTS = DURABLE | {"metric", "file"}
"""Every event that a journal takes."""

TAIL_BYTES = 2**16
"""Where ``ended`` looks for a run's end."""

STRUCTURE = frozenset(
    {
        *("event", "time", "run_id", "step", "steps", "uses", "task", "kind", "key", "digest", "state", "status", "to"),
        *("name", "experiment", "path", "evaluation_path", "spec_path", "tags", "fingerprint", "revision", "touched"),
        *("gate", "metric", "unit", "verdict", "artifact", "npu", "device", "writer"),
    }
)
"""Fields of an event that say what it is about, at any depth outside of the spec. No value from the environment gets
into them, and one that happens to be equal must not hide them."""

LIBRARIES = (
    "lathe",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "datasets",
    "litert-torch",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "tensorflow",
    "ethos-u-vela",
    "prefect",
    "mlflow",
    "pydantic",
)

_WRITER = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}")
_HEAD = len('{"crc":"00000000","event":')


class JournalError(Exception):
    """What was to be written is no event, or the writer has no valid name."""


@dataclass(frozen=True)
class Entry:
    """One event as it was read, with the file it stands in and the byte offset behind it."""

    event: Event
    writer: str
    end: int


class Journal:
    """Appends events to the files of one run. Thread-safe; processes do well to use a writer each.

    Args:
        folder: the run's folder; the files are made in ``journal/`` under it.
        secrets: values that must not reach the disk; see ``redact_event``.
    """

    def __init__(self, folder: Path, secrets: Iterable[str] = ()) -> None:
        self.folder = folder
        self._secrets = tuple(secrets)
        self._guard = threading.Lock()
        self._known: set[Path] = set()

    def append(self, writer: str, event: Event) -> None:
        """Append one event; ``time`` (seconds since the epoch) is added where it is missing.

        Args:
            writer: ``run``, or the step's id; it names the file.
            event: JSON data with the kind of the event under ``event``.

        Raises:
            JournalError: the writer's name cannot be a file's, the kind is unknown, or the event is not JSON data.
            OSError: the disk refused it.
        """
        if not _WRITER.fullmatch(writer):
            raise JournalError(f"{writer!r} cannot name a journal; use letters, digits, _, . and -, a letter first")
        kind = event.get("event")
        if kind not in EVENTS:
            raise JournalError(f"{kind!r} is not an event of a run; {nearest(str(kind), sorted(EVENTS))}")
        line = _line(redact_event({"time": time.time(), **event}, self._secrets))
        path = _journal(self.folder) / f"{writer}.jsonl"
        with self._guard:
            _write(path, line, durable=kind in DURABLE, new=path not in self._known)
            self._known.add(path)


def read(folder: Path) -> Iterator[Event]:
    """The events of a run, file by file (``run.jsonl`` first), each file in the order of writing.

    A last line that was torn by a crash is left out; a damaged one in the middle is too, with a warning in the log.
    """
    for entry in entries(folder):
        yield entry.event


def entries(folder: Path, after: Mapping[str, int] | None = None) -> Iterator[Entry]:
    """Like ``read``, with each event's place; ``after`` gives, by writer, the byte offset to start from."""
    files = sorted(_journal(folder).glob("*.jsonl"), key=lambda path: (path.stem != "run", path.stem))
    for path in files:
        yield from _entries(path, (after or {}).get(path.stem, 0))


def merged(folder: Path, after: Mapping[str, int] | None = None) -> list[Entry]:
    """The entries of all files in the order of their times; within a file the order of writing always holds.

    A run's start comes first and its end last, whatever the clock did.
    """
    latest: dict[str, tuple[int, float]] = {}
    keyed = []
    for entry in entries(folder, after):
        rank = {"run_start": 0, "run_end": 2}.get(entry.event["event"], 1)
        before = latest.get(entry.writer, (0, 0.0))
        # Neither a clock that was set back nor an event behind the run's end may overtake its predecessor in the file.
        place = latest[entry.writer] = max(rank, before[0]), max(entry.event["time"], before[1])
        keyed.append((place, entry))
    return [entry for _, entry in sorted(keyed, key=lambda item: item[0])]


def ended(folder: Path) -> bool:
    """Whether the run's end stands near the end of its journal; quick, however long the journal is.

    What follows a run's end is a line or two; an answer of False is worth a closer look.
    """
    try:
        with (_journal(folder) / "run.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return False
    return any(event["event"] == "run_end" for line in reversed(lines) if (event := _parse(line)) is not None)


def _journal(folder: Path) -> Path:
    return folder / "journal"


def _line(event: Event) -> bytes:
    try:
        text = json.dumps(event, separators=(",", ":"), default=_plain)
    except (TypeError, ValueError) as error:
        raise JournalError(f"the event {event.get('event')!r} is not JSON data: {error}") from error
    return f'{{"crc":"{zlib.crc32(text.encode()):08x}","event":{text}}}\n'.encode()


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy or torch number
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _write(path: Path, line: bytes, *, durable: bool, new: bool) -> None:
    if new:
        path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        # A process that died in the middle of a line must not take the next one with it.
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if new:
        sync_folder(path.parent)


def _entries(path: Path, offset: int) -> Iterator[Entry]:
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            event = _parse(line[:-1])
            if event is not None:
                yield Entry(event, path.stem, offset)
            elif line != b"\n":
                logging.getLogger(__name__).warning("%s: the line that ends at byte %d is damaged", path, offset)


def _parse(line: bytes) -> Event | None:
    text = line[_HEAD:-1]
    if line[:8] != b'{"crc":"' or line[8:16] != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)


def redact_event(event: Event, secrets: Iterable[str]) -> dict[str, Any]:
    """A copy of an event in which free text and the values of the spec are without secrets.

    What the event is put together by stays as it is, whatever the secrets are: keys, the fields in ``STRUCTURE``, and
    the fields of the spec that take nothing from the environment.

    Args:
        event: JSON data.
        secrets: the values to mask; see ``specs.schema.redaction.redact``.
    """
    known = tuple(secrets)
    found = redact_values({key: value for key, value in event.items() if key != "spec"}, known, STRUCTURE)
    if "spec" not in event:
        return found
    at = () if event.get("event") == "run_start" else ("steps",)
    return {**found, "spec": redact_spec(event["spec"], known, at)}


def environment() -> dict[str, Any]:
    """What the run ran on: Python, platform, processor, memory, GPUs and the versions of the libraries that matter.

    Sizes are in bytes. Nothing heavy is imported, torch least of all.
    """
    import psutil

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "libraries": {name: found for name in LIBRARIES if (found := library_version(name))},
    }


def _gpus() -> list[str]:
    program = shutil.which("nvidia-smi")
    text = _ask([program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]) if program else None
    return text.splitlines() if text else []


def library_version(distribution: str) -> str | None:
    """The version of an installed distribution, None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """``{"revision", "branch", "dirty"}`` of the repository that holds ``folder``; None outside of one."""
    # A monitor program named by the repository's own configuration must not be started from here.
    git = ["git", "-c", "core.fsmonitor=false", "-C", os.fspath(folder)]
    revision = _ask([*git, "rev-parse", "HEAD"]) if shutil.which("git") else None
    if not revision:
        return None
    branch = _ask([*git, "rev-parse", "--abbrev-ref", "HEAD"])
    status = _ask([*git, "status", "--porcelain", "--untracked-files=no"])
    return {"revision": revision, "branch": branch, "dirty": status is None or bool(status)}


def _ask(command: list[str]) -> str | None:
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=quiet)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
