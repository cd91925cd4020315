"""Plans, outcomes and reports in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.plan import Plan, PlannedStep
from tasks.evaluate.format import size
from tasks.evaluate.summary import COLUMNS, RunSummary, rows, warnings

STATE_MARKS = {
    "cached": ("✓ cached", "blue"),
    "measure": ("▸ measure", "cyan"),
    "run": ("▸ run", "cyan"),
    "out": ("· not selected", "dim"),
    "unknown": ("", "dim"),
}
VERDICT_MARKS = {
    "passed": ("✓", "green"),
    "failed": ("✗", "red"),
    "inconclusive": ("?", "yellow"),
    "missing": ("✗", "red"),
}
STATUS_STYLES = {
    "passed": "bold green",
    "inconclusive": "bold yellow",
    "cancelled": "bold yellow",
    "running": "bold cyan",
}
NARROW = ("step", "size", "latency", "memory", "quality")
"""The columns that fit into 80 characters."""
UNFINISHED = ("step", "state", "size", "latency", "quality")
"""The same, where a run goes on or was stopped."""
WIDER = {120: ("changed",), 150: ("ratio", "speedup"), 190: COLUMNS}
"""What is added where there are so many characters."""
WORDS = ("step", "state", "beside", "changed")
"""Columns of words; the others hold figures."""
TOLD = ("changed", "beside")
"""What stands below the table, in a line for each step, where the table has no room for it."""
MOST = 3
"""How many warnings, gates and files the last screen of a run shows."""
NPU_SHARE = "npu_operator_share"


def show_plan(plan: Plan, console: Console) -> None:
    """Print the graph with what is cached, the estimates, and every problem."""
    console.print(Text(f"{plan.spec.name}: {plan.spec.task}", style="bold"))
    for line, step in graph_lines(plan):
        mark, style = STATE_MARKS[step.state]
        text = Text.assemble(line, "  ", (mark, style))
        if step.state in ("run", "measure"):
            text.append(f"  {step.reason}", style="dim")
        console.print(text)
    console.print()
    facts = list(plan.facts)
    if not plan.problems:
        facts.append(("estimate", f"writes {size(plan.disk)}, needs {size(plan.memory)} of memory"))
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        console.print(Text(f"{name:{width}}  {value}"))
    for warning in plan.warnings:
        console.print(Text(f"! {warning}", style="yellow"), soft_wrap=True)
    for problem in plan.problems:
        console.print(Text(f"✗ {problem}", style="red"), soft_wrap=True)
    if plan.problems:
        count = "1 problem stops" if len(plan.problems) == 1 else f"{len(plan.problems)} problems stop"
        console.print(Text(f"{count} the run", style="bold"))
        return
    counts = {state: sum(step.state == state for step in plan.steps) for state in ("run", "measure", "cached")}
    measured = f"{counts['measure']} to measure, " if counts["measure"] else ""
    console.print(Text(f"{counts['run']} to run, {measured}{counts['cached']} cached", style="bold"))


def graph_lines(plan: Plan) -> list[tuple[str, PlannedStep]]:
    """The graph as a tree, depth first, a line for each step: every step stands under its first input, and names the
    others."""
    steps = {step.node.id: step for step in plan.steps}
    below: dict[str | None, list[str]] = {}
    for name, step in steps.items():
        below.setdefault(next(iter(step.node.inputs), None), []).append(name)
    drawn: list[tuple[str, str, PlannedStep]] = []

    def draw(name: str, before: str, beneath: str) -> None:
        others = ", ".join(steps[name].node.inputs[1:])
        uses = steps[name].node.spec.uses + (f" (+ {others})" if others else "")
        drawn.append((f"{before}{name}", uses, steps[name]))
        users = below.get(name, [])
        for user in users:
            last = user == users[-1]
            draw(user, f"{beneath}{'└─' if last else '├─'}", f"{beneath}{'  ' if last else '│ '}")

    for root in below[None]:
        draw(root, "", "")
    wide, wider = max(len(branch) for branch, _, _ in drawn), max(len(uses) for _, uses, _ in drawn)
    return [(f"{branch:{wide}}  {uses:{wider}}", step) for branch, uses, step in drawn]


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON data, with the version of its form."""
    return {
        "version": 1,
        "name": plan.spec.name,
        "device": plan.device,
        "threads": plan.threads,
        "steps": [
            {
                "id": step.node.id,
                "uses": step.node.spec.uses,
                "needs": list(step.node.inputs),
                "gives": step.node.kind,
                "state": step.state,
                "reason": step.reason,
                "key": step.key,
                "disk": step.disk,
                "memory": step.memory,
            }
            for step in plan.steps
        ],
        "facts": dict(plan.facts),
        "disk": plan.disk,
        "memory": plan.memory,
        "warnings": list(plan.warnings),
        "problems": list(plan.problems),
    }


