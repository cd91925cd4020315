"""The store under kills, power cuts, full disks, flipped bits and races."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts import Store, StoreError, with_remedy
from tasks.artifacts.records import sound
from tasks.context import Artifact

KEY = "ab" + 62 * "0"
FILES = {"config.json": b'{"a": 1}', "deep/er/model.safetensors": bytes(range(256)) * 64}
_mkdir = os.mkdir  # the step's own folders are no matter of the store: no fault meets them
CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "scandir", "close")


def commit(store: Store, key: str = KEY) -> Artifact:
    with store.scratch() as scratch:
        out = scratch / "out"
        for folder in (out, out / "deep", out / "deep/er"):
            _mkdir(folder)
        for name, content in FILES.items():
            (out / name).write_bytes(content)
        return store.commit(out, key=key, kind="model", recipe={"step": "s"}, result={}, properties={})


def make(root: Path, run: str = "run-1") -> Artifact:
    """What a run does for one step."""
    store = Store(root)
    with store.lease(run):
        store.pin(run, [KEY], spec="s")
        with store.lock(KEY):
            artifact = store.find(KEY)
            if artifact is None:
                (store.checkpoints(KEY) / "last").write_bytes(b"1")
                artifact = commit(store)
        return artifact


@pytest.fixture
def unsynced() -> Iterator[None]:
    """For tests that only kill processes: what was written is there without a sync."""
    with calls_watched(lambda name, args: None):
        yield


@contextmanager
def calls_watched(before: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call ``before(name, arguments)`` before every system call that can change or read the store; nothing is synced
    for real, since the process dies and not the machine."""
    real = {name: getattr(os, name) for name in CALLS}

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            before(name, args)
            return None if name == "fsync" else real[name](*args, **named)

        return call

    try:
        for name in CALLS:
            setattr(os, name, watched(name))
        yield
    finally:
        for name in CALLS:
            setattr(os, name, real[name])


