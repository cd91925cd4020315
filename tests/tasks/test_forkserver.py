"""Children that begin with torch loaded: forked, told apart, ended with their user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from specs.schema.pipeline import DataSpec
from tasks import forkserver, supervise
from tasks.forkserver import Forked, ForkServer
from tests import support

pytestmark = pytest.mark.skipif(not forkserver.available("cpu"), reason="work is forked on Linux alone")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> ForkServer:
    """Started from a thread that ends, as the thread of a step does."""
    started: list[ForkServer] = []

    def start() -> None:
        with (tmp_path_factory.mktemp("server") / "log").open("wb") as log:
            started.append(ForkServer({**os.environ, **supervise.settings_for(1, patient=True)}, log))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    until(lambda: started[0].loaded(0.2))
    return started[0]


def until(condition: Callable[[], object], patience: float = 60) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def fork(server: ForkServer, log: Path) -> Forked:
    with log.open("ab") as sink:
        return server.fork(sink)


def test_a_child_does_its_job_and_says_so(server: ForkServer, tmp_path: Path):
    child = fork(server, tmp_path / "log")
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.poll() is None
    assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
    child.stdin.write(json.dumps({"parent": os.getpid(), "run_id": "r", "do": "nothing"}).encode() + b"\n")
    child.stdin.flush()
    event = json.loads(child.stdout.readline())
    assert event["event"] == "error"
    assert "KeyError: 'nothing'" in event["details"]
    assert child.wait(10) == child.poll() == 0


def test_a_child_begins_with_what_is_loaded_and_with_a_state_of_its_own(server: ForkServer, tmp_path: Path):
    children = [fork(server, tmp_path / "log") for _ in range(2)]
    maps = [Path(f"/proc/{child.pid}/maps").read_text() for child in children]
    assert all("libtorch" in text for text in maps)

    def held(child: Forked) -> set[str]:
        return {os.readlink(path) for path in Path(f"/proc/{child.pid}/fd").iterdir()}

    for child in children:  # the way to the server is not inherited
        until(lambda one=child: not any("socket" in link for link in held(one)))
    pipes = [{link for link in held(child) if "pipe" in link} for child in children]
    assert not pipes[0] & pipes[1], "one child holds what is another's"
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
        assert child.returncode == -signal.SIGKILL


def test_a_child_that_lives_is_waited_for_no_longer_than_said(server: ForkServer, tmp_path: Path):
    child = fork(server, tmp_path / "log")
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.2)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(10) == -signal.SIGTERM


USER = """
import os, sys, time
from tasks import supervise
from tasks.forkserver import ForkServer
server = ForkServer({**os.environ, **supervise.settings_for(1, patient=True)}, open(os.devnull, "wb"))
while not server.loaded(1): pass
child = server.fork(open(os.devnull, "wb"))
print(server.pid, child.pid, flush=True)
time.sleep(60)
"""


def test_nothing_outlives_its_user():
    user = subprocess.Popen([sys.executable, "-c", USER], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert user.stdout is not None
    pids = [int(word) for word in user.stdout.readline().split()]
    assert all(psutil.pid_exists(pid) for pid in pids)
    user.kill()
    user.wait()
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 10)


def test_children_share_a_server_and_one_that_is_killed_is_followed_by_another(tmp_path: Path):
    supervise.reset(parallel=1)
    job = {"run_id": "r", "do": "nothing"}
    before = servers()

    def failure() -> str:
        with pytest.raises(supervise.ChildFailed) as caught:
            supervise.run_child(
                job, threads=3, patient=True, loaded=True, log=tmp_path / "log", on_event=lambda event: None
            )
        return str(caught.value)

    assert "nothing" in failure()
    (first,) = servers() - before
    assert "nothing" in failure()
    assert servers() - before == {first}, "each child has a server of its own"
    os.kill(first, signal.SIGKILL)
    assert "nothing" in failure()
    (second,) = servers() - before
    assert second != first


def servers() -> set[int]:
    """Those that this process has started and not ended."""
    found = psutil.Process().children()
    return {child.pid for child in found if child.status() != "zombie" and "tasks.forkserver" in child.cmdline()}


def test_a_child_that_breaks_leaves_its_last_words(server: ForkServer, tmp_path: Path):
    child = fork(server, tmp_path / "log")
    assert child.stdin is not None
    child.stdin.write(b"no job at all\n")
    child.stdin.flush()
    assert child.wait(10) == 1
    assert "JSONDecodeError" in (tmp_path / "log").read_text()


def test_a_server_that_dies_before_it_forks_is_told_as_such(tmp_path: Path):
    with (tmp_path / "log").open("wb") as log:
        server = ForkServer({**os.environ, **supervise.settings_for(1, patient=True)}, log)
        until(lambda: server.loaded(0.2))
        os.kill(server.pid, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (server.pid, signal.SIGKILL)).start()
        with pytest.raises(ConnectionError, match=r"has ended|Broken pipe"):
            server.fork(log)
    server.close()
    assert not server.alive


def test_a_server_ends_while_it_loads_where_its_user_does(tmp_path: Path):
    (tmp_path / "torch.py").write_text("import time; time.sleep(2)")
    (tmp_path / "transformers.py").write_text("import time; time.sleep(60)")
    code = USER.replace("while not server.loaded(1): pass", "print(server.pid, flush=True); time.sleep(60)")
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    user = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert user.stdout is not None
    pid = int(user.stdout.readline())
    user.kill()
    user.wait()
    until(lambda: not psutil.pid_exists(pid), 20)


NO_ROOM = """
import errno, os
real = os.fork
def once():
    os.fork = real
    raise BlockingIOError(errno.EAGAIN, "no room")
