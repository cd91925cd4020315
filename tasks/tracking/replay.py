"""The journal of a run, sent to MLflow in order from where the last pass stopped."""

from __future__ import annotations

from specs.schema.redaction import redact
from tasks.journal import Entry, Event, merged, read, redact_event
from tasks.tracking.models import AGAIN
from tasks.tracking.senders import SENDERS, refresh
from tasks.tracking.session import Session, Stopped
from tasks.tracking.settings import Refused, TrackingError
from tasks.tracking.state import PARENT

TOO_LARGE, FORBIDDEN = 413, 403
"""HTTP's answers that no further attempt changes."""


def replay(session: Session) -> int:
    """Send what the journal holds beyond ``session.state.positions``; returns how many events were sent.

    Raises:
        Stopped: ``session.stopping`` said so.
        TrackingError: the run was deleted in MLflow.
        Exception: whatever MLflow raises; what had arrived by then is recorded in the state.
    """
    found = next((event for event in read(session.folder) if event["event"] == "run_start"), None)
    session.start = redact_event(found, session.secrets) if found else {}
    if not session.start:
        return 0
    if not _stands(session):
        session.state.forget()
    waiting = merged(session.folder, session.state.positions)
    arrived: dict[str, int] = {}
    for entry in waiting:
        if session.stopping():
            raise Stopped
        if entry.event["event"] != "metric" and session.metrics:
            _settle(session, arrived)
        _send(session, entry)
        arrived[entry.writer] = entry.end
        if not session.metrics:
            _settle(session, arrived)
    _settle(session, arrived)
    if any(entry.event["event"] in ("step_start", "step_end", "gate") for entry in waiting):
        refresh(session)
    return len(waiting)


def _settle(session: Session, arrived: dict[str, int]) -> None:
    session.flush()
    session.state.positions.update(arrived)
    arrived.clear()
    session.save()


def _stands(session: Session) -> bool:
    """Whether the store still has the run; one that was replaced by another is to be sent everything again."""
    from mlflow.exceptions import MlflowException

    parent = session.state.runs.get(PARENT)
    if parent is None:
        return True
    try:
        found = session.client.get_run(parent)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    if found.info.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the run was deleted in MLflow; `mlflow runs restore --run-id {parent}` brings it back for the upload"
        )
    return True


def _send(session: Session, entry: Entry) -> None:
    event = redact_event(entry.event, session.secrets)
    try:
        SENDERS[event["event"]](session, event)
    except Exception as error:
        why = None if event["event"] == "run_start" else _refusal(event["event"], error)
        if why is None:
            raise
        # An event that MLflow will never take must not keep the ones behind it.
        problem = redact(f"{_lost(event)}: {why}", session.secrets)
        if problem not in session.state.problems:
            session.state.problems.append(problem)


def _refusal(kind: str, error: Exception) -> str | None:
    """Why an event will never be taken, and what to do; None where a later attempt may succeed."""
    if isinstance(error, Refused):
        return str(error)
    again = AGAIN if kind == "register" else "run the spec again"
    code = getattr(error, "error_code", None)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == TOO_LARGE:
        return f"the server takes no file of this size; raise its limit for uploads, then {again}"
    if kind == "register" and (status == FORBIDDEN or code == "PERMISSION_DENIED"):
        return f"the server forbids it; ask for the right to register models, then {again}"
    if code == "INVALID_PARAMETER_VALUE":
        remedy = f"correct that, then {again}" if kind == "register" else "it is kept in the run's journal"
        return f"MLflow refused it ({str(error).splitlines()[0][:200]}); {remedy}"
    return None


def _lost(event: Event) -> str:
    """What is missing in MLflow without the event."""
    if event["event"] == "register":
        return f"{event['name']} (step {event['step']}) was not registered"
    if event["event"] == "file":
        return f"{event['path']} was not uploaded"
    of = f"step {event['step']}" if event.get("step") else "the run"
    return f"a record of {of} ({event['event'].replace('_', ' ')}) is missing in MLflow"
