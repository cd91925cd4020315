"""A run started from this process: Prefect set up quietly, the flow called, its outcome read."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from typing import Any

from flows.embedded import Server
from flows.errors import PlanError
from flows.home import Home
from flows.options import Selection
from flows.plan import device_of, threads_of
from flows.terminal import on_interrupt
from specs.schema.load import load
from specs.schema.pipeline import PipelineSpec
from tasks import forkserver, supervise
from tasks.context import StepError


def launch(chosen: Selection, server: Server) -> dict[str, Any]:
    """Run the flow and return its outcome as JSON data.

    Raises:
        SpecErrors: the spec is wrong.
        StepError: the plan found a problem, or the run ended in a fault of the program.
        ServerFailed: Prefect's server did not come up.
        KeyboardInterrupt: the run was interrupted before it began or after its end.
    """
    # Prefect's log lines go to its server and not over the live view.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    spec = load(chosen.spec, chosen.overrides).spec
    _prepare(spec, Home.of(chosen.spec))
    from prefect.exceptions import TerminationSignal
    from prefect.logging.handlers import APILogWorker

    from flows.optimize import optimize

    server.wait()
    flow = optimize.with_options(name=spec.name)
    try:
        with on_interrupt(signal.default_int_handler):  # for the moments in which the flow has no handler of its own
            state = flow(
                str(chosen.spec), chosen.overrides, chosen.only, chosen.from_step, chosen.no_cache, return_state=True
            )
        APILogWorker.drain_all(timeout=5)  # before the embedded server goes
    except KeyboardInterrupt:
        logging.raiseExceptions = False  # what Prefect still wants to log finds no server; it need not say so
        raise
    outcome = getattr(state.data, "result", state.data)  # Prefect wraps what a flow returns
    outcome = getattr(outcome, "outcome", outcome)
    if isinstance(outcome, dict):
        return outcome
    if state.is_cancelled():
        raise KeyboardInterrupt
    problem = state.result(raise_on_failure=False)
    if isinstance(problem, TerminationSignal):
        raise KeyboardInterrupt
    if isinstance(problem, BaseException):
        raise problem
    raise StepError(state.message or f"the flow ended as {state.name}")


def _prepare(spec: PipelineSpec, home: Home) -> None:
    """Let torch be loaded for the steps while Prefect is loaded here and its server starts."""
    with contextlib.suppress(PlanError):  # the plan will say it in its place
        if forkserver.available(device_of(spec.resources.device)):
            supervise.prepare(threads_of(spec), patient=False, log=home.workers_log)
