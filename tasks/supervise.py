"""Child processes that do the computing: started, listened to, paused, timed out and killed from here.

A step runs in a process of its own, so that a timeout or a cancellation is certain, a crash or an exhausted memory
takes down that step alone, and the memory comes back. Parent and child speak JSON lines: the job goes in on the
child's standard input, events come back on its standard output, everything else it prints goes to a log file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tasks.forkserver import Forked, ForkServer

Event = Mapping[str, Any]

WORKER = (sys.executable, "-P", "-m", "tasks.worker")
"""``-P`` keeps the current folder off the module path: a stranger's ``tasks/`` there must not be imported."""

GRACE_SECONDS = 3.0
"""Between the polite signal and the last one."""

SPINS = 5000
"""Turns in which a thread that is measured waits for another one before it sleeps, some 0.1 ms: for a BERT of 6 layers
on 2 threads the fewest that cost it less than 2 % when it has the cores to itself."""

_cancel = threading.Event()
_children: dict[int, _Child] = {}
_guard = threading.Lock()
_measuring = threading.Lock()
_slots = threading.BoundedSemaphore(1)
_quiet: list[Callable[[], contextlib.AbstractContextManager[None]]] = []
_servers: dict[frozenset[tuple[str, str]], ForkServer] = {}

Process = subprocess.Popen[bytes] | Forked


@dataclass(eq=False)
class _Child:
    process: Process
    clock: _Clock


class _Clock:
    """The seconds that a child has had for itself: it stands still while the child is stopped or waits for its turn."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._holds = 0
        self._seconds = 0.0
        self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        with self._guard:
            return self._seconds if self._holds else self._seconds + time.monotonic() - self._since

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block the clock stands still; blocks may overlap."""
        with self._guard:
            if not self._holds:
                self._seconds += time.monotonic() - self._since
            self._holds += 1
        try:
            yield
        finally:
            with self._guard:
                self._holds -= 1
                self._since = time.monotonic()


class ChildFailed(Exception):
    """The child reported an error or died.

    ``retriable`` is False where a further try would end the same way, because the step refused its input. ``details``
    holds the traceback or the last lines that the child printed.
    """

    def __init__(self, message: str, *, retriable: bool = True, details: str = "") -> None:
        super().__init__(message)
        self.retriable = retriable
        self.details = details


class RunCancelled(Exception):
    """The run was cancelled while the child worked."""


def cancel_all() -> None:
    """Cancel every child of this process, now and until ``reset`` is called."""
    _cancel.set()


def kill_all() -> None:
    """Cancel every child, and give those that work no time to end by themselves."""
    cancel_all()
    with _guard:
        children = list(_children.values())
    for child in children:
        _signal(child.process, signal.SIGKILL)


def reset(parallel: int) -> None:
    """Allow children again, at the start of a run, and at most ``parallel`` of them at a time."""
    global _slots
    _cancel.clear()
    _slots = threading.BoundedSemaphore(parallel)


def cancelled() -> bool:
    """Whether the run was cancelled."""
    return _cancel.is_set()


def settings_for(threads: int, patient: bool) -> dict[str, str]:
    """The variables that a child sees beside those of this process: threads, determinism and quiet libraries.

    Threads wait for each other all the time. By default OpenMP's spin for milliseconds; as soon as two processes share
    the cores that makes both of them slow, measured 3 to 8 times, in training and in a latency. ``patient`` threads
    sleep at once, which halves the speed of a small model on an idle machine; others spin for a moment first, and are
    as fast there as by default. What the user has set stays.
    """
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONHASHSEED": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "MPLBACKEND": "Agg",
    }
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        settings |= {"OMP_WAIT_POLICY": "PASSIVE"} if patient else {"GOMP_SPINCOUNT": str(SPINS)}
    return settings


