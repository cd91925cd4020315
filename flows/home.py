"""Where things are stored, and the identity of a run."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from flows.errors import PlanError


@dataclass(frozen=True)
class Home:
    """The folder with everything a spec's runs leave behind: ``$LATHE_HOME``, else ``.lathe`` beside the spec."""

    root: Path

    @classmethod
    def of(cls, spec: Path | None = None) -> Home:
        """The home of a spec; without one, of the current folder."""
        chosen = os.environ.get("LATHE_HOME")
        if chosen:
            return cls(Path(chosen).expanduser().resolve())
        return cls((spec.resolve().parent if spec else Path.cwd()) / ".lathe")

    @property
    def store(self) -> Path:
        """The artifact store."""
        return self.root / "store"

    @property
    def runs(self) -> Path:
        """One folder per run: journal, report, logs."""
        return self.root / "runs"

    @property
    def workers_log(self) -> Path:
        """What the process that steps are forked from prints."""
        return self.root / "workers.log"

    def run(self, run_id: str) -> Path:
        """The folder of one run."""
        return self.runs / run_id

    def require(self) -> None:
        """Make the folder where it is missing, and write into it.

        Raises:
            PlanError: that cannot be done.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as probe:
                probe.write(b"lathe")
        except OSError as error:
            made = "written" if self.root.is_dir() else "made"
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise PlanError(
                f"{self.root}, where runs and artifacts go, cannot be {made}: {reason}; "
                "set LATHE_HOME to a folder that can be written"
            ) from None


def new_run_id(name: str) -> str:
    """``<name>-<UTC time>-<4 hex>``; sorts by time within a name."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
