"""Garbage collection: what no kept run refers to leaves the store."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from specs.schema.suggest import nearest
from tasks.artifacts import runs
from tasks.artifacts.files import StoreError, explained, remove_tree, size_of, sync_folder
from tasks.artifacts.layout import Layout
from tasks.artifacts.locks import locked, reap, scratch, take


@dataclass(frozen=True)
class Collected:
    """What a collection did, or would do.

    Args:
        freed: bytes.
        removed: keys of the artifacts that left.
        runs: ids of the runs whose records left.
        kept: how many artifacts stay.
        dry_run: True where nothing was done.
    """

    freed: int
    removed: tuple[str, ...]
    runs: tuple[str, ...]
    kept: int
    dry_run: bool


@dataclass(frozen=True)
class _Plan:
    """What may leave: artifacts and checkpoints by their keys, and runs. ``standing`` are all artifacts."""

    artifacts: tuple[str, ...]
    checkpoints: tuple[str, ...]
    runs: tuple[str, ...]
    standing: frozenset[str]


def collect(layout: Layout, keep_runs: int | None, keep: Iterable[str], dry_run: bool) -> Collected:
    """See ``Store.gc``."""
    if keep_runs is not None and keep_runs < 0:
        raise StoreError(f"keep_runs is {keep_runs}; give how many of the newest runs are kept, 0 or more")
    if not dry_run:
        reap(layout.tmp)
    with scratch(layout.tmp) as trash:
        with locked(layout.registry), explained("move to the trash", trash):
            plan = _plan(layout, keep_runs, set(keep))
            folders = [place for key, place in _places(layout, plan) if _leave(layout, key, place, trash, dry_run)]
            if dry_run:
                folders += layout.quarantine.iterdir()
            else:
                _throw(list(layout.quarantine.iterdir()), trash)
                if plan.runs:  # last, so that an interrupted collection is finished by the next one
                    runs.drop(layout, plan.runs)
        freed = sum(size_of(folder) for folder in folders) if dry_run else size_of(trash)
    if not dry_run:
        _forget_locks(layout)
    removed = tuple(path.name for path in folders if path.parent.parent == layout.artifacts)
    return Collected(freed, removed, plan.runs, len(plan.standing) - len(removed), dry_run)


def _plan(layout: Layout, keep_runs: int | None, keep: set[str]) -> _Plan:
    records = [record for run_id in runs.run_ids(layout) if (record := runs.intact_run(layout, run_id))]
    known = {record.run_id for record in records}
    for run_id in sorted(keep - known):
        raise StoreError(f"there is no run {run_id!r} to keep; {nearest(run_id, sorted(known))}")
    live = runs.alive(layout)
    newest = sorted(records, key=lambda record: (record.created, record.run_id), reverse=True)[:keep_runs]
    kept = keep | live | {record.run_id for record in newest}
    wanted = {key for record in records if record.run_id in kept for key in record.keys}
    standing = frozenset(layout.standing())
    unfinished = set(layout.unfinished())
    going = (standing | unfinished) - wanted
    if live:  # what no record names may be in use by somebody who works for no run
        going &= {key for record in records for key in record.keys}
    return _Plan(
        tuple(sorted(going & standing)),
        tuple(sorted(unfinished & (going | standing))),  # what is made needs its checkpoints no more
        tuple(sorted(known - kept)),
        standing,
    )


def _places(layout: Layout, plan: _Plan) -> list[tuple[str, Path]]:
    artifacts = [(key, layout.artifact(key)) for key in plan.artifacts]
    return artifacts + [(key, layout.checkpoints / key) for key in plan.checkpoints]


def _leave(layout: Layout, key: str, place: Path, trash: Path, dry_run: bool) -> bool:
    """Move what stands at ``place`` into ``trash``; False where somebody is making ``key``."""
    held = take(layout.lock(key), wait=False)
    if held is None:
        return False
    try:
        if not dry_run:
            _throw([place], trash)
        return True
    finally:
        held.release()


def _throw(places: list[Path], trash: Path) -> None:
    for place in places:
        os.rename(place, trash / secrets.token_hex(8))
        sync_folder(place.parent)


def _forget_locks(layout: Layout) -> None:
    """Remove the lock files of keys that have neither an artifact nor a checkpoint."""
    with explained("look through", layout.locks):
        for key in layout.lockable():
            if layout.artifact(key).exists() or (layout.checkpoints / key).exists():
                continue
            held = take(layout.lock(key), wait=False)
            if held is not None:
                held.release(unlink=True)


def discard(layout: Layout, key: str) -> None:
    """See ``Store.discard``."""
    folder = layout.artifact(key)
    with scratch(layout.tmp) as trash:
        with locked(layout.registry), explained("remove", folder):
            try:
                os.rename(folder, trash / key)
            except FileNotFoundError:
                return
            sync_folder(folder.parent)
        remove_tree(trash)