@contextlib.contextmanager
def hushing(quiet: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Within the block, ``quiet()`` is entered whenever a latency is taken, so that the caller's threads hold still."""
    _quiet.append(quiet)
    try:
        yield
    finally:
        _quiet.remove(quiet)


def run_child(
    job: Mapping[str, Any],
    *,
    threads: int,
    patient: bool,
    log: Path,
    on_event: Callable[[Event], None],
    timeout: float | None = None,
    loaded: bool = False,
    command: Sequence[str] = WORKER,
) -> dict[str, Any]:
    """Run one job in a process of its own and return its result.

    Args:
        job: JSON data that ``tasks.worker`` understands.
        threads: CPU threads that the child may use.
        patient: see ``settings_for``; what is measured should run as it will where it is deployed, so not there.
        log: the file to which everything the child prints is appended.
        on_event: called with every event of the child except the last.
        timeout: seconds after which the child is killed, without those in which it is stopped or waits for its turn.
        loaded: fork the child from a process that has torch and transformers loaded, in place of ``command``.
        command: the program that speaks the protocol.

    Raises:
        ChildFailed: the job failed, the child died, or its time was up.
        RunCancelled: ``cancel_all`` was called.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with _slot(), log.open("ab") as sink:
        child = _start(lambda: _fork(sink, threads, patient) if loaded else _spawn(sink, threads, patient, command))
        try:
            return _listen(child, job, timeout, on_event, log)
        finally:
            _stop(child)


@contextlib.contextmanager
def _slot() -> Iterator[None]:
    slots = _slots
    while not slots.acquire(timeout=0.2):
        if cancelled():
            raise RunCancelled
    try:
        if cancelled():
            raise RunCancelled
        yield
    finally:
        slots.release()


def _start(launch: Callable[[], Process]) -> _Child:
    # A child that starts while another measures would disturb it.
    with _measuring:
        process = launch()
        with _guard:
            child = _children[process.pid] = _Child(process, _Clock())
    return child


def _spawn(sink: IO[bytes], threads: int, patient: bool, command: Sequence[str]) -> Process:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=sink,
        env={**os.environ, **settings_for(threads, patient)},
        start_new_session=True,
    )


def prepare(threads: int, patient: bool, log: Path) -> None:
    """Start to load what children with these threads begin with, while the caller does something else.

    Args:
        threads, patient: see ``run_child``.
        log: takes what is printed meanwhile.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        _server(sink, threads, patient)


def _server(sink: IO[bytes], threads: int, patient: bool) -> ForkServer:
    """The server for these threads, which starts where there is none yet."""
    settings = settings_for(threads, patient)
    key = frozenset(settings.items())
    with _guard:
        server = _servers.get(key)
        if server is None or not server.alive:
            server = _servers[key] = ForkServer({**os.environ, **settings}, sink)
    return server


def _fork(sink: IO[bytes], threads: int, patient: bool) -> Process:
    """A child of the server; where that one has died, of a new one."""
    for last in (False, True):
        server = _server(sink, threads, patient)
        try:
            while not server.loaded(0.2):
                if cancelled():
                    raise RunCancelled
            return server.fork(sink)
        except ConnectionError as error:
            server.close()
            if last:
                raise ChildFailed(str(error), details=_tail(server.log)) from error
        except OSError as error:
            raise ChildFailed(f"no process could be forked: {error}") from error
    raise AssertionError


def _listen(
    child: _Child,
    job: Mapping[str, Any],
    timeout: float | None,
    on_event: Callable[[Event], None],
    log: Path,
) -> dict[str, Any]:
    process = child.process
    assert process.stdout is not None
    _tell(process, {**job, "parent": os.getpid()})
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as slot:
        os.set_blocking(process.stdout.fileno(), False)
        selector.register(process.stdout, selectors.EVENT_READ)
        buffer = b""
        while True:
            if cancelled():
                raise RunCancelled
            if timeout is not None and child.clock.seconds > timeout:
                raise ChildFailed(f"the step ran longer than its timeout of {timeout:g} s and was stopped")
            if not selector.select(0.2):
                continue
            chunk = process.stdout.read() or b""
            if not chunk:
                raise RunCancelled if cancelled() else _death(process, log)
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                event = json.loads(line)
                kind = event["event"]
                if kind == "result":
                    return event
                if kind == "error":
                    raise ChildFailed(event["message"], retriable=event["retriable"], details=event["details"])
                if kind == "measure":
                    with child.clock.held():
                        slot.enter_context(_alone(child))
                    _tell(process, {"go": True})
                elif kind == "measured":
                    slot.close()
                else:
                    on_event(event)


def _tell(child: Process, message: Mapping[str, Any]) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # a child that died is noticed where its output ends
        child.stdin.write(json.dumps(message).encode() + b"\n")
        child.stdin.flush()


def _death(child: Process, log: Path) -> ChildFailed:
    code = child.wait()
    tail = _tail(log)
    if code < 0:
        name = signal.Signals(-code).name
        cause = "; most likely the memory ran out" if code == -signal.SIGKILL else ""
        return ChildFailed(f"its process was killed by {name}{cause}", details=tail)
    return ChildFailed(f"its process ended with exit code {code}", details=tail)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-12:])


def _stop(child: _Child) -> None:
    process = child.process
    with _guard:
        _children.pop(process.pid, None)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    for sign, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is not None:
            break
        _signal(process, sign)
        _signal(process, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    # What the child itself started, a compiler for instance, goes with it.
    _signal(process, signal.SIGKILL)


def _signal(process: Process, sign: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, sign)


@contextlib.contextmanager
def _alone(child: _Child) -> Iterator[None]:
    """The one exclusive slot: while it is held, the run's other children stand still and no other run measures."""
    with _measuring, _machine_wide_lock():
        with _guard:
            others = [other for other in _children.values() if other is not child]
        with contextlib.ExitStack() as stack:
            for other in others:
                stack.enter_context(_stopped(other))
            for hush in _quiet:
                stack.enter_context(hush())
            yield


@contextlib.contextmanager
def _stopped(child: _Child) -> Iterator[None]:
    with child.clock.held():
        _signal(child.process, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(child.process, signal.SIGCONT)


@contextlib.contextmanager
def _machine_wide_lock() -> Iterator[None]:
    path = Path(tempfile.gettempdir()) / f"lathe-{os.getuid()}.measure.lock"
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if cancelled():
                    raise RunCancelled from None
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)
