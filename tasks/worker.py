"""The child process: reads one job, does it, reports events as JSON lines. Started by ``tasks.supervise``."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from specs.schema.gates import GateSpec
from specs.schema.pipeline import DataSpec, EvaluateSpec, ModelSpec
from tasks.artifacts import with_remedy, working_for
from tasks.context import Artifact, Evaluation, StepContext, StepError, StepResult
from tasks.jobs import step_from_json

Emit = Callable[[Mapping[str, Any]], None]

PROGRESS_EVERY = 0.2
"""Seconds between two progress events; more would only slow the step down."""


def main(parent: int | None = None) -> None:
    """Do the job given on standard input. The exit code is 0 whenever a result or an error was reported.

    Args:
        parent: the process that this one was forked from; default: the one that the job names.
    """
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print goes to the log and never into the protocol
    job = json.loads(sys.stdin.buffer.readline())
    _die_with(parent or job["parent"])
    emit = _throttled(lambda event: _write(events, event))
    try:
        with working_for(job["run_id"]) as data:
            result = _JOBS[job["do"]](job, emit)
    except StepError as error:
        emit({"event": "error", "retriable": False, "message": str(error), "details": traceback.format_exc()})
    except MemoryError:
        emit({"event": "error", "retriable": True, "message": "the memory ran out", "details": traceback.format_exc()})
    except Exception as error:
        emit({"event": "error", "retriable": True, "message": with_remedy(error), "details": traceback.format_exc()})
    else:
        emit({"event": "result", **result, "data": sorted(data)})
    # Native libraries may keep threads that never end; what had to be written is written.
    sys.stderr.flush()
    os._exit(0)


def _write(stream: Any, event: Mapping[str, Any]) -> None:
    line = memoryview(json.dumps(event).encode() + b"\n")
    while line:
        line = line[stream.write(line) :]


def _throttled(emit: Emit) -> Emit:
    last = 0.0

    def send(event: Mapping[str, Any]) -> None:
        nonlocal last
        if event["event"] == "progress" and event["done"] < event["total"]:
            if time.monotonic() - last < PROGRESS_EVERY:
                return
            last = time.monotonic()
        emit(event)

    return send


def _die_with(parent: int) -> None:
    """End this process when the parent does, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; reaches a stopped process too

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _artifact(reference: Mapping[str, Any]) -> Artifact:
    path = Path(reference["path"])
    manifest = json.loads((path / "manifest.json").read_bytes())
    return Artifact(reference["key"], reference["kind"], reference["digest"], path, manifest)


def _do_step(job: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    from tasks.registry import find

    spec = step_from_json(job["step"])
    context = StepContext(
        step_id=spec.id,
        task=job["task"],
        model=ModelSpec.model_validate(job["model"]),
        data=DataSpec.model_validate(job["data"]),
        out=Path(job["out"]),
        work=Path(job["work"]),
        checkpoints=Path(job["checkpoints"]),
        store=Path(job["store"]),
        device=job["device"],
        threads=job["threads"],
        seed=job["seed"],
        evaluations={name: Evaluation.read(Path(path)) for name, path in job["evaluations"].items()},
        gates=TypeAdapter(tuple[GateSpec, ...]).validate_python(job["gates"]),
        emit=emit,
        exclusive=_exclusive(emit),
    )
    _configure_torch(job["threads"], job["device"], spec.heavy)
    inputs = [_artifact(reference) for reference in job["inputs"]]
    result: StepResult = find(type(spec)).function(*inputs, spec=spec, ctx=context)
    if not result.touched:
        raise StepError(f"{spec.id} changed nothing: {result.summary}")
    return {
        "kind": result.kind,
        "properties": dict(result.properties),
        "result": {
            "summary": result.summary,
            "touched": list(result.touched),
            "left": dict(result.left),
            "warnings": list(result.warnings),
            "metrics": dict(result.metrics),
        },
    }


def _do_evaluate(job: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    from tasks.evaluate.measure import evaluate

    artifact = _artifact(job["artifact"])
    _configure_torch(job["threads"], job["device"], artifact.kind != "export")

    evaluate(
        artifact,
        task=job["task"],
        data=DataSpec.model_validate(job["data"]),
        spec=EvaluateSpec.model_validate(job["evaluate"]),
        store=Path(job["store"]),
        out=Path(job["out"]),
        threads=job["threads"],
        device=job["device"],
        seed=job["seed"],
        tokenizer=Path(job["tokenizer"]),
        reference=Path(job["reference"]) if job["reference"] else None,
        exclusive=_exclusive(emit),
        emit=emit,
    )
    return {}


def _do_look(job: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    from tasks.look import look

    summary, remarks = look(
        ModelSpec.model_validate(job["model"]),
        job["task"],
        DataSpec.model_validate(job["data"]),
        [step_from_json(step) for step in job["steps"]],
    )
    shown = replace(summary, config={})  # the plan asks no more of it
    return {"model": asdict(shown), "remarks": [asdict(remark) for remark in remarks]}


def _exclusive(emit: Emit) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What asks the parent to let nothing else of the run compute, and says when that is over."""

    @contextlib.contextmanager
    def exclusive() -> Iterator[None]:
        emit({"event": "measure"})
        sys.stdin.buffer.readline()
        try:
            yield
        finally:
            emit({"event": "measured"})

    return exclusive


def _configure_torch(threads: int, device: str, needed: bool) -> None:
    if not needed:
        return
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if device == "cuda":
        torch.backends.cudnn.benchmark = False


_JOBS: dict[str, Callable[[Mapping[str, Any], Emit], dict[str, Any]]] = {
    "look": _do_look,
    "step": _do_step,
    "evaluate": _do_evaluate,
}

if __name__ == "__main__":
    main()
