"""Child processes: events, errors, death, timeout, cancellation, the exclusive slot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from tasks import supervise

TALK = """
import json, os, sys, time, subprocess
def tell(**event): print(json.dumps(event), flush=True)
job = json.loads(sys.stdin.readline())
"""


@pytest.fixture(autouse=True)
def _fresh():
    supervise.reset(parallel=4)
    yield
    supervise.reset(parallel=1)


def run(body: str, log: Path, job=None, on_event=None, timeout=None):
    return supervise.run_child(
        job or {},
        threads=1,
        patient=True,
        log=log,
        on_event=on_event or (lambda event: None),
        timeout=timeout,
        command=[sys.executable, "-c", TALK + body],
    )


def test_events_arrive_in_order_and_the_result_is_returned(tmp_path):
    seen = []
    body = """
for i in range(3): tell(event='progress', done=i)
print('noise', file=sys.stderr)
tell(event='result', x=job['x'])
"""
    result = run(body, tmp_path / "log", {"x": 7}, seen.append)
    assert [event["done"] for event in seen] == [0, 1, 2]
    assert result["x"] == 7
    assert "noise" in (tmp_path / "log").read_text()


def test_a_large_event_comes_whole(tmp_path):
    result = run("tell(event='result', text='x' * 3_000_000)", tmp_path / "log")
    assert len(result["text"]) == 3_000_000


def test_an_error_keeps_its_message_and_whether_to_retry(tmp_path):
    with pytest.raises(supervise.ChildFailed, match="no such column") as caught:
        run("tell(event='error', message='no such column', retriable=False, details='trace')", tmp_path / "log")
    assert not caught.value.retriable
    assert caught.value.details == "trace"


def test_a_killed_child_is_named(tmp_path):
    with pytest.raises(supervise.ChildFailed, match="SIGKILL; most likely the memory ran out"):
        run("os.kill(os.getpid(), 9)", tmp_path / "log")


def test_a_child_that_ends_without_a_result_fails_with_its_last_lines(tmp_path):
    with pytest.raises(supervise.ChildFailed, match="exit code 3") as caught:
        run("print('last words', file=sys.stderr); sys.exit(3)", tmp_path / "log")
    assert "last words" in caught.value.details


def test_timeout_stops_the_child_and_what_it_started(tmp_path):
    seen = []
    body = "p = subprocess.Popen(['sleep', '60']); tell(event='note', pid=p.pid); time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(supervise.ChildFailed, match="timeout of 1 s"):
        run(body, tmp_path / "log", on_event=seen.append, timeout=1)
    assert time.monotonic() - began < 5
    assert gone(seen[0]["pid"])


def test_cancel_stops_a_child_that_ignores_the_polite_signal(tmp_path):
    body = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); tell(event='note'); time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(supervise.RunCancelled):
        run(body, tmp_path / "log", on_event=lambda event: supervise.cancel_all())
    assert time.monotonic() - began < supervise.GRACE_SECONDS + 3
    with pytest.raises(supervise.RunCancelled):
        run("tell(event='result')", tmp_path / "log")


def test_a_child_that_is_killed_on_demand_was_cancelled_and_did_not_fail(tmp_path):
    body = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); tell(event='note'); time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(supervise.RunCancelled):
        run(body, tmp_path / "log", on_event=lambda event: threading.Thread(target=supervise.kill_all).start())
    assert time.monotonic() - began < supervise.GRACE_SECONDS


def test_others_stand_still_while_one_measures(tmp_path):
    counted: list[int] = []
    busy = "i = 0\nwhile True:\n    i += 1; tell(event='count', i=i); time.sleep(0.01)"
    measuring = """
