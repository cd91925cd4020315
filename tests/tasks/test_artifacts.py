"""The store: what it promises when nothing goes wrong, and when people or steps do."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.artifacts import MANIFEST, ArtifactDamaged, ArtifactMissing, LockCancelled, Store, StoreError, working_for
from tasks.artifacts.files import Unsound, hash_file
from tasks.artifacts.locks import take
from tasks.artifacts.records import seal, unseal
from tasks.context import Artifact, StepResult
from tasks.keys import digest_json

KEY = "ab" + 62 * "0"
OTHER = "cd" + 62 * "1"
FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 8, "deep/er/vocab.txt": b"x\ny\n"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def put(store: Store, key: str = KEY, files: dict[str, bytes] | None = None, **named: Any) -> Artifact:
    with store.scratch() as scratch:
        out = write(scratch / "out", FILES if files is None else files)
        given = {"kind": "model", "recipe": {"step": "slim", "uses": "prune"}, "result": {}, "properties": {}}
        return store.commit(out, key=key, **{**given, **named})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_commit_then_find_gives_what_was_written(store: Store) -> None:
    result = StepResult(
        kind="model", touched=("a", "b"), summary="did it", left={"c": "tied"}, metrics={"loss": 0.5}, warnings=("w",)
    )
    made = put(store, result=result, properties={"layers": (1, 2)})
    found = store.find(KEY)
    assert found == made
    assert {str(path.relative_to(found.path)) for path in found.path.rglob("*") if path.is_file()} == {
        *FILES,
        MANIFEST,
    }
    assert all((found.path / name).read_bytes() == content for name, content in FILES.items())
    assert found.properties == {"layers": [1, 2]}
    assert found.manifest["result"] == {
        "summary": "did it",
        "touched": ["a", "b"],
        "left": {"c": "tied"},
        "warnings": ["w"],
        "metrics": {"loss": 0.5},
        "data": [],
    }
    on_disk = json.loads((found.path / MANIFEST).read_text())
    assert on_disk.pop("checksum") == digest_json(on_disk)
    assert on_disk == found.manifest
    assert store.open(KEY) == made
    assert not os.listdir(store.root / "tmp")


def test_a_file_is_known_by_its_sha256_and_a_link_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert hash_file(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()
    (tmp_path / "link").symlink_to(tmp_path / "x")
    with pytest.raises(OSError, match="symbolic link"):
        hash_file(tmp_path / "link")


def test_the_digest_is_of_the_content_alone(store: Store) -> None:
    first = put(store, KEY, recipe={"a": 1}, properties={"p": 1})
    assert put(store, OTHER, kind="packed", recipe={"b": 2}).digest == first.digest
    renamed = {**{f"{name}2": content for name, content in FILES.items()}}
    assert put(store, "ee", renamed).digest != first.digest
    changed = {**FILES, "config.json": b'{"a": 2}'}
    assert put(store, "ff", changed).digest != first.digest


def test_the_first_commit_of_a_key_stands(store: Store) -> None:
    first = put(store)
    second = put(store, files={"config.json": b"other"})
    assert second == first
    assert store.open(KEY).manifest["created"] == first.manifest["created"]


def test_missing(store: Store) -> None:
    assert store.find(KEY) is None
    with pytest.raises(ArtifactMissing, match=KEY):
        store.open(KEY)


def damage_file(folder: Path) -> str:
    (folder / "config.json").write_bytes(b'{"a": 2}')
    return "config.json: its content differs"


def shorten(folder: Path) -> str:
    os.truncate(folder / "model.safetensors", 100)
    return "model.safetensors: it has 100 bytes instead of 2048"


def lose(folder: Path) -> str:
    (folder / "deep/er/vocab.txt").unlink()
    return "deep/er/vocab.txt: it is missing"


def add(folder: Path) -> str:
    (folder / "extra.py").write_text("")
    return "extra.py: it does not belong"


def link(folder: Path) -> str:
    content = folder.parent / "elsewhere"
    content.write_bytes(FILES["config.json"])
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(content)
    return "config.json: it is a symbolic link"


def without_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return "manifest.json: No such file"


def foreign_manifest(folder: Path) -> str:
    body = unseal((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(seal({**body, "key": OTHER}))
    return f"manifest.json: it belongs to {OTHER}"


def wrong_digest(folder: Path) -> str:
    body = unseal((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(seal({**body, "digest": "0" * 64}))
    return "manifest.json: the digest does not fit"


def edited_manifest(folder: Path) -> str:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"model"', '"packed"'))
    return "manifest.json: its bytes differ"


def replaced_by_file(folder: Path) -> str:
    folder.rename(folder.parent / "aside")
    folder.write_text("not a folder")
    return "manifest.json: Not a directory"


DAMAGES = [
    damage_file,
    shorten,
    lose,
    add,
    link,
    without_manifest,
    foreign_manifest,
    wrong_digest,
    edited_manifest,
    replaced_by_file,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_goes_to_quarantine_and_the_key_can_be_made_again(
    store: Store, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = put(store)
    reason = damage(artifact.path)
    assert [(found.key, found.reason[: len(reason)]) for found in store.verify()] == [(KEY, reason)]
    with caplog.at_level(logging.WARNING):
        assert store.find(KEY) is None
    assert reason in caplog.text
    assert not artifact.path.exists()
    assert len(os.listdir(store.root / "quarantine")) == 1
    assert put(store).digest == artifact.digest
    assert store.verify() == []


def test_open_says_what_is_damaged_and_what_to_do(store: Store) -> None:
    damage_file(put(store).path)
    with pytest.raises(ArtifactDamaged, match=r"config\.json.*quarantine.*run the spec again"):
        store.open(KEY)
    with pytest.raises(ArtifactMissing):
        store.open(KEY)


def test_a_manifest_of_a_newer_version_is_not_damage(store: Store) -> None:
    artifact = put(store)
    body = unseal((artifact.path / MANIFEST).read_bytes())
    (artifact.path / MANIFEST).write_bytes(seal({**body, "version": 2, "more": 1}))
    with pytest.raises(StoreError, match="newer version"):
        store.find(KEY)
    assert artifact.path.exists()


@pytest.mark.parametrize(
    "name", ["model.pkl", "pytorch_model.bin", "a/B.PT", "x.pth", "x.ckpt", "x.joblib", "x.pickle", MANIFEST]
)
def test_files_that_no_artifact_may_hold(store: Store, name: str) -> None:
    with pytest.raises(StoreError, match=Path(name).name):
        put(store, files={**FILES, name: b"x"})
    assert store.find(KEY) is None
    assert store.ls() == []


def test_only_plain_files_become_artifacts(store: Store, tmp_path: Path) -> None:
    def refused(make: Any, match: str) -> None:
        with store.scratch() as scratch:
            out = write(scratch / "out", FILES)
            make(out)
            with pytest.raises(StoreError, match=match):
                store.commit(out, key=KEY, kind="model", recipe={}, result={}, properties={})
        assert store.find(KEY) is None

    secret = tmp_path / "secret"
    secret.write_text("s")
    refused(lambda out: (out / "link").symlink_to(secret), "link: it is a symbolic link")
    refused(lambda out: (out / "up").symlink_to(tmp_path), "up: it is a symbolic link")
    refused(lambda out: os.mkfifo(out / "pipe"), "pipe: it is not a regular file")
    refused(lambda out: open(os.fsencode(out) + b"/\xff", "wb").close(), "not UTF-8")
    refused(lambda out: [path.unlink() for path in out.rglob("*") if path.is_file()], "no files")
    refused(lambda out: out.rename(out.parent / "gone"), "No such file")


@pytest.mark.parametrize(
    ("named", "match"),
    [
        ({"kind": "modle"}, "'modle' is not a kind"),
        ({"properties": {"x": float("nan")}}, "properties.*not JSON"),
        ({"properties": {1: "x"}}, "properties.*not JSON"),
        ({"recipe": {"x": object()}}, "recipe.*not JSON"),
        ({"result": {"sumary": ""}}, "no field sumary"),
        ({"key": "../../etc"}, "is not a key"),
        ({"key": "A" * 64}, "is not a key"),
    ],
)
def test_what_commit_refuses(store: Store, named: dict[str, Any], match: str) -> None:
    with pytest.raises(StoreError, match=match):
        put(store, **named)
    assert store.ls() == []


def test_a_failed_commit_can_be_tried_again_with_the_same_folder(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    given: dict[str, Any] = {"key": KEY, "kind": "model", "recipe": {}, "result": {}, "properties": {}}
    with store.scratch() as scratch:
        out = write(scratch / "out", FILES)
        for name in ("write", "rename"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, full)
                with pytest.raises(StoreError, match=r"No space left.*lathe cache gc"):
                    store.commit(out, **given)
            assert store.find(KEY) is None
        assert store.commit(out, **given) == store.find(KEY)


def test_checkpoints_last_until_the_commit(store: Store) -> None:
    (store.checkpoints(KEY) / "step-1.safetensors").write_bytes(b"1")
    assert os.listdir(Store(store.root).checkpoints(KEY)) == ["step-1.safetensors"]
    put(store)
    assert os.listdir(store.root / "checkpoints") == []
    (store.checkpoints(KEY) / "late").write_bytes(b"1")
    put(store)
    assert os.listdir(store.root / "checkpoints") == []


def test_discard(store: Store) -> None:
    first = put(store)
    store.discard(KEY)
    store.discard(KEY)
    assert store.find(KEY) is None
    assert put(store, files={"other": b"1"}).digest != first.digest
    assert not os.listdir(store.root / "tmp")


def test_a_store_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot make .*file.*: .*; .*run again"):
        Store(tmp_path / "file" / "store")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(body=st.dictionaries(st.text().filter(lambda name: name != "checksum"), JSON_VALUES), data=st.data())
def test_any_flipped_bit_of_a_record_is_found(body: dict[str, Any], data: st.DataObject) -> None:
    raw = seal(body)
    assert unseal(raw) == body
    at = data.draw(st.integers(0, 8 * len(raw) - 1))
    flipped = bytearray(raw)
    flipped[at // 8] ^= 1 << at % 8
    with pytest.raises(Unsound):
        unseal(bytes(flipped))


def test_every_single_bit_of_a_record_that_reads_the_same(store: Store) -> None:
    raw = seal({"letter": "ä", "small": 1e-7, "n": 1})
    for at in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(Unsound):
            unseal(bytes(flipped))


def test_the_lock_is_exclusive_and_can_be_cancelled(store: Store) -> None:
    stop, entered = Event(), Event()

    def other() -> None:
        with Store(store.root).lock(KEY):
            entered.set()

    with store.lock(KEY), store.lock(OTHER):
        thread = Thread(target=other)
        thread.start()
        assert not entered.wait(0.2)
        stop.set()
        with pytest.raises(LockCancelled), store.lock(KEY, cancelled=stop.is_set):
            pass
    assert entered.wait(5)
    thread.join()


def test_a_lock_whose_file_is_removed_in_the_last_moment_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.lock"
    flock, others = fcntl.flock, []

    def late(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        os.unlink(path)
        others.append(take(path, wait=False))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert take(path, wait=False) is None
    assert others[0] is not None
    others[0].release()


CHILD = """
import sys, time
from pathlib import Path
from tasks.artifacts import Store
store = Store(Path(sys.argv[1]))
with store.lease("run-1"), store.lock("abcd"), store.scratch() as scratch:
    (scratch / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_holds_nothing_and_leaves_nothing(store: Store) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(store.root)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        second = Store(store.root)  # reaps at its start
        assert len(list((store.root / "tmp").glob("*/half"))) == 1
        assert second.leased("run-1")
        with pytest.raises(StoreError, match="alive in another process"), second.lease("run-1"):
            pass
        with pytest.raises(LockCancelled), second.lock("abcd", cancelled=lambda: True):
            pass
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert not store.leased("run-1")
    with store.lock("abcd", cancelled=lambda: True), store.lease("run-1"):
        pass
    assert os.listdir(store.root / "tmp") != []
    store.gc()
    assert os.listdir(store.root / "tmp") == []


FORKING_CHILD = """
import os, sys, time
from pathlib import Path
from tasks.artifacts import Store
store = Store(Path(sys.argv[1]))
with store.lease("run-1"), store.lock("abcd"), store.scratch() as scratch:
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_locks_end_with_their_process_though_a_forked_child_lives(store: Store) -> None:
    parent = subprocess.Popen([sys.executable, "-c", FORKING_CHILD, str(store.root)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        assert store.leased("run-1")
        parent.kill()
        parent.wait()
        os.kill(child, 0)
        assert not store.leased("run-1")
        with store.lock("abcd", cancelled=lambda: True):
            pass
        store.gc()
        assert os.listdir(store.root / "tmp") == []
    finally:
        parent.kill()
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def test_unwinding_a_scratch_in_a_forked_child_leaves_it_to_the_parent(store: Store) -> None:
    with store.scratch() as scratch:
        context = store.scratch()
        mine = context.__enter__()
        child = os.fork()
        if child == 0:
            context.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        assert mine.is_dir()
        context.__exit__(None, None, None)
        assert not mine.exists()
        assert scratch.is_dir()


def test_pins_add_up(store: Store) -> None:
    store.pin("run-1", [KEY], spec="a", n=1)
    record = store.pin("run-1", [OTHER], n=2)
    assert record == Store(store.root).run("run-1")
    assert (record.keys, record.info) == ((KEY, OTHER), {"spec": "a", "n": 2})
    assert record.created < record.updated
    store.forget_run("run-1")
    store.forget_run("run-1")
    assert store.run("run-1") is None
    with pytest.raises(StoreError, match="not a run's name"):
        store.pin("../x", [])
    with pytest.raises(StoreError, match="not JSON"):
        store.pin("run-2", [], bad=object())


def test_gc_keeps_what_kept_runs_need(store: Store) -> None:
    keys = [f"{name}{name}" for name in "abcdef"]
    for key in keys:
        put(store, key)
    store.pin("old", ["aa", "bb"])
    store.pin("mid", ["bb", "cc"])
    store.pin("new", ["dd"])
    (store.checkpoints("99") / "x").write_text("x")

    everything = store.gc()  # all runs are kept: only what nobody names goes
    assert everything.removed == ("ee", "ff")
    assert everything.runs == ()
    assert not (store.root / "checkpoints" / "99").exists()

    planned = store.gc(keep_runs=1, keep=["old"], dry_run=True)
    assert (planned.removed, planned.runs, planned.kept) == (("cc",), ("mid",), 3)
    assert [entry.key for entry in store.ls()] == ["aa", "bb", "cc", "dd"]
    done = store.gc(keep_runs=1, keep=["old"])
    assert (done.removed, done.runs, done.kept, done.freed) == (planned.removed, planned.runs, 3, planned.freed)
    assert done.freed > sum(len(content) for content in FILES.values())
    assert [(entry.key, entry.runs) for entry in store.ls()] == [("aa", ("old",)), ("bb", ("old",)), ("dd", ("new",))]
    assert store.gc(keep_runs=0).removed == ("aa", "bb", "dd")
    assert os.listdir(store.root / "runs") == []
    assert os.listdir(store.root / "tmp") == []
    assert os.listdir(store.root / "locks") == [".registry"]


def test_gc_spares_live_runs_what_is_being_made_and_what_a_live_run_may_use(store: Store) -> None:
    for key in ("aa", "bb", "cc", "dd"):
        put(store, key)
    store.pin("dead", ["bb", "dd"])
    with store.lease("live"), store.lock("dd"):
        store.pin("live", ["aa"])
        assert store.gc(keep_runs=0).removed == ("bb",)
    assert [entry.key for entry in store.ls()] == ["aa", "cc", "dd"]
    assert store.gc(keep_runs=0).removed == ("aa", "cc", "dd")


def test_what_a_process_finds_while_it_works_for_a_run_is_kept_with_that_run(store: Store) -> None:
    for key in ("aa", "bb"):
        put(store, key)
    store.pin("old", ["aa"])
    with store.lease("new"), working_for("new") as found:
        assert Store(store.root).find("aa")
        assert store.find("cc") is None  # it is about to be made
        assert store.gc(keep_runs=0).removed == ()
        assert found == {"aa", "cc"}
    put(store, "cc")
    assert store.find("bb")
    assert store.gc(keep=["new"], keep_runs=0).removed == ("bb",)
    assert [(entry.key, entry.runs) for entry in store.ls()] == [("aa", ("new",)), ("cc", ("new",))]
    store.forget_run("new")
    assert store.gc().removed == ("aa", "cc")


def test_gc_empties_the_quarantine(store: Store) -> None:
    damage_file(put(store).path)
    store.find(KEY)
    assert store.gc(dry_run=True).freed == store.gc().freed > 2048
    assert os.listdir(store.root / "quarantine") == []


def test_gc_refuses_when_a_record_is_damaged(store: Store) -> None:
    put(store)
    store.pin("run-1", [KEY])
    record = store.root / "runs" / "run-1.json"
    record.write_bytes(record.read_bytes().replace(b"ab00", b"ab01"))
    for attempt in (lambda: store.gc(keep_runs=0), lambda: store.pin("run-1", [OTHER]), lambda: store.run("run-1")):
        with pytest.raises(StoreError, match=r"run-1.*damaged.*delete that file"):
            attempt()
    assert store.find(KEY) is not None
    assert [(damage.path, damage.key) for damage in store.verify()] == [(record, None)]
    assert [entry.runs for entry in store.ls()] == [()]
    record.unlink()
    assert store.gc().removed == (KEY,)


def test_gc_refuses_what_it_does_not_understand(store: Store) -> None:
    store.pin("run-1", [])
    with pytest.raises(StoreError, match="did you mean run-1"):
        store.gc(keep=["run1"])
    with pytest.raises(StoreError, match="keep_runs is -1"):
        store.gc(keep_runs=-1)


def test_gc_ignores_what_others_put_into_the_store(store: Store) -> None:
    put(store)
    for folder in ("artifacts", "artifacts/ab", "checkpoints", "locks"):
        (store.root / folder / "Not a key.lock").write_text("")
    assert store.gc().removed == (KEY,)
    assert (store.root / "artifacts/ab/Not a key.lock").exists()


def test_ls_shows_damage_without_failing(store: Store) -> None:
    put(store, recipe={"step": "slim", "uses": "prune", "more": 1})
    edited_manifest(put(store, OTHER).path)
    fine, damaged = store.ls()
    assert (fine.key, fine.kind, fine.step, fine.uses, fine.problem) == (KEY, "model", "slim", "prune", "")
    assert fine.size == sum(path.stat().st_size for path in store.open(KEY).path.rglob("*") if path.is_file())
    assert fine.recipe["more"] == 1
    assert (damaged.key, damaged.kind) == (OTHER, "damaged")
    assert MANIFEST in damaged.problem


def test_verify_reports_progress_up_to_the_total(store: Store) -> None:
    for key in ("aa", "bb", "cc"):
        put(store, key)
    seen: list[tuple[int, int]] = []
    store.verify(lambda done, total: seen.append((done, total)))
    total = sum(entry.size for entry in store.ls())
    assert seen == [(total // 3, total), (total * 2 // 3, total), (total, total)]
