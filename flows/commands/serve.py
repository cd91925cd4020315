"""`lathe up`, `lathe deploy` and `lathe doctor`: the servers, the schedules, the machine."""

from __future__ import annotations

import signal
from shlex import quote
from typing import Annotated

import typer

from flows.options import OfSpec, Set, SpecFile
from flows.terminal import ExitCode, complain, err, on_interrupt, out


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("up")(up)
    app.command("deploy")(deploy)
    app.command("doctor")(doctor)


def up(
    spec: OfSpec = None,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="The port of the Prefect server.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="The port of the MLflow UI.")] = 5000,
) -> None:
    """Start a Prefect server and the MLflow UI on this machine's loopback address, until Ctrl-C."""
    from flows.record import home_for
    from flows.servers import run_servers

    run_servers(home_for(spec), prefect_port, mlflow_port, out)


def deploy(
    spec: SpecFile,
    set_: Set = None,
    work_pool: Annotated[
        str | None, typer.Option(metavar="POOL", help="Deploy to this work pool; default: serve from this process.")
    ] = None,
) -> None:
    """Run the spec again and again on its `schedule`, as a Prefect deployment.

    Without --work-pool this process stays and carries out the runs.
    """
    from flows.embedded import ServerFailed, configure, has_server, reach_named_server
    from specs.schema.load import load

    loaded = load(spec, set_ or ())
    configure()
    if not has_server():
        complain(
            "A schedule needs a Prefect server that stays; the embedded one lives only as long as a run.\n"
            "Start one with `lathe up`, then: "
            f"PREFECT_API_URL=http://127.0.0.1:4200/api lathe deploy {quote(str(spec))}"
        )
        raise typer.Exit(ExitCode.SPEC)
    try:
        reach_named_server()
    except ServerFailed as error:
        complain(f"error: {error}")
        raise typer.Exit(ExitCode.STEP) from error
    from flows.home import Home
    from flows.schedule import deploy_to_pool, schedule_in, serve

    schedule = schedule_in(loaded)
    when = f"cron {schedule.cron!r}, {schedule.timezone}" if schedule.cron else f"every {schedule.interval:g} s"
    if work_pool is None:
        Home.of(spec).require()
        err.print(f"serving {loaded.spec.name} ({when}); stop with Ctrl-C", markup=False)
        with on_interrupt(signal.default_int_handler):
            serve(loaded, set_ or ())
    else:
        identifier = deploy_to_pool(loaded, set_ or (), work_pool)
        out.print(f"deployed {loaded.spec.name} ({when}) to work pool {work_pool}: {identifier}", markup=False)


def doctor(
    spec: OfSpec = None,
) -> None:
    """Show versions, devices and stores, and what is wrong with them."""
    from flows.doctor import examine
    from flows.record import home_for

    findings = examine(home_for(spec))
    width = max(len(finding.name) for finding in findings)
    marks = {True: "[green]✓[/]", False: "[red]✗[/]", None: " "}
    for finding in findings:
        out.print(f"{marks[finding.good]} {finding.name:{width}}  ", end="")
        out.print(finding.value, markup=False, highlight=False)
    if any(finding.good is False for finding in findings):
        raise typer.Exit(ExitCode.STEP)
