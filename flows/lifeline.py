"""Runs a command that ends with whoever asked for it, even where that one is killed:
``python -m flows.lifeline PID COMMAND…``.

A server starts processes of its own, which the kernel's signal at the death of a parent would not reach. So this one
leads a group, watches the process ``PID``, and takes the whole group along.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0
"""Between the polite signal and the last one."""


def tied(command: Sequence[str]) -> list[str]:
    """The command that runs ``command`` and ends with this process; it is to be started in a session of its own."""
    return [sys.executable, "-P", "-m", "flows.lifeline", str(os.getpid()), *command]


def _watch(parent: int, command: Sequence[str]) -> int:
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one for the group reaches the command too, which ends in its time
    while os.getppid() == parent:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(POLL_SECONDS)
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)
    return process.wait()


if __name__ == "__main__":
    sys.exit(_watch(int(sys.argv[1]), sys.argv[2:]))
