"""What of a run has been sent where: ``sent.json`` in the run's folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tasks.tracking.settings import shown

FILE = "sent.json"
LOCK = "sent.lock"
PARENT = ""
"""The key under which the pipeline's own MLflow run stands in ``State.runs``."""


@dataclass
class State:
    """How far the journal was sent to one store, and the ids that MLflow gave.

    ``positions`` maps a writer to the byte behind its last event that arrived. Whatever is lost between an arrival and
    this file is sent twice; every request is such that the second time changes nothing.
    """

    positions: dict[str, int] = field(default_factory=dict)
    experiment: str | None = None
    runs: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def forget(self) -> None:
        """Start over: the store has nothing of the run."""
        vars(self).update(vars(State()))


def load(run_folder: Path, uri: str) -> State:
    """The state for the store at ``uri``; a fresh one where nothing was sent there, or the file cannot be read."""
    known = _stores(run_folder).get(shown(uri))
    try:
        return State(**known) if known else State()
    except TypeError:
        return State()


def save(run_folder: Path, uri: str, state: State) -> None:
    """Replace the file with one that holds ``state`` for the store at ``uri``, and what was there for others."""
    stores = {**_stores(run_folder), shown(uri): asdict(state)}
    path = run_folder / FILE
    unfinished = path.with_name(f"{FILE}.{os.getpid()}.new")
    unfinished.write_text(json.dumps({"version": 1, "stores": stores}, indent=1))
    unfinished.replace(path)


def _stores(run_folder: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads((run_folder / FILE).read_text())
        return content["stores"] if content["version"] == 1 else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