tell(event='measure'); sys.stdin.readline()
tell(event='inside'); time.sleep(1.0); tell(event='outside')
tell(event='measured'); time.sleep(0.5)
tell(event='result')
"""
    marks: dict[str, int] = {}

    def mark(event):
        time.sleep(0.2)  # what was under way before the pause has arrived
        marks[event["event"]] = len(counted)

    def background():
        with pytest.raises(supervise.RunCancelled):
            run(busy, tmp_path / "busy", on_event=lambda event: counted.append(event["i"]))

    thread = threading.Thread(target=background)
    thread.start()
    while not counted:
        time.sleep(0.01)
    run(measuring, tmp_path / "measuring", on_event=mark)
    after = len(counted)
    supervise.cancel_all()
    thread.join()
    assert marks["outside"] == marks["inside"], "the other child computed while the latency was taken"
    assert after > marks["outside"], "the other child did not go on afterwards"


MEASURING = """
tell(event='measure'); sys.stdin.readline()
tell(event='inside'); time.sleep({}); tell(event='result')
"""


class Neighbour:
    """A child that measures for so many seconds, as soon as ``begin`` is called."""

    def __init__(self, seconds: float, folder: Path) -> None:
        self.inside = folder / "inside"
        self.held = threading.Event()
        self.thread = threading.Thread(
            target=lambda: run(MEASURING.format(seconds), folder / "neighbour", on_event=self._mark)
        )

    def _mark(self, event):
        self.inside.touch()
        self.held.set()

    def begin(self, *_):
        self.thread.start()
        assert self.held.wait(10)


def test_a_timeout_does_not_count_while_a_child_is_stopped(tmp_path):
    neighbour = Neighbour(2, tmp_path)
    body = f"tell(event='note')\nwhile not os.path.exists({str(neighbour.inside)!r}): time.sleep(0.01)\n"
    result = run(body + "tell(event='result')", tmp_path / "log", on_event=neighbour.begin, timeout=1.5)
    neighbour.thread.join()
    assert result == {"event": "result"}


def test_a_timeout_begins_with_the_child(tmp_path):
    neighbour = Neighbour(2, tmp_path)
    neighbour.begin()
    result = run("tell(event='result')", tmp_path / "log", timeout=1.5)
    neighbour.thread.join()
    assert result == {"event": "result"}


def test_a_timeout_does_not_count_while_a_child_waits_to_measure(tmp_path):
    """Another run on this machine has the turn."""
    with ThreadPoolExecutor(1) as pool:
        with supervise._machine_wide_lock():
            waiting = pool.submit(run, MEASURING.format(0), tmp_path / "log", timeout=1.5)
            time.sleep(2)
        assert waiting.result()["event"] == "result"


def test_a_timeout_is_late_by_the_pause_and_no_more(tmp_path):
    neighbour = Neighbour(1, tmp_path)
    began = time.monotonic()
    with pytest.raises(supervise.ChildFailed, match=r"timeout of 1\.5 s"):
        run("tell(event='note'); time.sleep(60)", tmp_path / "log", on_event=neighbour.begin, timeout=1.5)
    neighbour.thread.join()
    assert 2.4 < time.monotonic() - began < 4.5


def test_threads_spin_for_a_moment_and_those_that_share_the_cores_not_at_all(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    patient, measured = supervise.settings_for(2, patient=True), supervise.settings_for(2, patient=False)
    assert patient["OMP_NUM_THREADS"] == measured["OMP_NUM_THREADS"] == "2"
    assert patient["OMP_WAIT_POLICY"] == "PASSIVE"
    assert 0 < int(measured["GOMP_SPINCOUNT"]) < 10_000, "OpenMP's own default makes a latency swing on a busy machine"
    assert not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} <= measured.keys()
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    kept = supervise.settings_for(2, patient=True).keys()
    assert not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & kept, "the user's own setting is lost"


def test_at_most_so_many_children_at_a_time(tmp_path):
    supervise.reset(parallel=1)
    spans = []

    def one(number):
        body = "t = time.time(); time.sleep(0.3); tell(event='result', began=t, ended=time.time())"
        spans.append(run(body, tmp_path / f"{number}"))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans.sort(key=lambda span: span["began"])
    assert all(first["ended"] <= second["began"] for first, second in pairwise(spans))


def test_children_die_with_a_killed_parent_even_when_stopped(tmp_path):
    """The worker sets this up for itself; a stopped one could not notice by looking."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    body = (
        "import os, time; from tasks.worker import _die_with; _die_with(os.getppid()); "
        "print('ready', flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, str(script), body], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    pid = next(int(line) for line in lines if line.isdigit())
    os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    assert gone(pid)


def gone(pid: int, patience: float = 5.0) -> bool:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False
