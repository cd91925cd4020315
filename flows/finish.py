"""The end of a run: gates, report, registration, and what the last screen says."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.home import Home
from flows.plan import Plan
from flows.record import KILLED, UNSENT, RunRecord, read_run
from specs.schema.base import Task
from tasks import events, supervise
from tasks.artifacts import Store, with_remedy
from tasks.context import Evaluation, StepError
from tasks.evaluate.footprint import files
from tasks.evaluate.gates import Verdict, judge, overall
from tasks.evaluate.report import build_report
from tasks.evaluate.summary import RunStatus, RunSummary, StepRow, rows
from tasks.export.runtime import first_file, runtime_of
from tasks.journal import read
from tasks.models.applications import auto_name
from tasks.models.load import read_config
from tasks.models.transforms import FILE, read_extras
from tasks.tracking import Tracker, result_step, run_address

if TYPE_CHECKING:
    from flows.optimize import Run

REPORT = "report"


@dataclass(frozen=True)
class Outcome:
    """What a run came to, as the flow returns it.

    Args:
        run_id: the run.
        folder: its folder.
        status: of the run as a whole.
        message: one line.
        failures: why steps failed, by id.
        rows: the report's table.
        tracking: the store that the records went to.
        tracking_incomplete: what MLflow has not got, and how to send it; empty where it has everything.
        notes: what went wrong beside the steps and gates.
        result: the folder of the run's result; empty where there is none.
        files: bytes of each of its files, the largest first.
        snippet: how to load the result; it says where Lathe is needed for that.
        next: the command to go on with.
    """

    run_id: str
    folder: str
    status: RunStatus
    message: str
    failures: dict[str, str]
    rows: list[dict[str, str]]
    tracking: str
    tracking_incomplete: str
    notes: list[str]
    result: str
    files: dict[str, int]
    snippet: str
    next: str

    def as_json(self) -> dict[str, Any]:
        """The outcome as JSON data, with the version of its form."""
        return {"version": 1, **asdict(self)}


def finish(
    run: Run, outcomes: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str], tracker: Tracker
) -> Outcome:
    """Judge the gates, write the report, end the journal, and let the tracker send the rest."""
    cancelled = supervise.cancelled()
    doing = "writing the report" if cancelled else "judging the gates and writing the report"
    events.publish({"event": "status", "text": doing})
    verdicts = [] if cancelled else _verdicts(run, outcomes)
    for verdict in verdicts:
        run.journal.append("run", {"event": "gate", **asdict(verdict), "verdict": verdict.status})
    status: RunStatus = "cancelled" if cancelled else "error" if failures else overall(verdicts)
    message = _message(run, status, failures, verdicts)
    if run.spec.tracking.register_ and run.plan.whole and status == "passed":
        _register(run, outcomes)
    run.journal.append("run", {"event": "run_end", "status": status, "message": message})
    next_command = _next(run, status)
    summary = summarise(run.folder, mlflow=address(run.folder), next_command=next_command)
    notes = _report(run, summary)
    delivery = tracker.close()
    result = outcomes.get(_result_step(run.plan))
    return Outcome(
        run_id=run.id,
        folder=str(run.folder),
        status=status,
        message=message,
        failures=dict(failures),
        rows=rows(summary),
        tracking=delivery.uri,
        tracking_incomplete="" if delivery.uploaded else f"{delivery.reason}; send the rest with: {delivery.remedy}",
        notes=[*notes, *(run.loaded.redact(f"MLflow: {problem}") for problem in delivery.problems)],
        result=result["path"] if result else "",
        files=_by_size(Path(result["path"])) if result else {},
        snippet=snippet(result["kind"], Path(result["path"]), run.spec.task) if result else "",
        next=next_command,
    )


def cut_short(run: Run, tracker: Tracker) -> Outcome:
    """End a run whose user does not wait any longer: its records get their end, and nothing else is begun."""
    record = read_run(run.folder)
    if record is None or record.end is None:
        status, message = "cancelled", "interrupted; finished steps are kept"
        run.journal.append("run", {"event": "run_end", "status": status, "message": message})
    else:
        status, message = record.end["status"], record.end["message"]
    (run.folder / UNSENT).touch()
    delivery = tracker.close(timeout=0)
    return Outcome(
        run_id=run.id,
        folder=str(run.folder),
        status=status,
        message=message,
        failures={},
        rows=rows(summarise(run.folder)),
        tracking=delivery.uri,
        tracking_incomplete="" if delivery.uploaded else "interrupted; the next start sends the rest",
        notes=[],
        result="",
        files={},
        snippet="",
        next=run.resume,
    )


def _by_size(folder: Path) -> dict[str, int]:
    return dict(sorted(files(folder).items(), key=lambda item: -item[1]))


def snippet(kind: str, folder: Path, task: Task) -> str:
    """Python that loads an artifact: without Lathe where its format allows, else with it, and then it says why."""
    if kind == "export":
        file = first_file(folder) or folder
        return runtime_of(file).snippet.format(repr(str(file)))
    if kind == "packed":
        return f"from tasks.models import load\nmodel = load({str(folder)!r})  # packed integers are Lathe's own format"
    extras = read_extras(folder)
    if extras.transforms or extras.aliases:
        return f"from tasks.models import load\nmodel = load({str(folder)!r})  # {FILE} in it is Lathe's own"
    auto = auto_name(task, read_config(folder)["model_type"])
    return f"from transformers import {auto}\nmodel = {auto}.from_pretrained({str(folder)!r})"


def _verdicts(run: Run, outcomes: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    selected = {step.node.id for step in run.plan.selected()}
    evaluations = {
        name: Evaluation.read(Path(outcome["evaluation"]))
        for name, outcome in outcomes.items()
        if outcome["evaluation"]
    }
    leaves = [name for name in run.plan.graph.leaves() if name in selected]
    gates = [gate for gate in run.spec.gates if gate.step in selected or (gate.step is None and leaves)]
    return judge(gates, evaluations, leaves, run.spec.evaluate, run.spec.seed)


def _report(run: Run, summary: RunSummary) -> list[str]:
    """Write the report whole or not at all; where that fails the run has its outcome all the same, with a note."""
    folder = run.folder / REPORT
    try:
        build_report(summary, folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        return [f"the report could not be written to {folder}: {with_remedy(error)}"]
    run.journal.append("run", {"event": "file", "step": None, "path": str(folder), "to": REPORT})
    return []


def _message(run: Run, status: RunStatus, failures: Mapping[str, str], verdicts: list[Verdict]) -> str:
    held = sum(verdict.status == "passed" for verdict in verdicts)
    selected = {step.node.id for step in run.plan.selected()}
    unjudged = sum(gate.step is not None and gate.step not in selected for gate in run.spec.gates)
    rest = f"; {unjudged} gates on steps outside the selection were not judged" if unjudged else ""
    if status == "cancelled":
        return "cancelled; finished steps are kept"
    if status == "error":
        return f"failed: {', '.join(failures)}"
    if not verdicts:
        return f"passed{rest or '; the spec has no gates'}"
    return f"{status}: {held} of {len(verdicts)} gates hold{rest}"


def _result_step(plan: Plan) -> str:
    steps = [{"id": step.node.id, "needs": step.node.inputs} for step in plan.selected()]
    found = result_step(steps, plan.spec.tracking.register_step)
    assert found is not None, "a plan without steps"
    return found


def _register(run: Run, outcomes: Mapping[str, Mapping[str, Any]]) -> None:
    name = _result_step(run.plan)
    outcome = outcomes[name]
    run.journal.append(
        "run",
        {
            "event": "register",
            "step": name,
            "name": run.spec.tracking.register_,
            "path": outcome["path"],
            "kind": outcome["kind"],
            "task": run.spec.task,
        },
    )


def _next(run: Run, status: RunStatus) -> str:
    if status in ("error", "cancelled"):
        return run.resume
    return f"lathe up --spec {run.loaded.path}   # then look at the run in MLflow"


def summarise(folder: Path, mlflow: str = "", next_command: str = "") -> RunSummary:
    """The summary of a run from its journal.

    Raises:
        StepError: no run has begun in the folder.
    """
    record = read_run(folder)
    if record is None:
        raise StepError(f"{folder} holds no run; see the runs with: ls {folder.parent}")
    start, status = record.start, record.end["status"] if record.end else "running" if _alive(folder) else "error"
    return RunSummary(
        name=start["name"],
        run_id=start["run_id"],
        started=datetime.fromtimestamp(start["time"], UTC).isoformat(timespec="seconds"),
        seconds=_last_moment(record, status) - start["time"],
        task=start["task"],
        steps=tuple(_row(record, step["id"], status) for step in start["steps"]),
        verdicts=tuple(_verdict(event) for event in record.verdicts),
        status=status,
        environment=_environment(start["environment"]),
        mlflow=mlflow,
        edges=tuple((need, step["id"]) for step in start["steps"] for need in step["needs"]),
        next=next_command,
        warnings=tuple(start.get("warnings", ())),
    )


def _alive(folder: Path) -> bool:
    store = Home(folder.parent.parent).store
    return store.is_dir() and Store(store).leased(folder.name)


def _last_moment(record: RunRecord, status: RunStatus) -> float:
    if record.end:
        return record.end["time"]
    return time.time() if status == "running" else max(event["time"] for event in read(record.folder))


def _row(record: RunRecord, name: str, status: RunStatus) -> StepRow:
    end = record.ended.get(name)
    uses = record.begun[name]["uses"] if name in record.begun else ""
    if name in record.unfinished:
        running = status == "running"
        return StepRow(name, uses, "running" if running else "failed", error=None if running else KILLED)
    if end is None:
        return StepRow(name, uses, "waiting" if status == "running" else "cancelled")
    result = end["result"]
    return StepRow(
        id=name,
        uses=uses,
        state=end["state"],
        seconds=end.get("seconds"),
        summary=result.get("summary", ""),
        touched=len(result.get("touched", ())),
        left=result.get("left", {}),
        warnings=tuple(result.get("warnings", ())),
        error=end["error"],
        evaluation=Evaluation(Path(end["evaluation_path"]), end["evaluation"]) if end["evaluation"] else None,
        folder=Path(end["path"]) if end.get("path") else None,
    )


def _verdict(event: Mapping[str, Any]) -> Verdict:
    return Verdict(**{name: event[name] for name in Verdict.__dataclass_fields__})


def _environment(found: Mapping[str, Any]) -> dict[str, str]:
    flat = {name: str(value) for name, value in found.items() if isinstance(value, (str, int, float))}
    return flat | {name: str(value) for name, value in found.get("libraries", {}).items() if value}


def address(folder: Path) -> str:
    """The address of a run in MLflow; empty where it has none, because the store is no server or has not got it."""
    return run_address(folder, folder.parent.parent) or ""


def report_of(folder: Path) -> RunSummary:
    """The summary of a past run, with its address in MLflow where it got there."""
    return summarise(folder, mlflow=address(folder))
