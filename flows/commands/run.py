"""`lathe plan`, `lathe run` and `lathe report`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.options import Selection, selecting
from flows.terminal import ExitCode, err, fail, out

EXIT_OF_STATUS = {
    "passed": ExitCode.PASSED,
    "failed": ExitCode.GATE,
    "inconclusive": ExitCode.GATE,
    "error": ExitCode.STEP,
    "cancelled": ExitCode.INTERRUPTED,
}


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("plan")(selecting(plan))
    app.command("run")(selecting(run))
    app.command("report")(report)


class Form(StrEnum):
    """The forms of a report."""

    TABLE = "table"
    MD = "md"
    CSV = "csv"
    JSON = "json"


def plan(chosen: Selection) -> None:
    """Show what a run would do: the graph, what is cached, estimates, and every problem that can be known before."""
    from flows.home import Home
    from flows.plan import make_plan
    from flows.show import plan_as_json, show_plan
    from specs.schema.load import load

    made = make_plan(
        load(chosen.spec, chosen.overrides),
        Home.of(chosen.spec),
        only=chosen.only,
        from_step=chosen.from_step,
        no_cache=chosen.no_cache,
    )
    if chosen.as_json:
        out.print_json(json.dumps(plan_as_json(made)))
    else:
        show_plan(made, out)
    if made.problems:
        raise typer.Exit(ExitCode.SPEC)


def run(chosen: Selection) -> None:
    """Run a spec: make what is not cached, measure every artifact, judge the gates, report.

    Exit codes: 0 passed, 1 a gate failed or is inconclusive, 2 the spec is wrong, 3 a step failed, or Lathe did,
    130 interrupted.
    """
    from flows.embedded import ServerFailed, server
    from flows.home import Home
    from flows.progress import live_view
    from specs.schema.load import load

    load(chosen.spec, chosen.overrides)  # mistakes are told before anything starts
    home = Home.of(chosen.spec)
    home.require()
    with live_view(err), server(home.root / "prefect-server.log") as prefect_server:
        from flows.launch import launch

        try:
            outcome = launch(chosen, prefect_server)
        except ServerFailed as failure:
            fail(str(failure), ExitCode.STEP)
    if chosen.as_json:
        out.print_json(json.dumps(outcome))
    else:
        from flows.show import show_outcome

        show_outcome(outcome, out)
    raise typer.Exit(EXIT_OF_STATUS[outcome["status"]])


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, its beginning, or `latest`.")] = "latest",
    spec: Annotated[
        Path | None, typer.Option(help="The spec whose runs are meant; default: those of this folder.")
    ] = None,
    upload: Annotated[bool, typer.Option("--upload", help="Send what MLflow has not got yet.")] = False,
    form: Annotated[Form, typer.Option("--format", help="How it is written.")] = Form.TABLE,
) -> None:
    """Show the report of a run, or send its records to MLflow after an outage."""
    from flows.finish import report_of
    from flows.home import Home
    from flows.record import find_run, home_for
    from flows.show import show_report

    folder = find_run(home_for(spec), run)
    if upload:
        from tasks.tracking import tracking_uri
        from tasks.tracking import upload as send

        home = Home(folder.parent.parent)
        status = send(folder, home.root, tracking_uri(home.root))
        if not status.uploaded:
            err.print(f"{status.waiting} events wait: {status.reason}; try again with: {status.remedy}", markup=False)
            raise typer.Exit(ExitCode.STEP)
        for problem in status.problems:
            err.print(f"! {problem}", markup=False, soft_wrap=True)
        what = "all of the run that it takes" if status.problems else "the whole run"
        out.print(f"MLflow at {status.uri} has {what}", markup=False, soft_wrap=True)
        return
    show_report(report_of(folder), form, out)
