"""Children that begin with torch and transformers loaded: forked from a process that has loaded them once.

Loading the two takes some six seconds of a core, more than most steps of a small model, and each step and each
measurement has a process of its own. Used on Linux for work on the CPU; CUDA does not survive a fork.

``multiprocessing`` has a fork server too, but one for the whole process, whereas OpenMP reads its settings when it is
loaded and these differ between steps; and its children have no session, log and pipes of their own.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import os
import random
import selectors
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NoReturn

from tasks import memory

PRELOADED = (
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "tasks.worker",
    "tasks.evaluate.measure",
)
"""What a child finds loaded. No module of them may start a thread that matters, or touch a GPU, when it is imported."""

_NUMBER = struct.Struct("q")
_GONE = -signal.SIGKILL.value


def available(device: str) -> bool:
    """Whether work on ``device`` may be forked here."""
    return sys.platform == "linux" and device == "cpu"


class Forked:
    """A forked child, with the part of ``subprocess.Popen``'s interface that supervision uses.

    Raises:
        ConnectionError: there is none, since the server has ended.
        OSError: there is none, since the server could not fork.
    """

    def __init__(self, stdin: int, stdout: int, status: int) -> None:
        self.stdin: IO[bytes] | None = os.fdopen(stdin, "wb")
        self.stdout: IO[bytes] | None = os.fdopen(stdout, "rb")
        self.returncode: int | None = None
        self._status = status
        self.pid = self._read()
        if self.pid <= 0:
            for stream in (self.stdin, self.stdout):
                stream.close()
            os.close(status)
            if self.pid == _GONE:
                raise ConnectionError("the process that steps are forked from has ended")
            raise OSError(-self.pid, os.strerror(-self.pid))

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the child lives."""
        if self.returncode is None and _readable(self._status, 0):
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the child has ended.

        Raises:
            subprocess.TimeoutExpired: it lives after ``timeout`` seconds.
        """
        if self.returncode is None:
            if not _readable(self._status, timeout):
                raise subprocess.TimeoutExpired("tasks.worker", timeout or 0.0)
            self.returncode = self._end()
        return self.returncode

    def _end(self) -> int:
        self.returncode = self._read()
        os.close(self._status)
        return self.returncode

    def _read(self) -> int:
        """The next number from the server; where the server was killed, so was the child."""
        data = os.read(self._status, _NUMBER.size)
        return _NUMBER.unpack(data)[0] if len(data) == _NUMBER.size else _GONE


def _readable(source: int | socket.socket, timeout: float | None) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        return bool(selector.select(timeout))


class ForkServer:
    """The process that the children are forked from; it ends with this one."""

    def __init__(self, variables: Mapping[str, str], log: IO[bytes]) -> None:
        """Start it.

        Args:
            variables: its environment, and that of every child.
            log: takes what is printed while it loads.
        """
        self.log = Path(log.name)
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tasks.forkserver", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(variables),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._loaded = False

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can fork, or will."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it, and its children with it."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def loaded(self, timeout: float) -> bool:
        """Whether the modules are loaded, after at most ``timeout`` seconds.

        Raises:
            ConnectionError: it ended before they were.
        """
        if not self._loaded:
            if not _readable(self._channel, timeout):
                return False
            if not self._channel.recv(1):
                code = self._process.wait()
                raise ConnectionError(f"the process that steps are forked from ended with exit code {code}")
            self._loaded = True
        return True

    def fork(self, log: IO[bytes]) -> Forked:
        """A new child that runs ``tasks.worker``; what it prints goes to ``log``. Call it once ``loaded``.

        Raises:
            ConnectionError: the server is gone.
            OSError: there is no room for another process or pipe.
        """
        job_read, job_write = os.pipe()
        event_read, event_write = os.pipe()
        status_read, status_write = os.pipe()
        try:
            socket.send_fds(self._channel, [b"f"], [job_read, event_write, log.fileno(), status_write])
        except OSError:
            for descriptor in (job_write, event_read, status_read):
                os.close(descriptor)
            raise
        finally:
            for descriptor in (job_read, event_write, status_write):
                os.close(descriptor)
        return Forked(job_write, event_read, status_read)


def _deserted(channel: socket.socket) -> bool:
    """Whether nobody is left to ask for a child."""
    try:
        return not channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False


def _serve(channel: socket.socket) -> None:
    """Fork a child for every request, and say how each ends, until nobody is left to ask."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    statuses: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        selector.register(wake_read, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                    _report(statuses)
                    continue
                message, descriptors, _, _ = socket.recv_fds(channel, 1, 4)
                if not message:
                    return
                server = os.getpid()
                try:
                    pid = os.fork()
                except OSError as error:
                    os.write(descriptors[-1], _NUMBER.pack(-(error.errno or errno.EAGAIN)))
                    for descriptor in descriptors:
                        os.close(descriptor)
                    continue
                if not pid:
                    inherited = [wake_read, wake_write, channel.fileno(), *statuses.values()]
                    _become_worker(server, descriptors, inherited)
                *given, status = descriptors
                for descriptor in given:
                    os.close(descriptor)
                statuses[pid] = status


def _report(statuses: dict[int, int]) -> None:
    """Write the exit code of every child that has ended to its pipe."""
    for pid in list(statuses):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            descriptor = statuses.pop(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(descriptor, _NUMBER.pack(os.waitstatus_to_exitcode(status)))
            os.close(descriptor)


def _become_worker(server: int, descriptors: list[int], inherited: list[int]) -> NoReturn:
    """What the child does after the fork, to its end."""
    from tasks import worker

    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *given, status = descriptors
    for target, descriptor in enumerate(given):
        os.dup2(descriptor, target)
    os.write(status, _NUMBER.pack(os.getpid()))
    for descriptor in (*descriptors, *inherited):
        os.close(descriptor)
    random.seed()  # else every child would draw the same
    try:
        worker.main(server)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def main(descriptor: int) -> None:
    """``python -m tasks.forkserver DESCRIPTOR``: the end of a socket pair whose other end the user has.

    The kernel's signal at the death of a parent is of no use here: it comes when the thread ends that started this.
    """
    with socket.socket(fileno=descriptor) as channel, contextlib.suppress(ConnectionError):
        for name in PRELOADED:
            importlib.import_module(name)
            if _deserted(channel):
                return
        memory.before_forks()
        gc.collect()
        gc.freeze()  # a collection in a child would copy the pages that it shares with this process
        channel.send(b"l")
        _serve(channel)
        os._exit(0)  # at once, and the children with it


if __name__ == "__main__":
    main(int(sys.argv[1]))
