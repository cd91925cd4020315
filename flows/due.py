"""Scheduled runs that come too late: each due time is run once, or recorded as skipped."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled

SUPERSEDED = "skipped: a later run of the same schedule was due before this one could start"
MISSED = "skipped: nothing served the schedule when this run was due"


def superseded() -> bool:
    """Whether the flow run that calls this was scheduled, and a later one of its schedule is due by now: after a run
    that took longer than the interval, only the newest of those that were due meanwhile is worth running."""
    identifier = flow_run.get_id()
    if identifier is None:
        return False
    with get_client(sync_client=True) as client:
        mine = client.read_flow_run(UUID(str(identifier)))
        if not mine.auto_scheduled or mine.deployment_id is None or mine.expected_start_time is None:
            return False
        due = _due(client, mine.deployment_id, mine.expected_start_time)
    return any(
        other.id != mine.id and other.expected_start_time and other.expected_start_time > mine.expected_start_time
        for other in due
    )


def skip_missed(deployment: str) -> int:
    """Record as cancelled what a deployment (``flow/name``) should have run while nothing served it.

    Returns:
        How many runs that were.
    """
    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(deployment)
        except ObjectNotFound:
            return 0
        missed = [run for run in _due(client, found.id) if run.auto_scheduled]
        for run in missed:
            client.set_flow_run_state(run.id, Cancelled(message=MISSED), force=True)
    return len(missed)


def _due(client: SyncPrefectClient, deployment: UUID, since: datetime | None = None) -> list[FlowRun]:
    """The runs of a deployment that are due and have not begun."""
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[deployment]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            expected_start_time=FlowRunFilterExpectedStartTime(after_=since, before_=datetime.now(UTC)),  # type: ignore[arg-type]
        )
    )
