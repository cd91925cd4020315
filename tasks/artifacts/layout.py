"""Where everything is in a store, and which names may stand there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tasks.artifacts.files import StoreError

_KEY = re.compile(r"[0-9a-z]{2}[0-9a-z_-]{0,126}")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,126}")


def checked_key(key: str) -> str:
    """``key`` itself.

    Raises:
        StoreError: it cannot name a folder of the store.
    """
    if not _KEY.fullmatch(key):
        raise StoreError(
            f"{key!r} is not a key: lower-case letters, digits, _ and -, at least two; list keys with `lathe cache ls`"
        )
    return key


def checked_run(run_id: str) -> str:
    """``run_id`` itself.

    Raises:
        StoreError: it cannot name a file of the store.
    """
    if not _RUN.fullmatch(run_id):
        raise StoreError(
            f"{run_id!r} is not a run's name: letters, digits, _, . and - only, beginning with a letter or a digit"
        )
    return run_id


@dataclass(frozen=True)
class Layout:
    """The paths under ``root``; see the package's docstring."""

    root: Path

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def locks(self) -> Path:
        return self.root / "locks"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def registry(self) -> Path:
        """The lock under which runs are recorded and artifacts leave; no key begins with a dot."""
        return self.locks / ".registry"

    def folders(self) -> tuple[Path, ...]:
        return (self.artifacts, self.tmp, self.locks, self.checkpoints, self.quarantine, self.runs)

    def artifact(self, key: str) -> Path:
        return self.artifacts / key[:2] / checked_key(key)

    def lock(self, key: str) -> Path:
        return self.locks / f"{checked_key(key)}.lock"

    def standing(self) -> list[str]:
        """The keys of everything that stands under ``artifacts/``, sorted; whether it is sound is not looked at."""
        shards = [shard for shard in sorted(self.artifacts.iterdir()) if shard.is_dir()]
        return [key for shard in shards for key in _keys(shard) if key[:2] == shard.name]

    def unfinished(self) -> list[str]:
        """The keys that have checkpoints, sorted."""
        return _keys(self.checkpoints)

    def lockable(self) -> list[str]:
        """The keys that have a lock's file, sorted."""
        return _keys(self.locks, ".lock")


def _keys(folder: Path, suffix: str = "") -> list[str]:
    """What stands in ``folder`` under a key, and not what somebody else put there."""
    names = (path.name for path in folder.iterdir() if path.name.endswith(suffix))
    return sorted(key for name in names if _KEY.fullmatch(key := name.removesuffix(suffix)))
