"""The journal survives torn lines, threads and crashes, and keeps secrets out; what surrounds a run is recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from specs.schema.redaction import MASK, redact
from tasks.journal import TAIL_BYTES, Journal, JournalError, ended, entries, environment, git_state, merged, read


def metric(index: int, **more: object) -> dict[str, object]:
    return {"event": "metric", "step": "a", "name": "loss", "value": 0.5, "index": index, **more}


def test_events_come_back_in_order_with_the_run_first(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("alpha", metric(0))
    journal.append("run", {"event": "run_start", "run_id": "r", "time": 5.0})
    journal.append("alpha", metric(1, value=float("nan")))
    found = list(read(tmp_path))
    assert [event["event"] for event in found] == ["run_start", "metric", "metric"]
    assert [event["index"] for event in found[1:]] == [0, 1]
    assert found[0]["time"] == 5.0
    assert found[1]["time"] > 1e9
    assert found[2]["value"] != found[2]["value"]


def test_every_line_is_json_with_a_checksum(tmp_path: Path) -> None:
    Journal(tmp_path).append("run", metric(3))
    line = json.loads((tmp_path / "journal" / "run.jsonl").read_text())
    assert line["event"]["index"] == 3
    assert len(line["crc"]) == 8


def test_a_torn_last_line_is_ignored_and_takes_nothing_with_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for index in range(3):
        journal.append("a", metric(index))
    path = tmp_path / "journal" / "a.jsonl"
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert [event["index"] for event in read(tmp_path)] == [0, 1]
    path.write_bytes(whole[: last + 30])
    Journal(tmp_path).append("a", metric(9))
    assert [event["index"] for event in read(tmp_path)] == [0, 1, 9]


def test_a_flipped_bit_loses_one_line_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    for index in range(3):
        journal.append("a", metric(index))
    path = tmp_path / "journal" / "a.jsonl"
    content = bytearray(path.read_bytes())
    middle = content.index(b'"index":1') + len(b'"index":')
    content[middle] ^= 1
    path.write_bytes(content)
    assert [event["index"] for event in read(tmp_path)] == [0, 2]
    assert "damaged" in caplog.text


def test_threads_lose_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)

    def work(worker: int) -> None:
        for index in range(50):
            journal.append("shared", metric(worker * 100 + index, padding="x" * 5000))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [event["index"] for event in read(tmp_path)]
    assert sorted(found) == sorted(worker * 100 + index for worker in range(6) for index in range(50))
    assert [index for index in found if index < 100] == list(range(50))


def test_reading_goes_on_where_it_stopped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("a", metric(0))
    journal.append("b", metric(1))
    places = {entry.writer: entry.end for entry in entries(tmp_path)}
    journal.append("a", metric(2))
    assert [entry.event["index"] for entry in entries(tmp_path, places)] == [2]


def test_files_are_merged_by_time_but_never_against_their_own_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("run", {"event": "run_start", "time": 50.0})
    journal.append("a", metric(1, time=10.0))
    journal.append("a", metric(2, time=5.0))  # the clock was set back
    journal.append("b", metric(3, time=7.0))
    journal.append("run", {"event": "run_end", "time": 1.0})
    journal.append("run", metric(4, time=2.0))
    found = [entry.event.get("index", entry.event["event"]) for entry in merged(tmp_path)]
    assert found == ["run_start", 3, 1, 2, "run_end", 4]


def test_a_runs_end_is_found_without_reading_the_whole_journal(tmp_path: Path) -> None:
    assert not ended(tmp_path)
    journal = Journal(tmp_path)
    journal.append("run", {"event": "run_start", "spec_text": "x" * 3 * TAIL_BYTES})
    journal.append("run", metric(0, padding="run_end"))
    assert not ended(tmp_path)
    journal.append("run", {"event": "run_end", "status": "passed"})
    assert ended(tmp_path)
    journal.append("run", {"event": "file", "path": "/report", "to": "report"})
    assert ended(tmp_path)
    path = tmp_path / "journal" / "run.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"status":"passed"', b'"status":"passeD"'))
    assert not ended(tmp_path), "the line is damaged"


def test_the_disk_is_forced_at_turning_points_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[int] = []
    really = os.fsync
    journal = Journal(tmp_path)
    journal.append("a", metric(0))  # makes the file, whose folder is forced once
    monkeypatch.setattr(os, "fsync", lambda descriptor: (forced.append(descriptor), really(descriptor)))
    for index in range(5):
        journal.append("a", metric(index))
    assert not forced
    journal.append("a", {"event": "step_end", "step": "a", "state": "done"})
    assert len(forced) == 1


@pytest.mark.parametrize("writer", ["", "../out", "a/b", ".hidden", "9", "x" * 80])
def test_a_writer_cannot_leave_the_folder(tmp_path: Path, writer: str) -> None:
    with pytest.raises(JournalError, match="cannot name a journal"):
        Journal(tmp_path).append(writer, metric(0))


def test_unknown_events_and_unfit_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="did you mean metric"):
        Journal(tmp_path).append("a", {"event": "metrics"})
    with pytest.raises(JournalError, match="not JSON data"):
        Journal(tmp_path).append("a", {"event": "metric", "value": object()})


def test_secrets_reach_no_file(tmp_path: Path) -> None:
    secret = "hf_Zq81\"quoted'"
    journal = Journal(tmp_path, [secret, "abc"])
    spec = {"description": secret, "model": {"source": f"x{secret}y", "config": {"name": [secret]}}}
    begin = {"event": "run_start", "spec": spec, "data": {"train": {"source": secret}}, "description": "abc"}
    journal.append("run", {**begin, "spec_text": f"# {secret}"})
    failed = {"event": "step_end", "step": "a", "state": "failed", "error": repr(secret)}
    journal.append("a", {**failed, "result": {"summary": secret, "left": {"w": secret}, "warnings": [secret]}})
    for path in (tmp_path / "journal").iterdir():
        assert "hf_Zq81" not in path.read_text()
    event, end = read(tmp_path)
    assert event["spec"]["model"] == {"source": f"x{MASK}y", "config": {"name": [MASK]}}
    assert event["description"] == "abc"
    assert end["result"] == {"summary": MASK, "left": {"w": MASK}, "warnings": [MASK]}


def test_what_the_program_reads_again_is_never_masked(tmp_path: Path) -> None:
    """Every word and every text of the record's structure is a secret here, and hides nothing of it."""
    start = {
        "event": "run_start",
        "run_id": "bf16-20260101",
        "name": "bf16",
        "experiment": "bf16",
        "task": "text-classification",
        "spec_path": "/home/spec.yaml",
        "spec": {
            "name": "bf16",
            "task": "text-classification",
            "steps": [
                {"id": "bf16", "uses": "quantize", "needs": ["baseline"], "retries": 0},
                {"id": "best", "uses": "select", "from": ["bf16"], "minimise": "size", "maximise": None},
            ],
            "gates": [{"step": "bf16", "metric": "size", "relative_to": "baseline"}],
            "tracking": {"experiment": "bf16", "register": "bf16", "register_step": "bf16"},
        },
        "git": {"revision": "abcdabcd"},
        "data": {"eval": {"fingerprint": "abcdabcd"}},
        "steps": [{"id": "bf16", "needs": ["baseline"]}],
        "tags": {"device": "cuda", "lathe.partial": "true"},
    }
    begin: dict[str, object] = {"event": "step_start", "step": "bf16", "uses": "quantize", "key": "abcdabcd"}
    begin["spec"] = {"id": "bf16", "uses": "quantize", "needs": ["baseline"], "from": ["bf16"]}
    end = {
        "event": "step_end",
        "step": "bf16",
        "state": "done",
        "key": "abcdabcd",
        "digest": "abcdabcd",
        "kind": "model",
        "path": "/home/store/abcd",
        "evaluation_path": "/home/store/abcd",
        "seconds": 1.5,
        "result": {"touched": ["bf16.weight"], "metrics": {"size": 1}},
        "evaluation": {"task": "text-classification", "kind": "model", "metrics": {"size": {"value": 1, "low": None}}},
        "error": None,
    }
    metric = {"event": "metric", "step": "bf16", "name": "size", "value": 1, "index": 0}
    gate = {"event": "gate", "gate": "size ≤ bf16", "step": "bf16", "metric": "size", "unit": "bytes", "limit": 1.0}
    gate |= {"status": "passed", "verdict": "passed", "paired": False}
    file = {"event": "file", "step": None, "path": "/home/report", "to": "report"}
    register = {"event": "register", "step": "bf16", "name": "bf16", "path": "/home/x", "kind": "model", "task": "x"}
    events = [start, begin, end, metric, gate, file, register, {"event": "run_end", "status": "passed"}]
    words = {text for event in events for text in texts(event)}
    journal = Journal(tmp_path, words | {"root", "abcd"})
    for event in events:
        journal.append("run", event)
    assert [{key: value for key, value in event.items() if key != "time"} for event in read(tmp_path)] == events


