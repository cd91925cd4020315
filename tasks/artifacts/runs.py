"""Which run refers to which artifacts, and which runs are alive."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.artifacts.files import StoreError, Unsound, explained, read_bytes, reading, sync_folder, write_synced
from tasks.artifacts.layout import Layout, checked_key, checked_run
from tasks.artifacts.locks import Held, locked, take
from tasks.artifacts.records import VERSION, now, seal, unseal

_work: tuple[str, set[str]] | None = None

_RECORD = ".json"
_LEASE = ".lease"
_NEW = ".new"


@dataclass(frozen=True)
class RunRecord:
    """What a run has pinned. ``created`` and ``updated`` are ISO 8601 in UTC."""

    run_id: str
    created: str
    updated: str
    keys: tuple[str, ...]
    info: Mapping[str, Any] = field(default_factory=dict)


def _path(layout: Layout, run_id: str) -> Path:
    return layout.runs / f"{checked_run(run_id)}{_RECORD}"


def _lease(layout: Layout, run_id: str) -> Path:
    return layout.runs / f"{checked_run(run_id)}{_LEASE}"


def read_run(layout: Layout, run_id: str) -> RunRecord | None:
    """The record of a run; None where it has none.

    Raises:
        Unsound: the record is damaged.
        StoreError: it cannot be read.
    """
    path = _path(layout, run_id)
    with reading(path, str(path)):
        try:
            raw = read_bytes(path)
        except FileNotFoundError:
            return None
    try:
        body = unseal(raw)
    except Unsound as why:
        raise Unsound(f"{path}: {why}") from None
    if isinstance(body.get("version"), int) and body["version"] > VERSION:
        raise StoreError(f"{path} was written by a newer version of Lathe; upgrade, or use another store")
    if body.get("run_id") != run_id or set(body) != {"version", "run_id", "created", "updated", "keys", "info"}:
        raise Unsound(f"{path}: it is not the record of this run")
    return RunRecord(run_id, body["created"], body["updated"], tuple(body["keys"]), body["info"])


def intact_run(layout: Layout, run_id: str) -> RunRecord | None:
    """As ``read_run``, for callers that must not go on when a record is damaged.

    Raises:
        StoreError: the record is damaged or cannot be read.
    """
    try:
        return read_run(layout, run_id)
    except Unsound as why:
        raise StoreError(
            f"the record of run {run_id} is damaged ({why}), so nobody can tell what it needs; "
            "delete that file to give the run up, and try again"
        ) from None


def run_ids(layout: Layout) -> list[str]:
    """The runs that have a record, sorted by name."""
    with explained("list", layout.runs):
        names = sorted(os.listdir(layout.runs))
    return [name.removesuffix(_RECORD) for name in names if name.endswith(_RECORD) and not name.startswith(".")]


def pin(layout: Layout, run_id: str, keys: Iterable[str], info: Mapping[str, Any]) -> RunRecord:
    """Add keys and facts to the record of a run; see ``Store.pin``."""
    wanted = {checked_key(key) for key in keys}
    path = _path(layout, run_id)
    with locked(layout.registry):
        before = intact_run(layout, run_id) or RunRecord(run_id, now(), "", ())
        after = RunRecord(
            run_id, before.created, now(), tuple(sorted({*before.keys, *wanted})), {**before.info, **info}
        )
        body = {
            "version": VERSION,
            "run_id": run_id,
            "created": after.created,
            "updated": after.updated,
            "keys": list(after.keys),
            "info": dict(after.info),
        }
        try:
            content = seal(body)
        except (TypeError, ValueError) as why:
            raise StoreError(f"the facts of run {run_id} are not JSON: {why}; use plain finite values") from None
        with explained("write", path):
            write_synced(layout.runs / _NEW, content)
            os.rename(layout.runs / _NEW, path)
            sync_folder(layout.runs)
    return after


@contextmanager
def working_for(run_id: str) -> Iterator[set[str]]:
    """Within the block this process works for a run: what ``Store.find`` is asked for is pinned for it.

    Yields:
        The keys that were asked for so far.
    """
    global _work
    former, _work = _work, (run_id, set())
    try:
        yield _work[1]
    finally:
        _work = former


def used(layout: Layout, key: str) -> None:
    """Pin the key for the run that this process works for, if there is one."""
    if _work is None:
        return
    run_id, keys = _work
    if key not in keys:
        pin(layout, run_id, [key], {})
        keys.add(key)


def forget(layout: Layout, run_id: str) -> None:
    """Remove the record of a run; see ``Store.forget_run``."""
    with locked(layout.registry):
        drop(layout, [run_id])


def drop(layout: Layout, names: Iterable[str]) -> None:
    """Remove records while the registry is held."""
    with explained("remove a record from", layout.runs):
        for run_id in names:
            with suppress(FileNotFoundError):
                os.unlink(_path(layout, run_id))
        sync_folder(layout.runs)


@contextmanager
def lease(layout: Layout, run_id: str) -> Iterator[None]:
    """Hold the lease of a run; see ``Store.lease``."""
    path = _lease(layout, run_id)
    with locked(layout.registry), explained("lock", path):
        held = take(path, wait=False)
    if held is None:
        raise StoreError(f"run {run_id} is alive in another process; wait for its end or start a new run")
    try:
        yield
    finally:
        _end_lease(layout, held)


def _end_lease(layout: Layout, held: Held) -> None:
    # The file goes under the registry, so that whoever looks for live runs never takes a file that is about to go.
    try:
        if held.ours:
            with locked(layout.registry):
                held.release(unlink=True)
    finally:
        held.release()


def alive(layout: Layout) -> set[str]:
    """The runs whose lease a process holds, found while the registry is held; leases of dead processes are removed."""
    found = set()
    with explained("look for live runs in", layout.runs):
        for name in sorted(os.listdir(layout.runs)):
            if name.endswith(_LEASE):
                held = take(layout.runs / name, wait=False)
                if held is None:
                    found.add(name.removesuffix(_LEASE))
                else:
                    held.release(unlink=True)
    return found
