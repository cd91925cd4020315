"""Whether sending gets on: what tells a slow server from one that is down."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tasks.tracking.state import State

_DESCRIPTORS = Path("/proc/self/fd")
_OFFSETS = Path("/proc/self/fdinfo")


class Progress:
    """Counts what arrived. What is sent a second time, because the first attempt failed, counts for nothing."""

    def __init__(self) -> None:
        self._most: dict[tuple[object, ...], int] = {}
        self._event = 0
        self._root: str | None = None

    def recorded(self, state: State) -> None:
        """Take note of what is known to have arrived."""
        self._event = sum(state.positions.values())
        self._count("made", len(state.runs) + len(state.models) + len(state.versions))

    def metrics(self, count: int) -> None:
        """So many metrics of those behind the last recorded event were sent."""
        self._count("metrics", count)

    @contextlib.contextmanager
    def files(self, root: Path) -> Iterator[None]:
        """Within the block, files under ``root`` are on their way; the bytes that are read of them count."""
        self._root = os.path.realpath(root)
        try:
            yield
        finally:
            self._root = None

    def total(self) -> int:
        """A figure that grows as long as sending gets on."""
        root = self._root
        if root is not None:
            for name, offset in _offsets(root):
                self._count(name, offset)
        return self._event + sum(list(self._most.values()))

    def _count(self, what: str, amount: int) -> None:
        place = (self._event, what)
        self._most[place] = max(amount, self._most.get(place, 0))


def _offsets(root: str) -> Iterator[tuple[str, int]]:
    """The open files under ``root`` by their relative names, and how far each was read; nothing without Linux's /proc.

    MLflow says nothing before a file has arrived as a whole, and a model may be a single file of gigabytes.
    """
    try:
        descriptors = os.listdir(_DESCRIPTORS)
    except OSError:
        return
    for descriptor in descriptors:
        with contextlib.suppress(OSError, ValueError):  # another thread closed it in the meantime
            name = os.readlink(_DESCRIPTORS / descriptor)
            if os.path.commonpath((root, name)) == root:
                first = (_OFFSETS / descriptor).read_text().splitlines()[0]
                yield os.path.relpath(name, root), int(first.removeprefix("pos:"))