def texts(value: object) -> set[str]:
    """Every key and every text in JSON data."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        return set().union(*(texts(part) for item in value.items() for part in item))
    return set().union(*map(texts, value)) if isinstance(value, list) else set()


def test_passwords_in_addresses_are_masked_unasked(tmp_path: Path) -> None:
    assert redact("http://me:pass@host/x", ()) == f"http://{MASK}@host/x"
    assert redact("redis://:pass@host", ()) == f"redis://{MASK}@host"
    assert redact("https://host:8080/a@b", ()) == "https://host:8080/a@b"
    Journal(tmp_path).append("run", {"event": "run_start", "spec": {"data": {"train": "http://me:pass@host/x"}}})
    assert "pass" not in (tmp_path / "journal" / "run.jsonl").read_text()


def test_the_longest_secret_is_masked_first() -> None:
    assert redact("key-long-tail", ["key-", "key-long-tail"]) == MASK
    assert redact({"key-1": ["key-1"]}, ["key-1"]) == {MASK: [MASK]}


def test_the_environment_is_told_without_heavy_imports() -> None:
    heavy = "torch", "mlflow", "transformers", "tensorflow"
    code = f"import sys, tasks.journal as j; j.environment(); print([m for m in {heavy} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
    found = environment()
    assert found["memory"] > 1e8
    assert found["cores"] >= 1
    assert found["libraries"]["pydantic"][0].isdigit()
    json.dumps(found)


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "m"], check=True)
    clean = git_state(tmp_path)
    assert clean is not None
    assert len(clean["revision"]) == 40
    assert clean["dirty"] is False
    canary = tmp_path / "canary"
    hook = tmp_path / "hook.sh"
    hook.write_text(f"#!/bin/sh\ntouch {canary}\n")
    hook.chmod(0o755)
    subprocess.run([*git, "config", "core.fsmonitor", str(hook)], check=True)
    (tmp_path / "file").write_text("2")
    dirty = git_state(tmp_path)
    assert dirty is not None
    assert dirty["dirty"] is True
    assert not canary.exists()
