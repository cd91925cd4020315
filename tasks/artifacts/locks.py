"""Locks of the kernel, so that a dead process holds none, and scratch folders that live as long as their process."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.artifacts.files import StoreError, explained, remove_tree

_POLL = 0.25
"""The longest wait between two tries for a lock, seconds."""


class LockCancelled(StoreError):
    """The wait for a lock was given up because the caller asked for it."""


class Held:
    """A lock that this process holds until ``release``."""

    __slots__ = ("__weakref__", "fd", "path")

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self.path = path
        _held.add(self)

    @property
    def ours(self) -> bool:
        """False in a forked child, which has a copy of everything but the lock."""
        return self.fd >= 0

    def release(self, unlink: bool = False) -> None:
        """Let go; with ``unlink`` the lock's file goes first, while nobody else can hold it."""
        if not self.ours:
            return
        if unlink:
            with suppress(OSError):
                os.unlink(self.path)
        fd, self.fd = self.fd, -1
        fcntl.flock(fd, fcntl.LOCK_UN)  # at once, even where a child that was just forked still has the file open
        os.close(fd)


_held: weakref.WeakSet[Held] = weakref.WeakSet()


def _let_go_in_child() -> None:
    # A lock belongs to the open file, which a forked child shares: it would outlive the process that took it.
    for held in list(_held):
        if held.ours:
            os.close(held.fd)
            held.fd = -1


os.register_at_fork(after_in_child=_let_go_in_child)


def take(path: Path, wait: bool = True, cancelled: Callable[[], bool] | None = None) -> Held | None:
    """Lock the file ``path``, which is made where it is missing.

    Args:
        path: the lock's file.
        wait: whether to wait for whoever holds it.
        cancelled: asked at least every quarter of a second while waiting.

    Returns:
        The lock; None where it is taken and ``wait`` is False.

    Raises:
        LockCancelled: ``cancelled`` said so.
        OSError: the file cannot be opened, or its disk cannot lock.
    """
    delay = 0.001
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            gained = _try(fd) and _still_named(fd, path)
        except BaseException:
            os.close(fd)
            raise
        if gained:
            return Held(fd, path)
        os.close(fd)
        if not wait:
            return None
        if cancelled is not None and cancelled():
            raise LockCancelled(f"the wait for {path} was cancelled; run again to go on")
        time.sleep(delay)
        delay = min(2 * delay, _POLL)


def _try(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _still_named(fd: int, path: Path) -> bool:
    """Whether the locked file is the one that the name stands for; its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: Path, cancelled: Callable[[], bool] | None = None) -> Iterator[None]:
    """Hold the lock ``path``, waiting for it.

    Raises:
        LockCancelled: ``cancelled`` said so.
        StoreError: the file cannot be locked.
    """
    with explained("lock", path):
        held = take(path, cancelled=cancelled)
    try:
        yield
    finally:
        if held is not None:
            held.release()


@contextmanager
def scratch(tmp: Path) -> Iterator[Path]:
    """A new folder in ``tmp``, removed afterwards; a lock beside it tells that its process lives.

    Raises:
        StoreError: it cannot be made.
    """
    held = None
    with explained("make a scratch folder in", tmp):
        while held is None:
            name = secrets.token_hex(8)
            held = take(tmp / f"{name}.lock", wait=False)
    folder = tmp / name
    try:
        with explained("make", folder):
            os.mkdir(folder)
        yield folder
    finally:
        if held.ours:
            remove_tree(folder)
            held.release(unlink=True)


def reap(tmp: Path) -> None:
    """Remove the scratch folders of dead processes; what cannot be removed is left for the next time."""
    try:
        names = {name.removesuffix(".lock") for name in os.listdir(tmp)}
    except OSError:
        return
    for name in names:
        try:
            held = take(tmp / f"{name}.lock", wait=False)
        except OSError:
            continue
        if held is not None:
            remove_tree(tmp / name)
            held.release(unlink=True)
