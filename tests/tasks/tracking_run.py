"""A run's journal for the tests of tracking: a baseline and four steps."""

from __future__ import annotations

import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

from tasks.journal import Journal
from tasks.tracking import prepare_store

TABLES = ("runs", "metrics", "params", "tags", "inputs", "datasets", "logged_models", "logged_model_metrics")

SPEC_TEXT = "name: sentiment\nmodel: {source: '${MODEL}'}\n"

FIGURES = {
    "baseline": ("model", 0.878, 90.9e6, 0.0108),
    "teacher": ("model", 0.886, 90.9e6, 0.0107),
    "narrow": ("model", 0.871, 48.2e6, 0.0065),
    "cpu": ("export", 0.872, 12.5e6, 0.0034),
}
NEEDS = {"baseline": [], "teacher": ["baseline"], "narrow": ["teacher"], "cpu": ["narrow"]}
USES = {"baseline": "model", "teacher": "finetune", "narrow": "prune", "cpu": "export_tflite"}
CURVE = 30
"""Training metrics that ``teacher`` records."""


def evaluation(accuracy: float, size: float, latency: float) -> dict[str, Any]:
    """A record as ``tasks.evaluate`` writes it."""
    figures = {
        "accuracy": {"value": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02},
        "latency_p50": {"value": latency, "low": None, "high": None},
        "peak_memory": {"value": 4 * size, "low": None, "high": None},
        "size": {"value": size, "low": None, "high": None},
    }
    return {"version": 1, "task": "text-classification", "metrics": figures}


def start(folder: Path, *, moment: float | None = None, secrets: tuple[str, ...] = (), **more: Any) -> Journal:
    """Begin the journal of a run in ``folder``, whose name is the run's id."""
    journal = Journal(folder, secrets)
    steps = [{"id": name, "uses": USES[name], "needs": NEEDS[name]} for name in FIGURES if name != "baseline"]
    event = {
        "event": "run_start",
        "time": moment or time.time(),
        "run_id": folder.name,
        "name": "sentiment",
        "experiment": "sentiment",
        "description": "A sentiment classifier for a small board.",
        "task": "text-classification",
        "spec_path": "specs/sentiment.yaml",
        "spec_text": SPEC_TEXT,
        "spec": {"name": "sentiment", "seed": 0, "data": {"max_length": 64}, "steps": steps, "tracking": {}},
        "environment": {"python": "3.11", "libraries": {"torch": "2.13.0"}},
        "git": {"revision": "0123456789abcdef", "branch": "main", "dirty": False},
        "data": {
            "train": {"source": "data/sst2/train.jsonl", "fingerprint": "t" * 64},
            "eval": {"source": "data/sst2/dev.jsonl", "fingerprint": "e" * 64},
        },
        "steps": [{"id": name, "needs": NEEDS[name]} for name in FIGURES],
        "tags": {"device": "cpu"},
    }
    journal.append("run", {**event, **more})
    return journal


def add_step(journal: Journal, name: str, *, moment: float, path: Path | None = None, curve: int = 0) -> None:
    """One step that was done."""
    kind, accuracy, size, latency = FIGURES[name]
    begin = {"event": "step_start", "step": name, "uses": USES[name], "key": f"key-{name}"}
    journal.append(name, {**begin, "time": moment, "spec": {"uses": USES[name], "id": name, "keep": 0.5}})
    for index in range(curve):
        event = {"event": "metric", "step": name, "name": "train_loss", "value": 1 / (index + 1), "index": index}
        journal.append(name, {**event, "time": moment + 0.1 * index})
    end = {
        "event": "step_end",
        "time": moment + 5,
        "step": name,
        "state": "done",
        "key": f"key-{name}",
        "digest": f"digest-{name}",
        "kind": kind,
        "path": str(path or journal.folder),
        "seconds": 5.0,
        "result": {"summary": f"made {name}", "touched": ["a"], "left": {"lm_head": "tied"}, "warnings": []},
        "evaluation": evaluation(accuracy, size, latency),
        "error": None,
    }
    journal.append(name, end)


def whole_run(folder: Path, *, moment: float | None = None, status: str = "passed", **more: Any) -> Journal:
    """A finished run."""
    begun = moment or time.time() - 60
    journal = start(folder, moment=begun, **more)
    for place, name in enumerate(FIGURES):
        add_step(journal, name, moment=begun + 10 * place, curve=CURVE if name == "teacher" else 0)
    verdict = "passed" if status == "passed" else "failed"
    gate = {"event": "gate", "gate": "accuracy drop ≤ 1.5 points", "step": "cpu", "metric": "accuracy"}
    journal.append("run", {**gate, "time": begun + 50, "status": verdict, "message": "0.60 points of at most 1.5"})
    journal.append("run", {"event": "run_end", "time": begun + 51, "status": status})
    return journal


def copy_database(session: Path, home: Path) -> Path:
    """An empty database in ``home``, copied from one that MLflow made in ``session`` once, because that takes long."""
    template = session / "mlflow-template"
    prepare_store(template, f"sqlite:///{template / 'mlflow.db'}")
    shutil.copy(template / "mlflow.db", home / "mlflow.db")
    return home


def counts(home: Path) -> dict[str, int]:
    """Rows in the tables of MLflow that a run fills."""
    with sqlite3.connect(home / "mlflow.db") as db:
        return {table: db.execute(f"select count(*) from {table}").fetchone()[0] for table in TABLES}
