"""`lathe cache ls|gc|verify`: the artifact store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.options import AsJson, OfSpec
from flows.terminal import ExitCode, err, out

cache = typer.Typer(no_args_is_help=True, help="The artifact store: list, clean up, verify.")


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.add_typer(cache, name="cache")


def _store(spec: Path | None):
    from flows.errors import PlanError
    from flows.record import home_for
    from tasks.artifacts import Store

    home = home_for(spec)
    if not home.store.is_dir():
        raise PlanError(f"there is no store at {home.store}; name the spec whose store is meant with --spec")
    home.require()
    return Store(home.store)


@cache.command("ls")
def list_artifacts(spec: OfSpec = None, as_json: AsJson = False) -> None:
    """List what the store holds, newest first."""
    from rich.table import Table

    from tasks.evaluate.format import size

    entries = sorted(_store(spec).ls(), key=lambda entry: entry.created, reverse=True)
    if as_json:
        rows = [
            {
                "key": entry.key,
                "step": entry.step,
                "uses": entry.uses,
                "kind": entry.kind,
                "size": entry.size,
                "created": entry.created,
                "runs": list(entry.runs),
            }
            for entry in entries
        ]
        out.print_json(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("key", "step", "uses", "kind", "size", "created", "runs"):
        table.add_column(name, justify="right" if name in ("size", "runs") else "left", no_wrap=name != "step")
    for entry in entries:
        step, uses = entry.step or "–", entry.uses or "–"
        created = entry.created[:16].replace("T", " ")
        table.add_row(entry.key[:10], step, uses, entry.kind, size(entry.size), created, str(len(entry.runs)))
    out.print(table)
    err.print(f"{len(entries)} artifacts, {size(sum(entry.size for entry in entries))}", markup=False)


@cache.command("gc")
def collect(
    spec: OfSpec = None,
    keep_runs: Annotated[int, typer.Option(min=0, help="Keep what the newest runs refer to.")] = 5,
    keep: Annotated[list[str] | None, typer.Option(metavar="RUN", help="Keep what this run refers to, too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Delete artifacts that no kept run refers to. Runs that are going on are always kept."""
    from tasks.evaluate.format import size

    done = _store(spec).gc(keep_runs=keep_runs, keep=keep or (), dry_run=dry_run)
    verb = "would free" if dry_run else "freed"
    out.print(f"{verb} {size(done.freed)}: {len(done.removed)} artifacts; {done.kept} kept", markup=False)


@cache.command("verify")
def verify(spec: OfSpec = None) -> None:
    """Read every artifact and check it against its hashes. Exit code 1 where one is damaged."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    store = _store(spec)
    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=err) as shown:
        bar = shown.add_task("verify", total=None)
        damaged = store.verify(lambda done, total: shown.update(bar, completed=done, total=total))
    for finding in damaged:
        out.print(f"damaged {finding.key}: {finding.reason}", markup=False, soft_wrap=True)
    if damaged:
        out.print("damaged artifacts are made anew by the next run that needs them", markup=False)
        raise typer.Exit(ExitCode.GATE)
    out.print("every artifact is whole", markup=False)
