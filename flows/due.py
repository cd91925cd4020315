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
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled

COVERED = "skipped: an earlier run of the same schedule began after this one was due"
MISSED = "skipped: nothing served the schedule when this run was due"


def cover_due() -> None:
    """Record as cancelled the other runs of the schedule of the flow run that calls this that are due by now: after a
    run that took longer than the interval, one run does for all that were due meanwhile.
    """
    identifier = flow_run.get_id()
    if identifier is None:
        return
    with get_client(sync_client=True) as client:
        mine = client.read_flow_run(UUID(str(identifier)))
        if mine.auto_scheduled and mine.deployment_id is not None:
            _cancel_due(client, mine.deployment_id, COVERED, StateType.SCHEDULED)


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
        # One that is pending was interrupted while its process began.
        return _cancel_due(client, found.id, MISSED, StateType.SCHEDULED, StateType.PENDING)


def _cancel_due(client: SyncPrefectClient, deployment: UUID, message: str, *states: StateType) -> int:
    """Cancel what a deployment's schedule should have begun by now and that is in one of ``states``."""
    wanted = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),  # type: ignore[arg-type]
    )
    cancelled = 0
    # The server answers with so many at a time.
    while due := [run for run in client.read_flow_runs(flow_run_filter=wanted) if run.auto_scheduled]:
        for run in due:
            client.set_flow_run_state(run.id, Cancelled(message=message), force=True)
        cancelled += len(due)
    return cancelled