os.fork = once
"""


def test_a_fork_that_fails_is_told_and_costs_no_other_child(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(NO_ROOM)
    variables = {**os.environ, **supervise.settings_for(1, patient=True), "PYTHONPATH": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        server = ForkServer(variables, log)
        until(lambda: server.loaded(0.2))
        with pytest.raises(BlockingIOError):
            server.fork(log)
        child = server.fork(log)
    assert child.poll() is None
    server.close()
    assert child.wait(10) == -signal.SIGKILL, "a child outlived the server"


def test_a_server_that_cannot_load_says_why(tmp_path: Path):
    with (tmp_path / "log").open("wb") as log:
        (tmp_path / "torch.py").write_text("raise ImportError('broken on purpose')")
        server = ForkServer({**os.environ, **supervise.settings_for(1, patient=True), "PYTHONPATH": str(tmp_path)}, log)
        with pytest.raises(ConnectionError, match="exit code 1"):
            until(lambda: server.loaded(0.2))
    assert "broken on purpose" in (tmp_path / "log").read_text()
    assert not server.alive


def test_a_forked_evaluation_needs_the_memory_of_a_fresh_one(bert: Path, review_data: DataSpec, tmp_path: Path):
    supervise.reset(parallel=1)
    model = shutil.copytree(bert, tmp_path / "model")
    (model / "manifest.json").write_text(json.dumps(support.as_artifact(bert).manifest))

    def peak(loaded: bool) -> float:
        out = tmp_path / f"loaded-{loaded}"
        out.mkdir()
        job = {
            "run_id": "r",
            "do": "evaluate",
            "task": "text-classification",
            "artifact": {"key": 64 * "0", "kind": "model", "digest": 64 * "0", "path": str(model)},
            "evaluate": {"latency": {"warmup": 1, "repeats": 3}, "bootstrap": 100},
            "data": review_data.model_dump(mode="json"),
            "store": str(tmp_path / "store"),
            "out": str(out),
            "tokenizer": str(model),
            "reference": None,
            "device": "cpu",
            "threads": 1,
            "seed": 0,
        }
        log = tmp_path / "log"
        supervise.run_child(job, threads=1, patient=True, loaded=loaded, log=log, on_event=lambda event: None)
        return json.loads((out / "evaluation.json").read_text())["metrics"]["peak_memory"]["value"]

    assert peak(True) == pytest.approx(peak(False), rel=0.1)
