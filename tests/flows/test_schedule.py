"""A spec's schedule as a Prefect deployment."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
from datetime import timedelta

import pytest
from prefect.engine import handle_engine_signals
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.due import COVERED, MISSED, skip_missed
from flows.errors import RunEnded
from flows.schedule import schedule_of
from specs.schema.pipeline import ScheduleSpec
from tests.flows.conftest import Project, Server, wait_for

STEPS = "steps:\n  - {id: half, uses: quantize, precision: bf16, evaluate: false}\n"


def test_cron_and_interval_become_prefects_own():
    cron = schedule_of(ScheduleSpec(cron="0 3 * * 1", timezone="Europe/Berlin"))
    assert (cron.cron, cron.timezone) == ("0 3 * * 1", "Europe/Berlin")
    interval = schedule_of(ScheduleSpec(interval="90 min"))  # type: ignore[arg-type]
    assert interval.interval == timedelta(minutes=90)


def test_a_spec_without_a_schedule_cannot_be_deployed(project: Project):
    project.write(STEPS)
    done = project.lathe("deploy", "spec.yaml")
    assert done.returncode == 2
    assert "has no schedule" in done.stderr


def test_a_schedule_needs_a_server_that_stays(lonely: Project):
    lonely.write(STEPS + "schedule: {interval: 8 s}\n")
    done = lonely.lathe("deploy", "spec.yaml")
    assert done.returncode == 2
    assert "lathe up" in done.stderr
    done = lonely.lathe("deploy", "spec.yaml", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 3
    assert "http://127.0.0.1:9/api/ does not answer" in done.stderr
    assert "lathe up" in done.stderr
    assert "serving" not in done.stderr


def test_a_run_that_does_not_pass_leaves_a_line_and_no_traceback():
    shown = io.StringIO()
    handler, log = logging.StreamHandler(shown), logging.getLogger("prefect.engine")
    log.addHandler(handler)
    try:
        with pytest.raises(SystemExit), handle_engine_signals():
            raise RunEnded("1 of 2 gates failed", {"status": "failed"})
        assert shown.getvalue() == "the run ended: 1 of 2 gates failed\n"
        with pytest.raises(SystemExit), handle_engine_signals():
            raise ZeroDivisionError
        assert "Traceback" in shown.getvalue(), "a fault of the program is hidden"
    finally:
        log.removeHandler(handler)


@pytest.mark.timeout(300)
def test_a_served_schedule_runs_again_and_again(project: Project, prefect_server: Server):
    project.write(STEPS + "schedule: {interval: 3 s}\n")
    assert project.lathe("run", "spec.yaml").returncode == 0
    process = project.start("deploy", "spec.yaml")
    try:
        completed = wait_for(lambda: finished(prefect_server) if process.poll() is None else ["died"], 200, "two runs")
        assert completed != ["died"], process.communicate()
        assert len(completed) >= 2
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:  # Prefect's runner waits for the run under way
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert len(project.run_ids()) >= 3
    with temporary_settings({PREFECT_API_URL: prefect_server.url}):
        wait_for(lambda: skip_missed("lathe/tiny"), 60, "a run that nothing serves")
        assert skip_missed("lathe/nothing") == 0
    body = {"flow_runs": {"state": {"type": {"any_": ["CANCELLED"]}}}, "deployments": {"name": {"any_": ["tiny"]}}}
    skipped = {run["state"]["message"] for run in prefect_server.ask("flow_runs/filter", body)}
    assert {MISSED, COVERED} <= skipped, "a run takes longer than the interval, so that others are due before it ends"


def finished(server: Server) -> list[str]:
    """Flow runs that the schedule started and that completed, once there are two."""
    body = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}, "deployments": {"name": {"any_": ["tiny"]}}}
    found = server.ask("flow_runs/filter", body)
    return [run["id"] for run in found] if len(found) >= 2 else []
