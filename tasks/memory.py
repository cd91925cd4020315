"""The resident memory of this process."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

_code_at_fork = 0


def peak() -> int:
    """The most that was resident, bytes, as if this process had loaded itself what it was forked with.

    ``VmHWM`` belongs to the program that runs; ``ru_maxrss`` on Linux may hold what the parent had before ``exec``. A
    forked process has its parent's data from the start, but of the libraries' code only what it has run since; what
    both have run of it is not known exactly, so that its figure is some 5 % too low.
    """
    highest = _status("VmHWM")
    if highest is None:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if platform.system() == "Darwin" else most * 1024
    return highest + max(0, _code_at_fork - (_status("RssFile") or 0))


def before_forks() -> None:
    """Note what this process has loaded, for those that are forked from it."""
    global _code_at_fork
    _code_at_fork = _status("RssFile") or 0


def _status(name: str) -> int | None:
    """A line of the kernel's account of this process, bytes; None where there is none."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