def show_report(run: RunSummary, form: str, console: Console) -> None:
    """Print the report of a run as ``table``, ``md``, ``csv`` or ``json``."""
    from tasks.evaluate.report import as_json, markdown, table_csv

    if form == "table":
        console.print(Text(f"{run.run_id}: {run.status}", style=STATUS_STYLES.get(run.status, "bold red")))
        show_summary(run, console)
        return
    writers = {"md": markdown, "csv": table_csv, "json": lambda summary: json.dumps(as_json(summary), indent=2)}
    console.file.write(writers[form](run).rstrip("\n") + "\n")


def show_summary(run: RunSummary, console: Console, most: int | None = None) -> None:
    """Print the table of steps, what changed in each, the warnings and the gates.

    Args:
        run: what to tell of.
        console: where.
        most: how many warnings and how many gates are printed; the others are counted, and a step and a warning have
            a line each. Default: all of them, whole.
    """
    columns = _columns(run, console.width)
    console.print(_steps_table(run, columns))
    cut: dict[str, Any] = {"no_wrap": True, "overflow": "ellipsis"} if most is not None else {}
    for row in rows(run):
        told = [row[name].splitlines()[0] for name in TOLD if name not in columns and row[name] != "–"]
        if told:
            console.print(Text.assemble((f"  {row['step']}: ", "dim"), "; ".join(told)), **cut)
    found = warnings(run)
    for name, text in found[:most]:
        console.print(Text(f"! {name}: {text}", style="yellow"), **cut)
    verdicts = sorted(run.verdicts, key=lambda verdict: verdict.status == "passed")
    for verdict in verdicts[:most]:
        mark, style = VERDICT_MARKS[verdict.status]
        console.print(Text.assemble((mark, style), " ", verdict.message))
    rest = {"warning": found[most:], "gate": verdicts[most:]} if most is not None else {}
    more = [f"{len(left)} more {noun}{'' if len(left) == 1 else 's'}" for noun, left in rest.items() if left]
    if more:
        console.print(Text(f"  {' and '.join(more)} in the report", style="dim"))


def _columns(run: RunSummary, width: int) -> list[str]:
    shown = set(UNFINISHED if run.status in ("running", "cancelled") else NARROW)
    for least, more in WIDER.items():
        shown |= set(more) if width >= least else set()
    return [name for name in COLUMNS if name in shown]


def _steps_table(run: RunSummary, columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for name in columns:
        heading = run.headline.replace("_", " ") if name == "quality" else COLUMNS[name]
        table.add_column(heading, justify="left" if name in WORDS else "right", overflow="fold")
    for row in rows(run):
        table.add_row(*(Text(row[name].splitlines()[0]) for name in columns))
    return table


def show_outcome(outcome: Mapping[str, Any], console: Console) -> None:
    """The last screen of a run: table, gates, files, where to look, what to do next; about a dozen lines beside the
    table."""
    from flows.finish import report_of

    folder = Path(outcome["folder"])
    run = report_of(folder)
    console.print()
    show_summary(run, console, most=MOST)
    for name, reason in outcome["failures"].items():
        told = reason.partition("\ngo on with: ")[0]  # that stands below, once
        console.print(Text(f"✗ {name}: {told}", style="red"), soft_wrap=True)
    for note in outcome["notes"]:
        console.print(Text(f"! {note}", style="yellow"), soft_wrap=True)
    console.print()
    console.print(Text(f"{run.run_id}: {outcome['message']}", style=STATUS_STYLES.get(outcome["status"], "bold red")))
    for name, value in _where(outcome, run, folder):
        console.print(Text(f"{name:8}  {value}"), soft_wrap=True)


def _where(outcome: Mapping[str, Any], run: RunSummary, folder: Path) -> list[tuple[str, str]]:
    lines = [("result", f"{outcome['result']}: {_files(outcome['files'])}")] if outcome["result"] else []
    lines += [("load it" if not number else "", line) for number, line in enumerate(outcome["snippet"].splitlines())]
    shares = {step.id: share for step in run.steps if (share := step.value(NPU_SHARE)) is not None}
    if shares:
        lines.append(
            ("NPU", ", ".join(f"{100 * share:.1f}% of the operators of {name}" for name, share in shares.items()))
        )
    page = folder / "report" / "report.html"
    lines += [("report", str(page))] if page.is_file() else []
    lines.append(("MLflow", run.mlflow or outcome["tracking"]))
    if outcome["tracking_incomplete"]:
        lines.append(("upload", outcome["tracking_incomplete"]))
    return [*lines, ("next", outcome["next"])]


def _files(files: Mapping[str, int]) -> str:
    """The largest files with their sizes."""
    shown = [f"{name} {size(weight)}" for name, weight in list(files.items())[:MOST]]
    return ", ".join(shown) + (f" and {len(files) - MOST} more" if len(files) > MOST else "")
