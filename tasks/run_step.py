"""The one Prefect task: key -> cached? -> step -> artifact -> evaluation -> journal."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from specs.schema.base import StepSpec
from specs.schema.load import secrets_of
from specs.schema.redaction import redact, redact_values
from tasks import events, forkserver, supervise
from tasks.artifacts import LockCancelled, Store, StoreError, with_remedy
from tasks.conditions import DERIVED, evaluation_key
from tasks.context import Artifact, StepError
from tasks.jobs import StepJob, step_from_json
from tasks.journal import Journal

RECIPE_STRUCTURE = ("step", "uses", "names", "inputs", "sources", "libraries")
"""What a recipe holds that is no text from the spec."""


class StepFailed(Exception):
    """A step failed; the message says why and how to go on."""

    def __init__(self, message: str, retriable: bool) -> None:
        super().__init__(message)
        self.retriable = retriable


def worth_a_retry(task: Any, run: Any, state: State[Any]) -> bool:
    """Prefect's question after a failure: no, where the step refused its input or the run was cancelled."""
    try:
        state.result()
    except StepFailed as failure:
        return failure.retriable and not supervise.cancelled()
    except Exception:
        return not supervise.cancelled()
    return False


@task(name="step", persist_result=False, cache_policy=NO_CACHE, retry_condition_fn=worth_a_retry)
def run_step(job: StepJob, upstream: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | State[Any]:
    """Make the artifact of one step, or find it, and measure it.

    Args:
        job: what to do.
        upstream: the outcomes of the steps that this one needs, by id.

    Returns:
        The outcome: a small JSON mapping that names the artifact and its evaluation.

    Raises:
        StepFailed: the step or its evaluation failed.
    """
    return _Attempt(job, upstream).outcome()


class _Attempt:
    """One try of one step."""

    def __init__(self, job: StepJob, upstream: Mapping[str, Mapping[str, Any]]) -> None:
        self.job = job
        self.upstream = upstream
        self.spec: StepSpec = step_from_json(job.step)
        self.store = Store(Path(job.store))
        self.journal = Journal(Path(job.run_folder), secrets_of(job.variables))
        self.log = Path(job.run_folder) / "logs" / f"{self.spec.id}.log"
        self.started = time.time()

    def outcome(self) -> dict[str, Any] | State[Any]:
        self._record("step_start", uses=self.spec.uses, key=self.job.key, spec=self.job.step)
        artifact: Artifact | None = None
        try:
            artifact, made = self._artifact()
            reference = self._parity_reference(artifact)
            evaluation = self._evaluation(artifact, reference) if self.spec.evaluate else None
        except (supervise.RunCancelled, LockCancelled):
            self._end("cancelled", artifact)
            return Cancelled(message=f"{self.spec.id} was cancelled")
        except Exception as failure:
            raise self._failed(failure, artifact) from None
        outcome = self._end("done" if made else "cached", artifact, evaluation)
        return {**outcome, "reference": str(reference) if reference else None}

    def _artifact(self) -> tuple[Artifact, bool]:
        with self._locked(self.job.key):
            standing = self.store.find(self.job.key)
            if standing is not None and not self.job.force:
                self._pin_data(standing)
                return standing, False
            with self.store.scratch() as scratch:
                out, work = scratch / "out", scratch / "work"
                out.mkdir()
                work.mkdir()
                made = self._child(
                    {
                        "do": "step",
                        "step": self.job.step,
                        "model": self.job.model,
                        "inputs": [self._reference(name) for name in self.job.inputs],
                        "evaluations": self._evaluations() if self.spec.judges else {},
                        "gates": self.job.gates,
                        "out": str(out),
                        "work": str(work),
                        "checkpoints": str(self.store.checkpoints(self.job.key)),
                    },
                    threads=self.job.threads,
                    patient=self.job.patient,
                    loaded=self.spec.heavy,
                )
                if standing is not None and self.store.digest(out) != standing.digest:
                    self.store.discard(self.job.key)  # the step is not reproducible; else others may be reading it
                artifact = self.store.commit(
                    out,
                    key=self.job.key,
                    kind=made["kind"],
                    recipe=redact_values(self.job.recipe, secrets_of(self.job.variables), kept=RECIPE_STRUCTURE),
                    result={**made["result"], "data": made["data"]},
                    properties=made["properties"],
                )
                return artifact, True

    def _evaluation(self, artifact: Artifact, reference: Path | None) -> Path:
        measured = self.job.conditions
        key = evaluation_key(artifact.digest, reference.name if reference else None, measured)
        self.store.pin(self.job.run_id, [key])
        with self._locked(key):
            standing = self.store.find(key)
            if standing is not None and not self._outdated(standing):
                self._pin_data(standing)
                return standing.path
            with self.store.scratch() as scratch:
                out = scratch / "out"
                out.mkdir()
                made = self._child(
                    {
                        "do": "evaluate",
                        "artifact": _as_reference(artifact),
                        "evaluate": measured["evaluate"],
                        "out": str(out),
                        "tokenizer": str(artifact.path),
                        "reference": str(reference) if reference else None,
                    },
                    threads=measured["threads"],
                    patient=False,
                    loaded=artifact.kind != "export",  # the memory of an export's runtime is its own
                )
                if standing is not None:
                    self.store.discard(key)
                recipe = {**measured, "artifact": artifact.digest, "step": self.spec.id, "uses": "evaluate"}
                touched = ["evaluation.json"]
                result = {"summary": f"measured {self.spec.id}", "touched": touched, "data": made["data"]}
                return self.store.commit(out, key=key, kind="report", recipe=recipe, result=result, properties={}).path

    def _pin_data(self, standing: Artifact) -> None:
        """What is made anew pins the encoded data itself; what stands was made with data that this run needs too."""
        if data := standing.manifest["result"].get("data"):
            self.store.pin(self.job.run_id, data)

    def _outdated(self, evaluation: Artifact) -> bool:
        """Whether to measure again; a step that only hands on an artifact need not repeat what this run measured."""
        made = datetime.fromisoformat(evaluation.manifest["created"]).timestamp()
        return self.job.force and made < self.job.started

    def _child(self, job: Mapping[str, Any], threads: int, patient: bool, loaded: bool) -> dict[str, Any]:
        shared = {
            "run_id": self.job.run_id,
            "task": self.job.task,
            "data": self.job.data,
            "store": self.job.store,
            "device": self.job.device,
            "threads": threads,
            "seed": self.job.seed,
        }
        return supervise.run_child(
            {**shared, **job},
            threads=self.job.threads,
            patient=patient,
            loaded=loaded and forkserver.available(self.job.device),
            log=self.log,
            on_event=self._on_event,
            timeout=self.spec.timeout,
        )

    def _on_event(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "metric":
            self._record("metric", name=event["name"], value=event["value"], index=event["step"])
        events.publish({**event, "step": self.spec.id})

    def _locked(self, key: str) -> contextlib.AbstractContextManager[Any]:
        return self.store.lock(key, cancelled=supervise.cancelled)

    def _reference(self, name: str) -> dict[str, str]:
        artifact = self.store.open(self.upstream[name]["key"])
        return _as_reference(artifact)

    def _evaluations(self) -> dict[str, str]:
        """Those of the inputs and of what they are compared with; a step without one is judged as such."""
        names = (*self.job.inputs, *self.job.compared)
        return {name: self.upstream[name]["evaluation"] for name in names if self.upstream[name]["evaluation"]}

    def _parity_reference(self, artifact: Artifact) -> Path | None:
        """The evaluation of the torch model that an export or a packed model was made from, by whichever way it came
        here."""
        if artifact.kind not in DERIVED:
            return None
        for name in self.job.inputs:
            taken = self.upstream[name]
            reference = taken["reference"] if taken["digest"] == artifact.digest else taken["evaluation"]
            if reference and (Path(reference) / "reference.safetensors").exists():
                return Path(reference)
        return None

    def _failed(self, failure: Exception, artifact: Artifact | None) -> StepFailed:
        """Record the failure; what the step itself refused would be refused again, all else may be tried again."""
        known = isinstance(failure, (supervise.ChildFailed, StepError))
        odd = not known and not isinstance(failure, OSError)
        details = getattr(failure, "details", "") or (traceback.format_exc() if odd else "")
        if details:
            with self.log.open("a") as log:
                log.write(details + "\n")
        reason = self._redacted(str(failure) if known else with_remedy(failure))
        self._end("failed", artifact, error=reason)
        refused = isinstance(failure, StepError) and not isinstance(failure, StoreError)
        return StepFailed(
            f"{self.spec.id}: {reason}\nlog: {self.log}\ngo on with: {self.job.resume}",
            getattr(failure, "retriable", not refused),
        )

    def _redacted(self, value: Any) -> Any:
        return redact(value, secrets_of(self.job.variables))

    def _redact_log(self) -> None:
        """The child writes its log itself; a traceback in it may hold a value from the environment."""
        if self.job.variables and self.log.exists():
            text = self.log.read_text(errors="replace")
            if (clean := self._redacted(text)) != text:
                self.log.write_text(clean)

    def _end(
        self, state: str, artifact: Artifact | None, evaluation: Path | None = None, error: str | None = None
    ) -> dict[str, Any]:
        record = json.loads((evaluation / "evaluation.json").read_bytes()) if evaluation else None
        outcome = {
            "step": self.spec.id,
            "state": state,
            "key": self.job.key,
            "digest": artifact.digest if artifact else None,
            "kind": artifact.kind if artifact else None,
            "path": str(artifact.path) if artifact else None,
            "seconds": time.time() - self.started,
        }
        result = dict(artifact.manifest["result"]) if artifact else {}
        self._redact_log()
        self._record(
            "step_end",
            **{**outcome, "result": result, "evaluation": record, "error": error},
            evaluation_path=evaluation and str(evaluation),
        )
        events.publish({"event": "step_end", "step": self.spec.id, "state": state, "error": error, "result": result})
        return {**outcome, "evaluation": str(evaluation) if evaluation else None}

    def _record(self, event: str, **fields: Any) -> None:
        entry = {"event": event, "time": time.time(), "step": self.spec.id, **fields}
        self.journal.append(self.spec.id, entry)
        if event == "step_start":
            events.publish({"event": event, "step": self.spec.id})


def _as_reference(artifact: Artifact) -> dict[str, str]:
    return {"key": artifact.key, "kind": artifact.kind, "digest": artifact.digest, "path": str(artifact.path)}
