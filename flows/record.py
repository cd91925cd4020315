"""A run as its journal tells it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.errors import PlanError
from flows.home import Home
from specs.schema.suggest import nearest
from tasks.journal import read

Event = Mapping[str, Any]

KILLED = "the process was killed"
"""Why a run and its steps have no end of their own."""

UNSENT = "unsent"
"""A file that marks a run which is over and whose end MLflow may not have; the next start sends it."""


@dataclass
class RunRecord:
    """What is on disk about one run. ``end`` is None while it runs, and after it was killed.

    ``begun`` and ``ended`` hold the last start and end of every step by id; ``verdicts`` the judged gates.
    """

    folder: Path
    start: Event
    begun: dict[str, Event] = field(default_factory=dict)
    ended: dict[str, Event] = field(default_factory=dict)
    verdicts: list[Event] = field(default_factory=list)
    end: Event | None = None

    @property
    def unfinished(self) -> list[str]:
        """Steps that began and whose last attempt has no end."""
        return [
            name
            for name, begin in self.begun.items()
            if name not in self.ended or self.ended[name]["time"] < begin["time"]
        ]


def read_run(folder: Path) -> RunRecord | None:
    """The record of the run in ``folder``; None where no run has begun there."""
    record: RunRecord | None = None
    for event in read(folder):
        kind = event["event"]
        if kind == "run_start":
            record = RunRecord(folder, event)
        elif record is None:
            return None
        elif kind == "step_start":
            record.begun[event["step"]] = event
        elif kind == "step_end":
            record.ended[event["step"]] = event
        elif kind == "gate":
            record.verdicts.append(event)
        elif kind == "run_end":
            record.end = event
    return record


def home_for(spec: Path | None) -> Home:
    """``$LATHE_HOME`` where that is set, or the home of the spec; without either, that of this folder, or of the folder
    ``specs`` in it."""
    here = Home.of(spec)
    named = spec is not None or os.environ.get("LATHE_HOME")
    if not named and not here.runs.is_dir() and (beside := Home(Path("specs").resolve() / ".lathe")).runs.is_dir():
        return beside
    return here


def find_run(home: Home, name: str) -> Path:
    """The folder of a run, named by its id or an unambiguous beginning of it, or by ``latest``.

    Raises:
        PlanError: there is no such run, or there are several.
    """
    runs = {folder.name: folder for folder in home.runs.glob("*") if (folder / "journal" / "run.jsonl").is_file()}
    if not runs:
        raise PlanError(f"there are no runs under {home.runs}; start one with: lathe run SPEC")
    if name == "latest":
        return max(runs.values(), key=lambda folder: (folder / "journal" / "run.jsonl").stat().st_ctime)
    matches = [run for run in sorted(runs) if run == name or run.startswith(name)]
    if name in runs:
        return runs[name]
    if len(matches) == 1:
        return runs[matches[0]]
    if matches:
        raise PlanError(f"run {name!r} is ambiguous: {', '.join(matches[:8])}")
    raise PlanError(f"run {name!r} is unknown under {home.runs}; {nearest(name, [*sorted(runs)[-8:], 'latest'])}")
