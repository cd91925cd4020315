"""The two streams of the command line, and what its exit codes mean."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.text import Text


class ExitCode(IntEnum):
    """What a command answers the shell with."""

    PASSED = 0
    GATE = 1
    """A gate failed or is inconclusive."""
    SPEC = 2
    """The spec, or the command line, is wrong."""
    STEP = 3
    """A step failed, or Lathe did."""
    INTERRUPTED = 130


class _Console(Console):
    """A console whose reader may go, as ``head`` does: what it would show is lost then, and the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


def _console(stream: TextIO, stderr: bool = False) -> Console:
    # rich would ask the other streams for the width, and a piped table would depend on the size of the window.
    width = None if stream.isatty() or "COLUMNS" in os.environ else 80
    return _Console(stderr=stderr, width=width, highlight=False)


out = _console(sys.stdout)
"""Results: what a script reads."""

err = _console(sys.stderr, stderr=True)
"""Progress and messages: what a person reads."""


def complain(message: str) -> None:
    """Write a message to standard error as it stands: long lines are not wrapped, so that places stay whole."""
    err.print(Text(message), soft_wrap=True)


def fail(message: str, code: ExitCode = ExitCode.STEP) -> NoReturn:
    """Say what is wrong on standard error and end the command with ``code``."""
    complain(message)
    raise typer.Exit(code)


@contextlib.contextmanager
def on_interrupt(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Within the block Ctrl-C calls ``handler``; outside of the main thread nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def leave(code: int) -> NoReturn:
    """End the process after an interruption: threads that are still in native code, a database's for instance, would
    make the interpreter's own end abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_at_once(number: int, frame: Any) -> NoReturn:
    """End the process where it stands. For all that leaves nothing behind: an exception would pass through whatever is
    being imported, and libraries turn it into errors of their own or lose it."""
    os.write(2, b"\x1b[?25h\ninterrupted\n" if err.is_terminal else b"interrupted\n")  # with the cursor visible again
    os._exit(ExitCode.INTERRUPTED)
