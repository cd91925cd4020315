"""Events of a run inside this process: steps publish, the terminal and the journal listen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Event = Mapping[str, Any]
Listener = Callable[[Event], None]

_listeners: list[Listener] = []
_guard = threading.RLock()  # a signal's handler may publish while this thread holds it


def publish(event: Event) -> None:
    """Hand the event to every listener, in this thread."""
    with _guard:
        listeners = tuple(_listeners)
    for listener in listeners:
        listener(event)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, ``listener`` is called with every event; it must be quick and thread-safe."""
    with _guard:
        _listeners.append(listener)
    try:
        yield
    finally:
        with _guard:
            _listeners.remove(listener)
