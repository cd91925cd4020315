"""What each event of the journal becomes in MLflow. Sending an event twice changes nothing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from specs.schema.metrics import METRICS
from tasks.journal import Event
from tasks.tracking import models
from tasks.tracking.clean import clean_copy
from tasks.tracking.session import Session, milliseconds, valid_name
from tasks.tracking.settings import Refused
from tasks.tracking.state import PARENT
from tasks.tracking.summary import amount, headline, headline_name, note, step_note, summarise, verdict

RUN_STATUS = {"passed": "FINISHED", "failed": "FAILED", "inconclusive": "FAILED", "error": "FAILED"}
STEP_STATUS = {"done": "FINISHED", "cached": "FINISHED", "failed": "FAILED"}
"""States that are in neither table are shown as KILLED."""

PARTIAL = "lathe.partial"
"""The tag of a run that made only some of the spec's steps; it is ``true`` there, and missing elsewhere."""

LEADERS = "Passed runs:"
"""How the experiment's note begins, where it is ours."""


def _run_start(session: Session, event: Event) -> None:
    run = session.run(None, event["time"])
    spec = event.get("spec") or {}
    session.params(run, {**{key: value for key, value in spec.items() if key not in ("steps", "gates")}})
    session.tag(
        run,
        {
            "lathe.task": event.get("task"),
            "lathe.eval_data": _digest(event, "eval"),
            "lathe.status": "running",
            "lathe.git_dirty": (event.get("git") or {}).get("dirty"),
            "mlflow.note.content": event.get("description") or f"Run {event['run_id']} of {event['name']}.",
        },
    )
    inputs = [_dataset(event, split) for split in ("train", "eval") if (event.get("data") or {}).get(split)]
    if inputs:
        session.client.log_inputs(run, inputs)
    session.write(
        run,
        {
            "spec/spec.yaml": event.get("spec_text"),
            "spec/resolved.json": spec,
            "spec/environment.json": {"environment": event.get("environment"), "git": event.get("git")},
        },
    )


def _step_start(session: Session, event: Event) -> None:
    run = session.run(event["step"], event["time"])
    session.client.update_run(run, status="RUNNING")
    session.params(run, {"uses": event.get("uses"), **(event.get("spec") or {})})
    session.tag(run, {"lathe.uses": event.get("uses"), "lathe.key": event.get("key"), "lathe.state": "running"})


def _metric(session: Session, event: Event) -> None:
    from mlflow.entities import Metric

    run = session.run(event.get("step"), event["time"])
    index = event.get("index")
    moment = milliseconds(event["time"])
    metric = Metric(valid_name(event["name"]), float(event["value"]), moment, int(index or 0), run_id=run)
    session.add_metric(run, metric)


def _step_end(session: Session, event: Event) -> None:
    step = event["step"]
    run = session.run(step, event["time"] - (event.get("seconds") or 0))
    result = event.get("result") or {}
    evaluation = event.get("evaluation") or {}
    row = summarise([event]).rows[step]
    planned = next((item for item in (session.start.get("spec") or {}).get("steps", ()) if item["id"] == step), {})
    row.uses = planned.get("uses", row.uses)
    session.tag(
        run,
        {
            "lathe.uses": row.uses,
            "lathe.state": event["state"],
            "lathe.key": event.get("key"),
            "lathe.digest": event.get("digest"),
            "lathe.kind": event.get("kind"),
            "lathe.artifact": event.get("path"),
            "lathe.summary": row.summary,
            "lathe.error": row.error,
            "mlflow.note.content": step_note(row, result.get("left") or {}),
        },
    )
    _step_metrics(session, event, run)
    session.write(run, {"evaluation.json": evaluation or None, "result.json": result or None})
    session.client.set_terminated(run, STEP_STATUS.get(event["state"], "KILLED"), milliseconds(event["time"]))


def _step_metrics(session: Session, event: Event, run: str) -> None:
    from mlflow.entities import Metric

    moment = milliseconds(event["time"])
    measured = (event.get("evaluation") or {}).get("metrics") or {}
    own: Mapping[str, float] = (event.get("result") or {}).get("metrics") or {}
    batch = [Metric(valid_name(name), float(value), moment, 0, run_id=run) for name, value in own.items()]
    model = models.logged_model(session, event, run) if event.get("path") else None
    source = None
    if measured and (session.start.get("data") or {}).get("eval"):
        source = _dataset(session.start, "eval")
        session.client.log_inputs(run, [source])
    for name, found in measured.items():
        if found.get("value") is not None:
            batch.append(
                Metric(
                    valid_name(name),
                    float(found["value"]),
                    moment,
                    0,
                    model_id=model,
                    dataset_name=source and source.dataset.name,
                    dataset_digest=source and source.dataset.digest,
                    run_id=run,
                )
            )
    if event.get("seconds") is not None:
        batch.append(Metric("step_seconds", float(event["seconds"]), moment, 0, run_id=run))
    if batch:
        session.client.log_batch(run, metrics=batch)


