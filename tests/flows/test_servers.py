"""Servers: the embedded one's patience, the packages that it needs, and that none outlives who asked for it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from flows.embedded import STARTUP_VARIABLE, Server, ServerFailed, configure
from tests.flows.conftest import wait_for

SETTINGS = f"""\
import sys
from flows.embedded import configure
configure()
assert "prefect" not in sys.modules, "settings that come after the import of prefect are not read"
from prefect.settings import {STARTUP_VARIABLE}
print({STARTUP_VARIABLE}.value())
"""


def test_prefect_is_given_more_than_its_own_20_seconds_to_start() -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run([sys.executable, "-c", SETTINGS], env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) >= 120


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTUP_VARIABLE, "7")
    configure()
    assert os.environ[STARTUP_VARIABLE] == "7"


@contextlib.contextmanager
def slow_to_start(seconds: float) -> Iterator[str]:
    """The address of an API that is healthy only after so many seconds."""
    began = time.monotonic()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            well = self.path == "/api/health" and time.monotonic() - began >= seconds
            self.send_response(200 if well else 503)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            return None

    listener = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}/api"
    finally:
        listener.shutdown()
        listener.server_close()


@contextlib.contextmanager
def process(code: str) -> Iterator[subprocess.Popen[bytes]]:
    made = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield made
    finally:
        made.kill()
        made.wait()


def test_a_server_that_starts_slowly_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_to_start(1.0) as url, process("import time; time.sleep(60)") as standing:
        began = time.monotonic()
        Server(standing, tmp_path / "log", url).wait()
        assert time.monotonic() - began >= 0.9
    monkeypatch.setenv(STARTUP_VARIABLE, "0.5")
    with (
        slow_to_start(60.0) as url,
        process("import time; time.sleep(60)") as standing,
        pytest.raises(ServerFailed, match=rf"within 0.5 s; see .*log, or set {STARTUP_VARIABLE}"),
    ):
        Server(standing, tmp_path / "log", url).wait()


def test_a_server_that_died_is_not_waited_for(tmp_path: Path) -> None:
    with process("raise SystemExit(4)") as dead, pytest.raises(ServerFailed, match="ended with code 4"):
        Server(dead, tmp_path / "log", "http://127.0.0.1:9/api").wait()


@pytest.mark.parametrize(
    ("package", "limit", "reason"),
    [
        ("fastapi", (0, 129), "Prefect's server does not start with newer ones: its models use a removed argument"),
        ("sqlalchemy", (2, 1), "Prefect's scheduler inserts no runs with newer ones, and says so in its log alone"),
    ],
)
def test_what_prefect_cannot_work_with_is_not_installed(package: str, limit: tuple[int, int], reason: str) -> None:
    major, minor = version(package).split(".")[:2]
    assert (int(major), int(minor)) < limit, reason


ASKER = """\
import subprocess, sys, time
from flows.lifeline import tied
command = [sys.executable, "-c", "import subprocess, time; subprocess.Popen(['sleep', '100']); time.sleep(100)"]
process = subprocess.Popen(tied(command), start_new_session=True)
print(process.pid, flush=True)
time.sleep(100)
"""


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_and_its_children_end_with_who_asked_for_them(sign: signal.Signals) -> None:
    asker = subprocess.Popen([sys.executable, "-c", ASKER], stdout=subprocess.PIPE, text=True)
    assert asker.stdout is not None
    leader = int(asker.stdout.readline())
    started = wait_for(lambda: len(pids := family(leader)) == 3 and pids, 20, "a server with a child")
    asker.send_signal(sign)
    asker.wait()
    asker.stdout.close()
    wait_for(lambda: not alive(started), 10, f"the end of {started}")


def family(leader: int) -> list[int]:
    return [leader, *(child.pid for child in psutil.Process(leader).children(recursive=True))]


def test_a_server_that_is_stopped_ends_in_its_own_time_and_its_code_is_handed_on() -> None:
    patient = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), exit(3))); "
    code = f"{patient} print('up', flush=True); time.sleep(100)"
    from flows.lifeline import tied

    leader = subprocess.Popen(
        tied([sys.executable, "-c", code]), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert leader.stdout is not None
    assert leader.stdout.readline() == "up\n"
    os.killpg(leader.pid, signal.SIGTERM)
    assert leader.wait(20) == 3
    leader.stdout.close()
