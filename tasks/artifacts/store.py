"""The store itself: finding, making and checking artifacts."""

from __future__ import annotations

import errno
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specs.schema.base import Kind
from tasks.artifacts import runs
from tasks.artifacts.collect import Collected, collect, discard
from tasks.artifacts.files import (
    ArtifactDamaged,
    ArtifactMissing,
    StoreError,
    Unsound,
    explained,
    make_folder,
    remove_tree,
    size_of,
    sync_folder,
    write_synced,
)
from tasks.artifacts.layout import Layout, checked_key
from tasks.artifacts.locks import locked, reap, scratch
from tasks.artifacts.records import MANIFEST, content_digest, describe, manifest_body, read_manifest, seal, sound
from tasks.context import Artifact, StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One line of ``Store.ls``: ``size`` in bytes, ``created`` as ISO 8601, ``step`` and ``uses`` from the recipe,
    ``runs`` that pin it. ``problem`` says why the manifest cannot be read; ``kind`` is ``damaged`` then."""

    key: str
    kind: str
    size: int
    created: str
    step: str
    uses: str
    runs: tuple[str, ...]
    recipe: Mapping[str, Any] = field(repr=False)
    problem: str = ""


@dataclass(frozen=True)
class Damage:
    """A record or an artifact that is not what was written: where, and what differs."""

    path: Path
    reason: str
    key: str | None = None


class Store:
    """A content-addressed store under ``root``, shared by any number of processes.

    Args:
        root: a folder on a disk whose locks work between processes; made where it is missing.

    Raises:
        StoreError: it cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self._layout = Layout(self.root)
        with explained("make", self.root):
            make_folder(self.root)
            for folder in self._layout.folders():
                folder.mkdir(exist_ok=True)
            sync_folder(self.root)
        reap(self._layout.tmp)

    def find(self, key: str) -> Artifact | None:
        """The artifact with this key, every byte of it checked; None where there is none. A damaged one is moved to
        quarantine with a warning, and there is none then. Inside of ``working_for`` the key is pinned first.

        Raises:
            StoreError: this process cannot read it (too many open files, no right to): that is not damage.
        """
        runs.used(self._layout, key)
        try:
            return self._load(key)
        except ArtifactDamaged as damage:
            logger.warning("%s", damage)
            return None

    def open(self, key: str) -> Artifact:
        """The artifact with this key, every byte of it checked.

        Raises:
            ArtifactMissing: there is none.
            ArtifactDamaged: it was damaged and is in quarantine now.
            StoreError: this process cannot read it.
        """
        artifact = self._load(key)
        if artifact is None:
            raise ArtifactMissing(
                f"there is no artifact {key} in {self.root}; run the spec again, or see `lathe cache ls`"
            )
        return artifact

    def _load(self, key: str) -> Artifact | None:
        folder = self._layout.artifact(key)
        while True:
            # An open handle keeps the inode's number from being used again, so that it tells one folder from another.
            try:
                with explained("open", folder):
                    handle = os.open(folder, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            except StoreError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    return None
                raise
            try:
                manifest = sound(folder, key)
            except Unsound as why:
                place = self._quarantine(key, handle)
                if place is None:  # another process has replaced or removed what was read
                    continue
                raise ArtifactDamaged(
                    f"artifact {key} is damaged: {why}; it was moved to {place}; run the spec again to make it anew"
                ) from None
            finally:
                os.close(handle)
            return Artifact(key, manifest["kind"], manifest["digest"], folder, manifest)

    def _quarantine(self, key: str, handle: int) -> Path | None:
        folder = self._layout.artifact(key)
        place = self._layout.quarantine / f"{key}.{secrets.token_hex(4)}"
        with locked(self._layout.registry), explained("move to quarantine", folder):
            try:
                if not os.path.samestat(os.fstat(handle), os.lstat(folder)):
                    return None
            except FileNotFoundError:
                return None
            os.rename(folder, place)
            sync_folder(folder.parent)
        return place

    def scratch(self) -> AbstractContextManager[Path]:
        """A new empty folder on the store's disk, removed at the end of the block. If the process dies, the next
        ``Store`` or ``gc`` removes it."""
        return scratch(self._layout.tmp)

    def commit(
        self,
        folder: Path,
        *,
        key: str,
        kind: Kind,
        recipe: Mapping[str, Any],
        result: Mapping[str, Any] | StepResult,
        properties: Mapping[str, Any],
    ) -> Artifact:
        """Make ``folder`` the artifact ``key``. It is whole and on the disk when this returns; before that, nobody
        sees any of it. Where a sound artifact has this key already, that one is returned and ``folder`` is dropped.
        The key's checkpoints are cleared.

        Args:
            folder: in a scratch folder of this store; it is gone afterwards.
            key: from ``tasks.keys``.
            kind: what it is.
            recipe: how it was made, as JSON; ``step`` and ``uses`` in it are shown by ``ls``.
            result: ``summary``, ``touched``, ``left``, ``warnings``, ``metrics``, and ``data``: the keys of the
                encoded data that it was made with.
            properties: what the step recorded, as JSON.

        Raises:
            StoreError: the folder holds what no artifact may hold, or the disk refused; ``folder`` stands as it was,
                so that the commit can be tried again.
        """
        artifact = self.find(key)
        if artifact is None:
            artifact = self._seal(folder, key, kind, recipe, result, properties)
        else:
            remove_tree(folder)
            with explained("sync", artifact.path.parent):
                sync_folder(artifact.path.parent)
        self._clear_checkpoints(key)
        return artifact

    def digest(self, folder: Path) -> str:
        """The content digest that an artifact made of ``folder`` would have.

        Raises:
            StoreError: the folder holds what no artifact may hold, or it cannot be read.
        """
        with explained("read", folder):
            return content_digest(describe(folder)[0])

    def _seal(
        self,
        folder: Path,
        key: str,
        kind: Kind,
        recipe: Mapping[str, Any],
        result: Mapping[str, Any] | StepResult,
        properties: Mapping[str, Any],
    ) -> Artifact:
        with explained("commit", folder):
            files, folders = describe(folder)
            manifest = manifest_body(key, kind, files, recipe, result, properties)
            try:
                write_synced(folder / MANIFEST, seal(manifest))
                for each in folders:
                    sync_folder(each)
                return self._publish(folder, key) or Artifact(
                    key, kind, manifest["digest"], self._layout.artifact(key), manifest
                )
            except BaseException:
                with suppress(OSError):
                    os.unlink(folder / MANIFEST)
                raise

    def _publish(self, folder: Path, key: str) -> Artifact | None:
        """Rename the sealed folder to its place; the artifact that stands there where another process was first."""
        target = self._layout.artifact(key)
        standing = None
        with suppress(FileExistsError):
            os.mkdir(target.parent)
        sync_folder(target.parent.parent)  # even where the folder stood: its maker may not have synced it yet
        while standing is None:
            try:
                os.rename(folder, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                standing = self.find(key)
            else:
                break
        sync_folder(target.parent)
        if standing is not None:
            remove_tree(folder)
        return standing

    def _clear_checkpoints(self, key: str) -> None:
        """Best effort: what stays is whole, and ``gc`` takes it later."""
        with suppress(OSError, StoreError), self.scratch() as trash:
            # Moved before it is removed: half a checkpoint must never be found.
            os.rename(self._layout.checkpoints / key, trash / key)

    def discard(self, key: str) -> None:
        """Remove the artifact with this key, for example to make it anew; nothing happens where there is none.

        Raises:
            StoreError: the disk refused.
        """
        discard(self._layout, key)

    def lock(self, key: str, cancelled: Callable[[], bool] | None = None) -> AbstractContextManager[None]:
        """Hold the key's lock, so that one process makes it while the others wait. It is the kernel's: it ends with
        the process. It cannot be taken twice, not even by the thread that holds it.

        Args:
            key: what is about to be made.
            cancelled: asked at least every quarter of a second while waiting.

        Raises:
            LockCancelled: ``cancelled`` said so.
            StoreError: the file cannot be locked.
        """
        return locked(self._layout.lock(key), cancelled)

    def checkpoints(self, key: str) -> Path:
        """A folder for the key's checkpoints. It survives the process and is cleared by ``commit``; whoever writes
        into it holds the key's lock.

        Raises:
            StoreError: it cannot be made.
        """
        path = self._layout.checkpoints / checked_key(key)
        with explained("make", path):
            make_folder(path)
        return path

    def pin(self, run_id: str, keys: Iterable[str] = (), **info: Any) -> runs.RunRecord:
        """Record that a run needs ``keys``, and facts about it; both are added to what is recorded already. Pin
        before looking for an artifact: what a live run has pinned is never collected.

        Raises:
            StoreError: the run's record is damaged, or the disk refused.
        """
        return runs.pin(self._layout, run_id, keys, info)

    def forget_run(self, run_id: str) -> None:
        """Remove the record of a run; its artifacts go with the next ``gc`` unless another run needs them.

        Raises:
            StoreError: the disk refused.
        """
        runs.forget(self._layout, run_id)

    def run(self, run_id: str) -> runs.RunRecord | None:
        """What a run has pinned; None where it has no record.

        Raises:
            StoreError: the record is damaged.
        """
        return runs.intact_run(self._layout, run_id)

    def lease(self, run_id: str) -> AbstractContextManager[None]:
        """Be the process of this run: while the block lasts the run is alive, and ``gc`` keeps what it has pinned.

        Raises:
            StoreError: the run is alive in another process.
        """
        return runs.lease(self._layout, run_id)

    def leased(self, run_id: str) -> bool:
        """Whether a process holds the lease of this run."""
        with locked(self._layout.registry):
            return run_id in runs.alive(self._layout)

    def gc(self, keep_runs: int | None = None, keep: Iterable[str] = (), dry_run: bool = False) -> Collected:
        """Remove the artifacts and checkpoints that no kept run needs, what is in quarantine, and the records of the
        runs that are not kept. Kept are the ``keep_runs`` newest runs (None: all), those in ``keep``, and every run
        that is alive. While any run is alive, what no record names is kept too, and so is whatever is being made.

        Raises:
            StoreError: a run's record is damaged, so that nobody can tell what it needs; or a run in ``keep`` is
                unknown; or the disk refused. Nothing that a kept run needs is gone then.
        """
        return collect(self._layout, keep_runs, keep, dry_run)

    def ls(self) -> list[Entry]:
        """Every artifact in the store, sorted by key. Contents are not checked; see ``verify``."""
        pinning: dict[str, list[str]] = {}
        for run_id in runs.run_ids(self._layout):
            try:
                record = runs.read_run(self._layout, run_id)
            except Unsound as why:
                logger.warning("the record of run %s is damaged: %s", run_id, why)
                continue
            for key in record.keys if record else ():
                pinning.setdefault(key, []).append(run_id)
        with explained("list", self._layout.artifacts):
            keys = self._layout.standing()
        return [entry for key in keys if (entry := self._entry(key, tuple(pinning.get(key, ()))))]

    def _entry(self, key: str, pinned_by: tuple[str, ...]) -> Entry | None:
        folder = self._layout.artifact(key)
        try:
            manifest = read_manifest(folder, key)
        except Unsound as why:
            if not folder.exists():  # collected meanwhile
                return None
            return Entry(key, "damaged", size_of(folder), "", "", "", pinned_by, {}, str(why))
        recipe = manifest["recipe"]
        shown = [text if isinstance(text := recipe.get(name), str) else "" for name in ("step", "uses")]
        return Entry(key, manifest["kind"], size_of(folder), manifest["created"], shown[0], shown[1], pinned_by, recipe)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[Damage]:
        """Check every byte of every artifact and every run's record, and change nothing.

        Args:
            progress: called with the bytes done and the bytes in all after each artifact.

        Returns:
            What is damaged; the next run that needs such an artifact makes it anew.

        Raises:
            StoreError: this process cannot read something.
        """
        damage = []
        for run_id in runs.run_ids(self._layout):
            try:
                runs.read_run(self._layout, run_id)
            except Unsound as why:
                path, _, reason = str(why).partition(": ")
                damage.append(Damage(Path(path), reason))
        with explained("list", self._layout.artifacts):
            sizes = {key: size_of(self._layout.artifact(key)) for key in self._layout.standing()}
        done = 0
        for key, size in sizes.items():
            folder = self._layout.artifact(key)
            try:
                sound(folder, key)
            except Unsound as why:
                if folder.exists():
                    damage.append(Damage(folder, str(why), key))
            done += size
            if progress is not None:
                progress(done, sum(sizes.values()))
        return damage