def _gate(session: Session, event: Event) -> None:
    if event.get("step"):
        run = session.run(event["step"], event["time"])
        session.tag(run, {f"lathe.gate.{valid_name(str(event.get('metric') or 'gate'))}": verdict(event)})


def _file(session: Session, event: Event) -> None:
    run = session.run(event.get("step"), event["time"])
    path, to = Path(event["path"]), PurePosixPath(event.get("to") or "")
    if not path.exists():
        by_hand = f"mlflow artifacts log-artifact --run-id {run} --local-file PATH"
        raise Refused(f"it is no longer there; where there is a copy, send it with: {by_hand}")
    with tempfile.TemporaryDirectory(prefix="lathe-upload-") as scratch:
        renamed = not path.is_dir() and to.suffix == path.suffix and to.suffix != ""
        target = to.parent if renamed else to
        copy = clean_copy(path, Path(scratch) / (to.name if renamed else path.name), session.secrets)
        with session.progress.files(copy if copy.is_dir() else copy.parent):
            send = session.client.log_artifacts if copy.is_dir() else session.client.log_artifact
            send(run, str(copy), str(target) if target.parts else None)


def _register(session: Session, event: Event) -> None:
    models.register(session, event)


def _run_end(session: Session, event: Event) -> None:
    from mlflow.entities import Metric

    parent = session.run(None, event["time"])
    moment = milliseconds(event["time"])
    summary = summarise(session.events())
    figures = headline(summary)
    session.client.log_batch(parent, metrics=[Metric(name, value, moment, 0) for name, value in figures.items()])
    session.tag(parent, {"lathe.status": event["status"], "lathe.result": summary.result})
    refresh(session)
    for step, run in session.state.runs.items():
        if step != PARENT and (step not in summary.rows or summary.rows[step].state == "running"):
            session.tag(run, {"lathe.state": "cancelled"})
            session.client.set_terminated(run, "KILLED", moment)
    session.client.set_terminated(parent, RUN_STATUS.get(event["status"], "KILLED"), moment)
    _lead(session, summary.quality)


def refresh(session: Session) -> None:
    """Write the note on the page of the pipeline's run anew."""
    summary = summarise(session.events())
    text = "\n\n".join(part for part in (session.start.get("description"), note(summary)) if part)
    session.tag(session.run(None, session.start["time"]), {"mlflow.note.content": text})


def _lead(session: Session, quality: str) -> None:
    """Name the best of the passed runs on this data at the top of the experiment's page, each with a link.

    A run of some of the steps (tag ``lathe.partial``) is no match for the others.
    """
    client, experiment = session.client, session.experiment
    former = client.get_experiment(experiment).tags.get("mlflow.note.content", "")
    if former and not former.startswith(LEADERS):
        return  # somebody wrote a note of their own
    wanted = "tags.`lathe.role` = 'pipeline' AND tags.`lathe.status` = 'passed'"
    if digest := _digest(session.start, "eval"):
        wanted += f" AND tags.`lathe.eval_data` = '{digest}'"
    parts = []
    for word, metric in ((f"best {quality}", quality), ("smallest", "size"), ("fastest", "latency_p50")):
        key, scale = headline_name("best", metric)
        order = "DESC" if METRICS[metric].better == "higher" else "ASC"
        found = _first_whole(session, wanted, f"metrics.`{key}` {order}")
        if found is not None and key in found.data.metrics:
            value = amount(metric, found.data.metrics[key] / scale)
            parts.append(f"{word} [{found.info.run_name}](#/experiments/{experiment}/runs/{found.info.run_id}) {value}")
    if parts:
        client.set_experiment_tag(experiment, "mlflow.note.content", f"{LEADERS} {' · '.join(parts)}")


def _first_whole(session: Session, wanted: str, order: str) -> Any:
    """The first run of a search that is not partial; MLflow cannot search for a tag that is missing."""
    token = None
    while True:
        page = session.client.search_runs(
            [session.experiment], wanted, order_by=[order], max_results=10, page_token=token
        )
        for run in page:
            if run.data.tags.get(PARTIAL) != "true":
                return run
        token = page.token
        if not token:
            return None


SENDERS: Mapping[str, Callable[[Session, Event], None]] = {
    "run_start": _run_start,
    "step_start": _step_start,
    "metric": _metric,
    "step_end": _step_end,
    "gate": _gate,
    "file": _file,
    "register": _register,
    "run_end": _run_end,
}


def _digest(start: Event, split: str) -> str | None:
    """The beginning of a data set's fingerprint; MLflow shows it everywhere, and takes at most 36 characters."""
    data = (start.get("data") or {}).get(split)
    return str(data["fingerprint"]).rpartition(":")[2][:12] if data else None


def _dataset(start: Event, split: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = start["data"][split]
    source = str(data["source"])
    parts = PurePosixPath(source).parts
    dataset = Dataset(
        name=f"{split}: {'/'.join(parts[-2:])}"[:500],
        digest=_digest(start, split) or "",
        source_type="local",
        source=json.dumps({"uri": source}),
    )
    context = "training" if split == "train" else "evaluation"
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
