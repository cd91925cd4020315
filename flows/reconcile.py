"""The run in Prefect: its name, its cancellation from the UI, and what a killed run left behind."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.runtime import flow_run
from prefect.states import Crashed

from flows.home import Home
from flows.record import KILLED, UNSENT, RunRecord, read_run
from tasks import events, supervise
from tasks.artifacts import Store
from tasks.journal import Journal, ended, read
from tasks.tracking import answers, tracking_uri, upload

RECORD = "prefect.json"
OPEN = "open-in-prefect"
"""The mark on a closed run that is yet to be closed in Prefect."""

POLL_SECONDS = 2.0

PATIENCE_SECONDS = 2.0
"""How long the upload of a closed run is tried again."""


def remember_flow_run(folder: Path) -> None:
    """Give the flow run the run's name and note its id, so that a later start can find it."""
    identifier = flow_run.get_id()
    if identifier is None:
        return
    (folder / RECORD).write_text(json.dumps({"flow_run": str(identifier)}))
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(str(identifier)), name=folder.name)


@contextlib.contextmanager
def watch_for_cancel() -> Iterator[None]:
    """Within the block, a cancellation in Prefect's UI cancels the run's steps.

    Prefect itself acts on a cancellation only where it started the process; a run started from a terminal has to look.
    """
    identifier = flow_run.get_id()
    done = threading.Event()

    def watch() -> None:
        with get_client(sync_client=True) as client:
            while not done.wait(POLL_SECONDS):
                with contextlib.suppress(Exception):  # a server that does not answer cancels nothing
                    state = client.read_flow_run(UUID(str(identifier))).state
                    if state is not None and (state.is_cancelling() or state.is_cancelled()):
                        events.publish({"event": "cancelling"})
                        supervise.cancel_all()
                        return

    thread = threading.Thread(target=watch, name="watch-for-cancel", daemon=True)
    if identifier is not None:
        thread.start()
    try:
        yield
    finally:
        done.set()


def reconcile(home: Home) -> list[str]:
    """Close what killed runs left open: their flow and task runs in Prefect become Crashed, their records end.

    A run is dead when it has no end and nobody holds its lease; the lease is the kernel's, so it ends with its process.
    What MLflow has of them is brought up to date in the background, now or, where MLflow does not answer, at a later
    start.

    Returns:
        The ids of the runs that were closed.
    """
    closed = []
    store = Store(home.store)
    for folder in sorted(home.runs.glob("*")) if home.runs.is_dir() else []:
        if ended(folder) or store.leased(folder.name):
            continue
        record = read_run(folder)
        if record is None or record.end is not None:
            continue
        if (folder / RECORD).exists():
            (folder / OPEN).touch()
        (folder / UNSENT).touch()
        _end(record)
        closed.append(folder.name)
    for mark in sorted(home.runs.glob(f"*/{OPEN}")):
        # The server may be away, or another one than the run's; the mark stays for the next start then.
        with contextlib.suppress(Exception):
            _close_in_prefect(mark.parent)
            mark.unlink(missing_ok=True)
    unsent = [mark.parent for mark in sorted(home.runs.glob(f"*/{UNSENT}"))]
    if unsent:
        threading.Thread(target=_upload, args=(home, unsent), name="upload-closed-runs", daemon=True).start()
    return closed


def _end(record: RunRecord) -> None:
    """Write the ends that a killed run could not; its last sign of life is the best guess at when that was."""
    moment = max(event["time"] for event in read(record.folder))
    journal = Journal(record.folder)
    for name in record.unfinished:
        begin = record.begun[name]
        end = {"event": "step_end", "time": moment, "step": name, "state": "failed", "error": KILLED}
        found = {"key": begin["key"], "seconds": moment - begin["time"], "result": {}, "evaluation": None}
        journal.append(name, {**end, **found})
    journal.append("run", {"event": "run_end", "time": moment, "status": "error", "message": KILLED})


def _upload(home: Home, folders: list[Path]) -> None:
    """Send what MLflow has not got of these runs, as long as it takes it."""
    with contextlib.suppress(Exception):  # nobody waits for this, and the mark stays for the next start
        for folder in folders:
            if (
                not answers(tracking_uri(home.root))
                or not upload(folder, home.root, patience=PATIENCE_SECONDS).uploaded
            ):
                return
            (folder / UNSENT).unlink(missing_ok=True)


def _close_in_prefect(folder: Path) -> None:
    identifier = UUID(json.loads((folder / RECORD).read_text())["flow_run"])
    state = Crashed(message=f"{KILLED}; reconciled at the next start")
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(identifier)
        if run.state is None or not run.state.is_final():
            client.set_flow_run_state(identifier, state, force=True)
        _close_tasks(client, identifier)


def _close_tasks(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    state = Crashed(message=f"{KILLED}; reconciled at the next start")
    only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    for task_run in client.read_task_runs(flow_run_filter=only):
        if task_run.state is None or not task_run.state.is_final():
            client.set_task_run_state(task_run.id, state, force=True)
