"""Tracking that is refused, hung, failing, locked or killed costs a run five seconds at most, and loses nothing."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.tracking import Tracker, tracking_uri, upload
from tests.tasks.tracking_run import CURVE, add_step, copy_database, counts, start, whole_run

EXTRA_SECONDS = 5.0
SLACK_SECONDS = 1.0
"""For threads to be scheduled on a busy machine."""


@pytest.fixture
def home(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return copy_database(tmp_path_factory.getbasetemp(), tmp_path)


def folder(home: Path) -> Path:
    return home / "runs" / "sentiment-20260101-000000-ab12"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def refused() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@contextlib.contextmanager
def hung() -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(32)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def failing() -> Iterator[str]:
    """A server that answers 500 to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            return None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(("outage", "patience"), [(refused, 1.0), (hung, EXTRA_SECONDS), (failing, 1.0)])
def test_a_server_that_is_down_holds_up_nothing(
    home: Path, outage: contextlib.AbstractContextManager[str], patience: float
) -> None:
    with outage() as uri:  # type: ignore[operator]
        tracker = Tracker(folder(home), home, uri, system_seconds=0)
        began = time.monotonic()
        tracker.start()
        whole_run(folder(home))
        assert time.monotonic() - began < 1.0
        time.sleep(1.0)
        began = time.monotonic()
        status = tracker.close(patience)
        assert time.monotonic() - began < patience + SLACK_SECONDS
    assert not status.uploaded
    assert status.waiting == CURVE + 11
    assert status.reason
    assert status.remedy == f"lathe report {folder(home).name} --upload --spec specs/sentiment.yaml"
    assert upload(folder(home), home).uploaded
    before = counts(home)
    assert upload(folder(home), home).uploaded
    assert counts(home) == before
    assert before["runs"] == 5


def test_a_process_ends_in_time_though_the_server_hangs(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tasks.tracking import Tracker\n"
        "from tests.tasks.tracking_run import whole_run\n"
        "home = Path(sys.argv[1]); run = home / 'runs' / 'sentiment-1-aaaa'\n"
        "tracker = Tracker(run, home, sys.argv[2]); tracker.start(); whole_run(run)\n"
        "time.sleep(3); print(time.time(), flush=True); tracker.close()"
    )
    with hung() as uri:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), uri], capture_output=True, text=True, timeout=60
        )
        ended = time.time()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert ended - float(done.stdout) < EXTRA_SECONDS + 2 * SLACK_SECONDS


def test_a_locked_database_holds_up_nothing(home: Path) -> None:
    tracker = Tracker(folder(home), home, system_seconds=0)
    blocker = sqlite3.connect(home / "mlflow.db", isolation_level=None)
    blocker.execute("begin exclusive")
    try:
        tracker.start()
        whole_run(folder(home))
        time.sleep(1.0)
        began = time.monotonic()
        status = tracker.close()
        assert time.monotonic() - began < EXTRA_SECONDS + SLACK_SECONDS
        assert not status.uploaded
    finally:
        blocker.execute("rollback")
        blocker.close()
    assert upload(folder(home), home).uploaded
    assert counts(home)["runs"] == 5
    assert curve_points(home) == CURVE


def curve_points(home: Path) -> int:
    with sqlite3.connect(home / "mlflow.db") as db:
        return db.execute("select count(*) from metrics where key = 'train_loss'").fetchone()[0]


@contextlib.contextmanager
def server(home: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A real MLflow server on loopback; it is killed on the way out."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", tracking_uri(home), "--artifacts-destination", str(home / "served")]
    with (home / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                break
            time.sleep(0.2)
        else:
            pytest.fail((home / "server.log").read_text()[-2000:])
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_real_server_killed_in_mid_run_gets_the_rest_later_once(home: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    journal = start(folder(home))
    begun = time.time()
    with server(home, port):
        tracker = Tracker(folder(home), home, uri, system_seconds=0)
        tracker.start()
        add_step(journal, "baseline", moment=begun)
        add_step(journal, "teacher", moment=begun + 10, curve=CURVE)
        deadline = time.monotonic() + 60
        while curve_points(home) < CURVE and time.monotonic() < deadline:
            time.sleep(0.2)
    assert curve_points(home) == CURVE
    add_step(journal, "narrow", moment=begun + 20)
    add_step(journal, "cpu", moment=begun + 30)
    (home / "report.html").write_text("<p>")
    journal.append("run", {"event": "run_end", "status": "passed"})
    journal.append("run", {"event": "file", "step": None, "path": str(home / "report.html"), "to": "report"})
    began = time.monotonic()
    status = tracker.close()
    assert time.monotonic() - began < EXTRA_SECONDS + SLACK_SECONDS
    # At most the teacher's events, when the server died before it could answer; nothing of the baseline.
    assert 0 < status.waiting <= 6 + CURVE + 2
    assert status.address.startswith(f"{uri}/#/experiments/1/runs/")

    with server(home, port):
        assert upload(folder(home), home, uri).uploaded
        before = counts(home)
        assert upload(folder(home), home, uri).uploaded
    assert counts(home) == before
    assert before["runs"] == 5
    assert before["logged_models"] == 4
    assert curve_points(home) == CURVE
    assert [path.name for path in (home / "served").rglob("report.html")] == ["report.html"]


@contextlib.contextmanager
def throttled(port: int, rate: int, until: threading.Event) -> Iterator[str]:
    """A way to the server at ``port`` that takes ``rate`` bytes a second, and nothing more once ``until`` is set."""
    ends: list[socket.socket] = []

    def forward(source: socket.socket, target: socket.socket, slowly: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(16_384):
                if slowly:
                    time.sleep(len(piece) / rate)
                if until.is_set():
                    return
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", port))
                ends.extend((near, far))
                for pair in ((near, far, True), (far, near, False)):
                    threading.Thread(target=forward, args=pair, daemon=True).start()

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        listener.bind(("127.0.0.1", 0))
        listener.listen(32)
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    for end in ends:
        end.close()


def test_a_slow_server_is_waited_for_as_long_as_it_gets_on(home: Path) -> None:
    port, patience, rate = free_port(), 1.0, 3_000_000
    (home / "weights.bin").write_bytes(os.urandom(3 * rate))
    stuck = threading.Event()
    with server(home, port), throttled(port, rate, stuck) as uri:
        journal = whole_run(folder(home))
        assert upload(folder(home), home, uri).uploaded
        journal.append("run", {"event": "file", "step": None, "path": str(home / "weights.bin"), "to": "first"})
        tracker = Tracker(folder(home), home, uri, system_seconds=0)
        tracker.start()
        began = time.monotonic()
        assert tracker.close(patience).uploaded
        assert time.monotonic() - began > 2 * patience, "the server was not slow"

        journal.append("run", {"event": "file", "step": None, "path": str(home / "weights.bin"), "to": "second"})
        capped = Tracker(folder(home), home, uri, system_seconds=0)
        capped.start()
        began = time.monotonic()
        assert not capped.close(patience, longest=1.5).uploaded
        assert 1.5 <= time.monotonic() - began < 1.5 + SLACK_SECONDS

        stalled = Tracker(folder(home), home, uri, system_seconds=0)
        stalled.start()
        time.sleep(1.0)
        stuck.set()
        began = time.monotonic()
        assert not stalled.close(patience).uploaded
        assert time.monotonic() - began < 2 * patience + SLACK_SECONDS
