"""What a killed run left open is closed at the next start, with the times of the killed run, in MLflow too."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from flows import reconcile as module
from flows.home import Home
from flows.reconcile import UNSENT, reconcile
from flows.record import RunRecord, read_run
from tasks.artifacts import Store
from tasks.journal import Journal
from tasks.tracking import tracking_uri, upload
from tests.tasks.test_tracking_outage import hung
from tests.tasks.tracking_run import add_step, copy_database, start, whole_run

BEGAN = 1_700_000_000.0


@pytest.fixture
def home(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Home(copy_database(tmp_path_factory.getbasetemp(), tmp_path))


def killed(home: Home, name: str = "sentiment-20260101-000000-dead") -> Journal:
    """A run that was killed in its second step, 17.5 seconds after its start."""
    journal = start(home.run(name), moment=BEGAN)
    add_step(journal, "baseline", moment=BEGAN + 1)
    begin = {"event": "step_start", "step": "teacher", "uses": "finetune", "key": "key-teacher", "spec": {}}
    journal.append("teacher", {**begin, "time": BEGAN + 10})
    metric = {"event": "metric", "step": "teacher", "name": "train_loss", "value": 1.0, "index": 0}
    journal.append("teacher", {**metric, "time": BEGAN + 17.5})
    return journal


def record(journal: Journal) -> RunRecord:
    found = read_run(journal.folder)
    assert found is not None
    return found


def uploads_end() -> None:
    for thread in threading.enumerate():
        if thread.name == "upload-closed-runs":
            thread.join(60)
            assert not thread.is_alive()


def statuses(home: Home) -> dict[str, str]:
    from mlflow import MlflowClient

    uri = tracking_uri(home.root)
    found: list[Any] = list(MlflowClient(uri, uri).search_runs(["1"]))
    return {run.data.tags.get("lathe.step", ""): run.info.status for run in found}


def test_a_killed_run_ends_when_it_last_wrote_and_mlflow_knows(home: Home) -> None:
    journal = killed(home)
    assert upload(journal.folder, home.root).uploaded
    assert statuses(home) == {"": "RUNNING", "baseline": "FINISHED", "teacher": "RUNNING"}
    began = time.monotonic()
    assert reconcile(home) == [journal.folder.name]
    assert time.monotonic() - began < 1.0
    end = record(journal).end
    assert end is not None
    assert (end["status"], end["time"]) == ("error", BEGAN + 17.5)
    teacher = record(journal).ended["teacher"]
    assert (teacher["state"], teacher["time"], teacher["seconds"]) == ("failed", BEGAN + 17.5, 7.5)
    assert record(journal).ended["baseline"]["state"] == "done"
    uploads_end()
    assert statuses(home) == {"": "FAILED", "baseline": "FINISHED", "teacher": "FAILED"}
    assert not (journal.folder / UNSENT).exists()
    assert reconcile(home) == []


def test_runs_that_ended_or_still_run_are_left_alone(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = whole_run(home.run("sentiment-1-aaaa"))
    running = killed(home, "sentiment-2-bbbb")
    looked: list[Path] = []
    monkeypatch.setattr(module, "read_run", lambda folder: (looked.append(folder), read_run(folder))[1])
    with Store(home.store).lease("sentiment-2-bbbb"):
        assert reconcile(home) == []
    assert looked == [], "whole journals were read"
    assert record(running).end is None
    assert record(finished).end is not None


def test_a_server_that_hangs_delays_nothing_and_gets_the_end_at_a_later_start(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = killed(home)
    with hung() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        began = time.monotonic()
        assert reconcile(home) == [journal.folder.name]
        assert time.monotonic() - began < 1.0
        uploads_end()
        assert time.monotonic() - began < 6.0
    assert (journal.folder / UNSENT).exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert reconcile(home) == []
    uploads_end()
    assert statuses(home)[""] == "FAILED"
    assert not (journal.folder / UNSENT).exists()
