"""Recurring runs: a spec's ``schedule`` as a Prefect deployment."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.schedules import Cron, Interval, Schedule
from prefect.types.entrypoint import EntrypointType

from flows.due import skip_missed
from flows.errors import PlanError
from flows.home import Home
from flows.optimize import optimize
from specs.schema.load import LoadedSpec
from specs.schema.pipeline import ScheduleSpec

CONCURRENT_RUNS = 1
"""A run that is due while the former one still goes waits for it, so that neither disturbs the other's figures; where
several wait, the first runs and the others are skipped."""


def schedule_of(spec: ScheduleSpec) -> Schedule:
    """Prefect's form of a spec's schedule."""
    if spec.cron is not None:
        return Cron(spec.cron, timezone=spec.timezone)
    assert spec.interval is not None
    return Interval(timedelta(seconds=spec.interval), timezone=spec.timezone)


def schedule_in(loaded: LoadedSpec) -> ScheduleSpec:
    """The spec's schedule.

    Raises:
        PlanError: it has none.
    """
    schedule = loaded.spec.schedule
    if schedule is None:
        example = 'schedule: {cron: "0 3 * * 1", timezone: Europe/Berlin}'
        raise PlanError(f"{loaded.path} has no schedule; add for example {example}")
    return schedule


def parameters_of(loaded: LoadedSpec, overrides: Sequence[str]) -> dict[str, Any]:
    """The parameters with which each run of the deployment starts."""
    home = Home.of(loaded.path)
    return {"spec": str(loaded.path), "overrides": list(overrides), "home": str(home.root)}


def serve(loaded: LoadedSpec, overrides: Sequence[str], limit: int = CONCURRENT_RUNS) -> None:
    """Deploy the spec and run it on its schedule from this process, until it is stopped. What was due while nothing
    served it is recorded as skipped.

    Raises:
        PlanError: the spec has no schedule.
    """
    schedule = schedule_in(loaded)
    skip_missed(f"{optimize.name}/{loaded.spec.name}")
    optimize.serve(
        name=loaded.spec.name,
        schedules=[schedule_of(schedule)],
        parameters=parameters_of(loaded, overrides),
        description=loaded.spec.description or None,
        tags=["lathe", loaded.spec.task],
        pause_on_shutdown=False,
        limit=limit,
        print_starting_message=False,
        # By its file Prefect finds a flow only below the current folder.
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def deploy_to_pool(loaded: LoadedSpec, overrides: Sequence[str], work_pool: str) -> str:
    """Deploy the spec to a work pool, whose workers run it on its schedule.

    Returns:
        The deployment's id.

    Raises:
        PlanError: the spec has no schedule, or the pool does not exist.
    """
    from prefect.exceptions import ObjectNotFound

    schedule = schedule_in(loaded)
    source = Path(__file__).resolve().parent.parent
    flow = optimize.from_source(source=str(source), entrypoint="flows/optimize.py:optimize")
    try:
        identifier = flow.deploy(  # type: ignore[union-attr]
            name=loaded.spec.name,
            work_pool_name=work_pool,
            schedules=[schedule_of(schedule)],
            parameters=parameters_of(loaded, overrides),
            description=loaded.spec.description or None,
            tags=["lathe", loaded.spec.task],
            concurrency_limit=CONCURRENT_RUNS,
            build=False,
            push=False,
            print_next_steps=False,
            ignore_warnings=True,
        )
    except (ObjectNotFound, ValueError) as error:
        hint = f"create it with: prefect work-pool create --type process {work_pool}"
        raise PlanError(f"work pool {work_pool!r} cannot be used: {error}; {hint}") from error
    return str(identifier)
