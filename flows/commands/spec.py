"""`lathe validate`, `lathe schema`, `lathe steps` and `lathe init`: all that needs nothing but the spec."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from flows.options import AsJson, Set, SpecFile
from flows.terminal import ExitCode, complain, err, fail, out


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("init")(init)
    app.command("validate")(validate)
    app.command("schema")(schema)
    app.command("steps")(steps)


def validate(spec: SpecFile, set_: Set = None, as_json: AsJson = False) -> None:
    """Check a spec: every mistake at once, each with its place. No model and no data is opened."""
    from specs.schema.graph import build
    from specs.schema.load import SpecErrors, load

    try:
        loaded = load(spec, set_ or ())
    except SpecErrors as errors:
        if not as_json:
            raise
        _print_json(spec, [mistake.as_dict() for mistake in errors.mistakes])
        raise typer.Exit(ExitCode.SPEC) from None
    if as_json:
        _print_json(spec, [])
        return
    graph, gates = build(loaded.spec), len(loaded.spec.gates)
    counts = f"{_count(len(graph) - 1, 'step')}, {_count(gates, 'gate')}"
    out.print(f"{spec}: valid ({counts})", markup=False, soft_wrap=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _print_json(spec: Path, mistakes: list[dict]) -> None:
    answer = {"version": 1, "spec": str(spec), "valid": not mistakes, "mistakes": mistakes}
    out.print_json(json.dumps(answer))


def schema() -> None:
    """Print the JSON Schema of a spec, with which an editor completes and checks."""
    from specs.schema.publish import schema_text

    typer.echo(schema_text(), nl=False)


def steps(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help="A kind of step, for example prune.")] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Show which steps work for which tasks and models, and why others do not.")
    ] = False,
) -> None:
    """List the kinds of steps, or document one: what it does, its fields, what it takes and gives."""
    from specs.schema.describe import describe, kinds
    from specs.schema.suggest import nearest

    known = {doc.name for doc in kinds()}
    if kind is not None and kind not in known:
        fail(f"{kind!r} is no kind of step; {nearest(kind, sorted(known))}", ExitCode.SPEC)
    if matrix:
        _matrix(kind)
        return
    if kind is None:
        _table(["step", "what it does", "takes", "gives"], [[d.name, d.summary, d.takes, d.gives] for d in kinds()])
        err.print("lathe steps KIND shows the fields of one", style="dim")
        return
    doc = describe(kind)
    out.print(f"{doc.name}\n\n{doc.text}\n", markup=False)
    out.print(f"takes: {doc.takes}\ngives: {doc.gives}\ntasks: {doc.tasks}\n", markup=False)
    _table(["field", "value", "default", "meaning"], [[f.name, f.type, f.default, f.description] for f in doc.fields])


def _matrix(kind: str | None) -> None:
    """What works with what: a row a step, and below it the reasons why not."""
    from tasks.models.support import matrix

    reasons: dict[str, int] = {}
    rows = []
    for row in matrix():
        if kind is None or row.step.split()[0] == kind:
            works = [pair for pair, reason in row.reasons.items() if reason is None]
            refused: dict[str, list[tuple[str, str]]] = {}
            for pair, reason in row.reasons.items():
                if reason is not None:
                    refused.setdefault(reason, []).append(pair)
            no = [
                f"{_pairs(pairs)} ({reasons.setdefault(reason, len(reasons) + 1)})" for reason, pairs in refused.items()
            ]
            rows.append([row.step, _pairs(works), "; ".join(no) or "–"])
    _table(["step", "works for", "does not work for"], rows)
    for reason, number in reasons.items():
        out.print(f"({number}) {reason}", markup=False, soft_wrap=True)


def _pairs(chosen: Sequence[tuple[str, str]]) -> str:
    """Tasks, and the families of models where not all that can do a task are meant."""
    from tasks.models.applications import pairs

    by_task: dict[str, list[str]] = {}
    for task, family in chosen:
        by_task.setdefault(task, []).append(family)
    every = [
        task if len(families) == sum(other == task for other, _ in pairs()) else f"{task} ({', '.join(families)})"
        for task, families in by_task.items()
    ]
    return "every task" if len(chosen) == len(pairs()) else ", ".join(every)


def _table(header: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, no_wrap=name in ("step", "field"), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)


def init(
    task: Annotated[str, typer.Argument(metavar="[TASK]", help="What the model does.")] = "text-generation",
    file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The file to write; default: TASK.yaml here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented spec to start from, for one of the tasks: `text-generation`, `text-classification`,
    `translation`, `speech-recognition`."""
    from flows.starters import STARTERS, place_schema, starter
    from specs.schema.suggest import nearest

    if task not in STARTERS:
        fail(f"the task {task!r} is unknown; {nearest(task, STARTERS)}", ExitCode.SPEC)
    path = file or Path(f"{task}.yaml")
    try:
        with path.open("w" if force else "x", encoding="utf-8") as opened:
            opened.write(starter(task, path))
        schema = place_schema(path)
    except FileExistsError:
        fail(f"{path} is there already; write it with --force, or elsewhere with --out", ExitCode.SPEC)
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}", ExitCode.SPEC)
    wrote = f"{path} and {schema}, with which editors check it" if schema else path
    complain(f"wrote {wrote}; next: lathe plan {quote(str(path))}, then lathe run {quote(str(path))}")