def killed_at(number: int, work: Callable[[], Any]) -> bool:
    """Whether a child that does ``work`` died of ``kill -9`` at its ``number``-th system call; half of a write that it
    dies at is done."""
    child = os.fork()
    if child == 0:
        count = 0
        real_write = os.write

        def before(name: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            count += 1
            if count == number:
                if name == "write":
                    real_write(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            with calls_watched(before):
                work()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def visible(root: Path) -> list[str]:
    """The keys under ``artifacts/``, each of them checked; a torn one raises."""
    folders = sorted(root.glob("artifacts/*/*"))
    for folder in folders:
        sound(folder, folder.name)
    return [folder.name for folder in folders]


def leftovers(root: Path) -> list[str]:
    return [name for folder in ("tmp", "checkpoints", "quarantine") for name in os.listdir(root / folder)]


@pytest.mark.usefixtures("unsynced")
def test_killed_at_every_system_call_of_a_commit(tmp_path: Path) -> None:
    digest = make(tmp_path / "whole").digest
    number, made_before_the_kill = 1, 0
    while True:
        root = tmp_path / str(number)
        killed = killed_at(number, lambda root=root: make(root))
        there = visible(root)
        made_before_the_kill += bool(there)
        assert make(root).digest == digest, f"killed at call {number}"
        store = Store(root)
        record = store.run("run-1")
        assert record is not None
        assert record.keys == (KEY,)
        store.gc()
        assert leftovers(root) == [], f"killed at call {number}"
        assert visible(root) == [KEY]
        shutil.rmtree(root)
        if not killed:
            break
        number += 1
    assert number > 60
    assert 0 < made_before_the_kill < number


@pytest.mark.usefixtures("unsynced")
def test_killed_at_every_system_call_of_a_collection(tmp_path: Path) -> None:
    """What a kept run needs stays whatever happens, and the next collection ends the work."""
    number = 1
    while True:
        root = tmp_path / str(number)
        store = Store(root)
        for key in ("aa", "bb", "cc"):
            commit(store, key)
        store.pin("old", ["aa", "bb"])
        store.pin("new", ["bb"])
        (store.checkpoints("aa") / "x").write_bytes(b"1")
        killed = killed_at(number, lambda root=root: Store(root).gc(keep_runs=1))
        assert "bb" in visible(root)
        store = Store(root)
        store.gc(keep_runs=1)
        assert visible(root) == ["bb"]
        assert store.run("old") is None
        assert store.run("new") is not None
        assert leftovers(root) == []
        shutil.rmtree(root)
        if not killed:
            break
        number += 1
    assert number > 40


class Disk:
    """What a power cut leaves of a folder: of every file and folder, its state when it was last synced, and nothing
    where it never was. Files are told apart by inode, so that renames need no special care."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, drop: int | None = None) -> None:
        self.root = root
        self.synced: dict[int, bytes | dict[str, int]] = {}
        self.count = 0
        self.drop = drop
        self.at_rename: list[Path] = []
        self._handles: list[int] = []  # an inode's number is not used again while it is open
        self._remember(root)
        rename = os.rename

        def renamed(source: Any, target: Any, **named: Any) -> None:
            rename(source, target, **named)
            if Path(target).parent.parent.name == "artifacts":
                self.at_rename.append(self.rebuild(root.parent / f"renamed{len(self.at_rename)}", entries_first=True))

        monkeypatch.setattr(os, "fsync", self._fsync)
        monkeypatch.setattr(os, "rename", renamed)

    def _fsync(self, fd: int) -> None:
        self.count += 1
        if self.count != self.drop:
            self._remember(Path(os.readlink(f"/proc/self/fd/{fd}")))

    def _remember(self, path: Path) -> None:
        self._handles.append(os.open(path, os.O_PATH))
        self.synced[path.stat().st_ino] = _entries(path) if path.is_dir() else path.read_bytes()

    def rebuild(self, place: Path, entries_first: bool = False) -> Path:
        """The folder after the power cut. With ``entries_first`` the disk wrote all entries of folders early and the
        contents of files late, as file systems that log only metadata do."""
        shutil.rmtree(place, ignore_errors=True)
        self._rebuild(self.root.stat().st_ino, place, True, self.root if entries_first else None)
        return place

    def _rebuild(self, inode: int, place: Path, is_folder: bool, now: Path | None) -> None:
        state = self.synced.get(inode)
        if isinstance(state, bytes) or (state is None and not is_folder):
            place.write_bytes(state or b"")
            return
        place.mkdir()
        entries = _entries(now) if now else state
        assert entries is None or isinstance(entries, dict)
        for name, (child, child_is_folder) in (entries or {}).items():
            self._rebuild(child, place / name, child_is_folder, now / name if now else None)

    def close(self) -> None:
        for handle in self._handles:
            os.close(handle)


def _entries(folder: Path) -> dict[str, Any]:
    found = {}
    for path in folder.iterdir():
        mode = path.lstat()
        found[path.name] = (mode.st_ino, stat.S_ISDIR(mode.st_mode))
    return found


@contextmanager
def disk(tmp_path: Path, drop: int | None = None) -> Iterator[Disk]:
    root = tmp_path / f"disk{drop}"
    root.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = Disk(root, monkeypatch, drop)
        try:
            yield made
        finally:
            made.close()


def lasts(root: Path) -> bool:
    """Whether artifact and pin are there after the power cut; a torn artifact raises."""
    visible(root)
    store = Store(root)
    record = store.run("run-1")
    return store.find(KEY) is not None and record is not None and record.keys == (KEY,)


def pinned_commit(root: Path) -> None:
    store = Store(root)
    store.pin("run-1", [KEY])
    commit(store)


def test_a_committed_artifact_survives_a_power_cut(tmp_path: Path) -> None:
    with disk(tmp_path) as whole:
        pinned_commit(whole.root / "store")
        after = whole.rebuild(tmp_path / "after")
    assert lasts(after / "store")
    (renamed,) = whole.at_rename
    assert visible(renamed / "store") == [KEY]


def test_no_sync_can_be_left_out(tmp_path: Path) -> None:
    with disk(tmp_path) as whole:
        pinned_commit(whole.root / "store")
    assert whole.count == 12  # root and its parent, a record and its folder, 2 files, manifest, 3 + 2 folders
    for number in range(1, whole.count + 1):
        with disk(tmp_path, drop=number) as cut:
            pinned_commit(cut.root / "store")
            after = cut.rebuild(tmp_path / f"after{number}")
        try:
            lost = not lasts(after / "store")
        except Exception:
            lost = True
        assert lost, f"sync {number} is not needed"


def test_files_are_synced_before_the_rename(tmp_path: Path) -> None:
    """Where entries reach the disk before contents, a missing sync of a file would show a torn artifact."""
    torn = 0
    for number in range(1, 13):
        with disk(tmp_path, drop=number) as cut:
            pinned_commit(cut.root / "store")
        try:
            visible(cut.at_rename[0] / "store")
        except Exception:
            torn += 1
    assert torn == len(FILES) + 1


def test_the_second_maker_syncs_what_the_first_did_not(tmp_path: Path) -> None:
    """A process may find an artifact that another has renamed and not yet synced; what it returns must last."""
    with disk(tmp_path, drop=12) as cut:
        pinned_commit(cut.root / "store")
        assert not lasts(cut.rebuild(tmp_path / "first") / "store")
        commit(Store(cut.root / "store"))
        assert lasts(cut.rebuild(tmp_path / "second") / "store")


class Failing:
    """Lets the ``number``-th call that can meet this error fail."""

    MEET: dict[int, tuple[str, ...]] = {  # noqa: RUF012
        errno.ENOSPC: ("open", "write", "fsync", "rename", "mkdir"),
        errno.EIO: ("open", "write", "fsync", "rename", "mkdir", "unlink", "scandir"),
        errno.EMFILE: ("open", "scandir"),
    }

    def __init__(self, number: int, code: int) -> None:
        self.number, self.code, self.count = number, code, 0

    def __call__(self, name: str, args: tuple[Any, ...]) -> None:
        if name in self.MEET[self.code]:
            self.count += 1
            if self.count == self.number:
                raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", sorted(Failing.MEET), ids=errno.errorcode.get)
@pytest.mark.usefixtures("unsynced")
def test_the_disk_fails_at_every_call(tmp_path: Path, code: int) -> None:
    digest = make(tmp_path / "whole").digest
    number, refused = 1, 0
    while True:
        root = tmp_path / str(number)
        failing = Failing(number, code)
        try:
            with calls_watched(failing):
                make(root)
        except StoreError as error:
            refused += 1
            text = str(error)
            assert "\n" not in text
            assert str(root.parent) in text
            assert os.strerror(code) in text
            assert "; " in text
        if (root / "artifacts").exists():
            assert visible(root) in ([], [KEY])
        assert make(root).digest == digest, f"failed at call {number}"
        Store(root).gc()
        assert leftovers(root) == []
        shutil.rmtree(root)
        if failing.count < number:
            break
        number += 1
    assert refused > 5


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES], ids=errno.errorcode.get)
def test_no_artifact_is_given_up_for_the_readers_own_trouble(tmp_path: Path, code: int) -> None:
    store = Store(tmp_path)
    made = commit(store)
    number = 1
    while True:
        count = 0

        def before(name: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if name in ("open", "scandir"):
                count += 1
                if count == number:  # noqa: B023
                    raise OSError(code, os.strerror(code))

        with calls_watched(before):
            try:
                found: Artifact | str = store.find(KEY) or "given up"
            except StoreError as error:
                found = str(error)
        assert found == made or os.strerror(code) in str(found)
        assert leftovers(tmp_path) == []
        if count < number:
            break
        number += 1
    assert number > 5
    assert store.find(KEY) == made


def test_a_disk_that_cannot_read_a_file_is_damage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store)

    def before(name: str, args: tuple[Any, ...]) -> None:
        if name == "open" and str(args[0]).endswith("config.json"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with calls_watched(before):
        assert store.find(KEY) is None
    assert len(os.listdir(tmp_path / "quarantine")) == 1


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:7]))
    assert make(tmp_path).digest == Store(tmp_path).open(KEY).digest


@pytest.mark.usefixtures("unsynced")
def test_random_flips_in_every_file_are_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.pin("run-1", [KEY])
    artifact = commit(store)
    files = sorted(path for path in artifact.path.rglob("*") if path.is_file())
    contents = {path: path.read_bytes() for path in files}
    record = tmp_path / "runs" / "run-1.json"
    pinned = record.read_bytes()
    seed = 7
    chooser = random.Random(seed)

    def flipped(content: bytes) -> tuple[bytes, int]:
        at = chooser.randrange(8 * len(content))
        changed = bytearray(content)
        changed[at // 8] ^= 1 << at % 8
        return bytes(changed), at

    for turn in range(400):
        path = files[turn % len(files)]
        changed, at = flipped(contents[path])
        path.write_bytes(changed)
        assert store.find(KEY) is None, f"{path.name}, bit {at}, seed {seed}"
        (place,) = (tmp_path / "quarantine").iterdir()
        place.rename(artifact.path)
        path.write_bytes(contents[path])
    for _ in range(200):
        changed, at = flipped(pinned)
        record.write_bytes(changed)
        with pytest.raises(StoreError, match="damaged"):
            store.gc(keep_runs=0)
        assert record.read_bytes() == changed
    record.write_bytes(pinned)
    assert store.find(KEY) == artifact


def children(count: int, work: Callable[[int], None], report: Path) -> None:
    """Do ``work(0)`` to ``work(count - 1)`` at the same time in as many processes; all of them must succeed."""
    gate, opener = os.pipe()
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(opener)
                os.read(gate, 1)  # returns when the parent closes its end
                work(number)
                code = 0
            except BaseException:
                report.with_suffix(f".{number}").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        pids.append(pid)
    os.close(gate)
    os.close(opener)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    failures = [path.read_text() for path in report.parent.glob(f"{report.name}.*")]
    assert codes == [0] * count, "\n".join(failures)


ROUNDS = 20
WORKERS = 4


@pytest.mark.parametrize("keep_runs", [None, 0])
@pytest.mark.usefixtures("unsynced")
def test_runs_race_for_the_same_keys_while_gc_runs(tmp_path: Path, keep_runs: int | None) -> None:
    root, log = tmp_path / "store", tmp_path / "made"
    log.touch()

    def run(number: int) -> None:
        for turn in range(ROUNDS):
            key, name = f"{turn:04d}", f"run-{number}-{turn}"
            store = Store(root)
            with store.lease(name):
                store.pin(name, [key])
                with store.lock(key):
                    if store.find(key) is None:
                        commit(store, key)
                        with open(log, "a") as file:
                            file.write(f"{key}\n")
                assert store.open(key).properties == {}
        (tmp_path / f"done{number}").touch()

    def work(number: int) -> None:
        if number < WORKERS:
            return run(number)
        while len(list(tmp_path.glob("done*"))) < WORKERS:
            if any(tmp_path.glob("report.*")):
                return None
            Store(root).gc(keep_runs=keep_runs)
        return None

    children(WORKERS + 2, work, tmp_path / "report")
    keys = [f"{turn:04d}" for turn in range(ROUNDS)]
    made = sorted(log.read_text().split())
    if keep_runs is None:
        assert made == keys
        assert visible(root) == keys
    else:
        assert sorted(set(made)) == keys
    store = Store(root)
    store.gc(keep_runs=0)
    assert visible(root) == []
    assert leftovers(root) == []
    assert os.listdir(root / "locks") == [".registry"]
    assert os.listdir(root / "runs") == []


@pytest.mark.usefixtures("unsynced")
def test_commits_of_one_key_at_once_agree(tmp_path: Path) -> None:
    root = tmp_path / "store"

    def work(number: int) -> None:
        for turn in range(ROUNDS):
            made = commit(Store(root), f"{turn:04d}")
            (tmp_path / f"{number}-{turn}").write_text(made.manifest["created"])

    children(WORKERS, work, tmp_path / "report")
    for turn in range(ROUNDS):
        assert len({(tmp_path / f"{number}-{turn}").read_text() for number in range(WORKERS)}) == 1
    assert len(visible(root)) == ROUNDS
    assert leftovers(root) == []


@pytest.mark.usefixtures("unsynced")
def test_readers_that_find_damage_at_once_agree(tmp_path: Path) -> None:
    """Only the damaged folder goes to quarantine, never the good one that a faster process has put in its place."""
    root = tmp_path / "store"
    for turn in range(ROUNDS):
        artifact = commit(Store(root), f"{turn:04d}")
        (artifact.path / "config.json").write_bytes(b'{"a": 2}')

    def work(number: int) -> None:
        for turn in range(ROUNDS):
            store = Store(root)
            if store.find(f"{turn:04d}") is None:
                commit(store, f"{turn:04d}")
            assert store.find(f"{turn:04d}") is not None

    children(WORKERS, work, tmp_path / "report")
    assert len(visible(root)) == ROUNDS
    assert len(os.listdir(root / "quarantine")) == ROUNDS


def test_a_full_disk_has_its_remedy_in_whichever_words_it_is_told(tmp_path: Path) -> None:
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with pytest.raises(OSError, match="No space left") as full, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"1")
    with pytest.raises(SafetensorError, match=r"\(os error 2\)") as missing:
        save_file({"a": np.zeros(4)}, tmp_path / "none" / "a.safetensors")
    in_rust = SafetensorError(str(missing.value).replace("os error 2", f"os error {errno.ENOSPC}"))
    for error in (full.value, in_rust):
        told = with_remedy(error)
        assert told.startswith(f"{type(error).__name__}: ")
        assert told.endswith("; free some space, run `lathe cache gc`, or put the store on a larger disk")
    assert with_remedy(missing.value) == f"SafetensorError: {missing.value}"
    denied = PermissionError(errno.EACCES, "Permission denied", "/data/x")
    assert with_remedy(denied) == f"PermissionError: {denied}", "the remedy for the store would be wrong here"
    assert with_remedy(ValueError("odd")) == "ValueError: odd"
