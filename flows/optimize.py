"""The flow: plan, submit the graph, judge the gates, report."""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from flows.due import cover_due
from flows.errors import PlanError, RunEnded
from flows.finish import Outcome, cut_short, finish
from flows.home import Home, new_run_id
from flows.places import Problem, named_in, path_of_step, placed
from flows.plan import Plan, PlannedStep, make_plan
from flows.reconcile import reconcile, remember_flow_run, watch_for_cancel
from flows.record import read_run
from specs.schema.gates import GateSpec
from specs.schema.graph import GraphError
from specs.schema.load import LoadedSpec, load
from specs.schema.mistakes import SpecErrors
from tasks import events, supervise
from tasks.artifacts import Store
from tasks.context import StepError
from tasks.jobs import StepJob
from tasks.journal import Journal, environment, git_state
from tasks.run_step import run_step
from tasks.tracking import Tracker, run_address, tracking_uri

STATE_OF_STATUS = {
    "passed": Completed,
    "failed": Failed,
    "inconclusive": Failed,
    "error": Failed,
    "cancelled": Cancelled,
}
LAST_WORDS_SECONDS = 2.0
"""How long a run that is interrupted waits for the records of its steps."""

PREFECT_NAME = {"failed": "GateFailed", "inconclusive": "GateInconclusive", "error": "StepFailed"}


@flow(name="lathe", persist_result=False, log_prints=False)
def optimize(
    spec: str,
    # A served flow is sent to its process without the names that only its annotations use: built-in ones alone here.
    overrides: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    from_step: tuple[str, ...] = (),
    no_cache: bool = False,
    home: str | None = None,
) -> State[Any]:
    """Run one spec from the data to the report.

    Args:
        spec: the path of the YAML file.
        overrides: dotted ``key=value`` pairs laid over the spec.
        only: make these steps and what they need, nothing else; empty: all.
        from_step: make these steps and everything after them anew.
        no_cache: make every step anew.
        home: where artifacts and records go; default: ``$LATHE_HOME``, else ``.lathe`` beside the spec.

    Returns:
        A state that is completed when every gate passed, and else says what did not.

    Raises:
        SpecErrors: the spec is wrong.
        PlanError: the plan found a problem that makes the run pointless.
    """
    cover_due()
    path = Path(spec)
    loaded = load(path, overrides)
    place = Home(Path(home)) if home else Home.of(path)
    supervise.reset(loaded.spec.resources.parallel)
    with _stop_on_signals():
        events.publish({"event": "status", "text": "planning"})
        for killed in reconcile(place):
            events.publish({"event": "status", "text": f"closed {killed}, whose process was killed"})
        try:
            plan = make_plan(loaded, place, only=only, from_step=from_step, no_cache=no_cache)
            if plan.problems:
                raise PlanError("the plan found problems:\n" + "\n".join(f"- {problem}" for problem in plan.problems))
            if supervise.cancelled():
                raise supervise.RunCancelled
        except supervise.RunCancelled:
            return Cancelled(message="cancelled before the first step")
        run = Run(loaded, place, plan, resume_command(path, overrides, only))
        outcome = run.carry_out()
        _leave_artifacts(run, outcome)
    state, name = STATE_OF_STATUS[outcome.status], PREFECT_NAME.get(outcome.status)
    found = outcome.as_json()
    data = found if state is Completed else RunEnded(outcome.message, found)
    return state(message=outcome.message, data=data, **({"name": name} if name else {}))


def _without_traceback(record: logging.LogRecord) -> bool:
    """What a run that Prefect started in a process of its own says of an end that is no fault of the program."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (RunEnded, StepError, SpecErrors, GraphError, CancelledRun, TerminationSignal)):
        record.msg, record.args = f"the run ended: {error}", ()
        record.exc_info = record.exc_text = None
    return True


logging.getLogger("prefect.engine").addFilter(_without_traceback)


def resume_command(spec: Path, overrides: Sequence[str], only: Sequence[str]) -> str:
    """The command that goes on where a run stopped; what is finished comes from the cache."""
    given = [("--set", item) for item in overrides] + [("--only", name) for name in only]
    return shlex.join(["lathe", "run", str(spec), *(part for pair in given for part in pair)])


class Run:
    """One run: its identity, its records, and the steps in flight."""

    def __init__(self, loaded: LoadedSpec, home: Home, plan: Plan, resume: str) -> None:
        self.loaded = loaded
        self.spec = loaded.spec
        self.home = home
        self.plan = plan
        self.resume = resume
        self.id = new_run_id(self.spec.name)
        self.folder = home.run(self.id)
        self.folder.mkdir(parents=True)
        self.store = Store(home.store)
        self.journal = Journal(self.folder, loaded.secrets)
        self.started = time.time()
        self.futures: dict[str, PrefectFuture[Any]] = {}

    def carry_out(self) -> Outcome:
        with self.store.lease(self.id):
            self.store.pin(self.id, [step.key for step in self.plan.selected()], spec=self.spec.name)
            self._announce()
            tracker = Tracker(self.folder, self.home.root, tracking_uri(self.home.root), tuple(self.loaded.secrets))
            tracker.start()
            try:
                remember_flow_run(self.folder)
                with watch_for_cancel(), supervise.hushing(tracker.quiet):
                    outcomes, failures = self._run_graph()
                return finish(self, outcomes, failures, tracker)
            except KeyboardInterrupt:
                self._drop_everything()
                return cut_short(self, tracker)
            finally:
                tracker.close()

    def _drop_everything(self) -> None:
        """Kill the steps that work, and leave an end of every step in the records."""
        supervise.kill_all()
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        for future in self.futures.values():
            future.wait(max(0.0, deadline - time.monotonic()))
        self._account_for_the_rest({})

    def _announce(self) -> None:
        spec = self.spec
        experiment = spec.tracking.experiment or spec.name
        self.journal.append(
            "run",
            {
                "event": "run_start",
                "time": self.started,
                "run_id": self.id,
                "name": spec.name,
                "experiment": experiment,
                "description": spec.description,
                "task": spec.task,
                "spec_path": str(self.loaded.path),
                "spec_text": self.loaded.text,
                "spec": spec.model_dump(mode="json", by_alias=True),
                "environment": environment(),
                "git": git_state(self.loaded.path.parent),
                "data": {
                    split: {"source": getattr(spec.data, split), "fingerprint": self.plan.fingerprints[split]}
                    for split in ("train", "eval")
                },
                "steps": [{"id": step.node.id, "needs": list(step.node.inputs)} for step in self.plan.selected()],
                "warnings": [text for text in self.plan.warnings if text.startswith("data.")],
                "tags": {
                    "device": self.plan.device,
                    "prefect.flow_run": str(flow_run.id),
                    **({} if self.plan.whole else {"lathe.partial": "true"}),
                },
            },
        )
        events.publish(
            {
                "event": "run_start",
                "run_id": self.id,
                "steps": [
                    {"id": step.node.id, "uses": step.node.spec.uses, "state": step.state}
                    for step in self.plan.selected()
                ],
            }
        )

    def _run_graph(self) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
        """Submit every step at once, and wait for all of them; Prefect starts each when its inputs are there."""
        futures = self.futures
        for step in self.plan.selected():
            node = step.node
            task = run_step.with_options(
                name=node.id,
                task_run_name=node.id,
                retries=node.spec.retries,
                retry_delay_seconds=node.spec.retry_delay,
                tags=[node.spec.uses],
            )
            # Prefect waits for the futures in here and hands over what they return.
            upstream: Any = {name: futures[name] for name in (*node.inputs, *self._compared_by(step))}
            futures[node.id] = task.submit(self._job(step), upstream)
        outcomes: dict[str, Mapping[str, Any]] = {}
        failures: dict[str, str] = {}
        for name, future in futures.items():
            future.wait()
            state = future.state
            if state.is_completed():
                outcomes[name] = future.result()
            elif not state.is_pending() and not state.is_cancelled():
                failures[name] = self._with_place(name, _why(name, state))
        self._account_for_the_rest(failures)
        return outcomes, failures

    def _with_place(self, name: str, reason: str) -> str:
        """The reason of a failure, behind the place of the field that it begins with, where it does."""
        step = path_of_step(self.spec.steps, self.plan.graph[name].spec, reason)
        return placed(self.loaded, Problem(reason, named_in(reason) or (step if len(step) > 2 else ())))

    def _account_for_the_rest(self, failures: Mapping[str, str]) -> None:
        """Steps that never came to their end leave a record too."""
        record = read_run(self.folder)
        ended = set(record.ended) if record else set()
        for step in self.plan.selected():
            name = step.node.id
            if name in ended:
                continue
            if name in failures:
                state, error = "failed", failures[name]
            elif supervise.cancelled():
                state, error = "cancelled", "cancelled before it started"
            else:
                state, error = "skipped", "a step that it needs failed"
            end = {"event": "step_end", "step": name, "state": state, "error": error, "result": {}}
            self.journal.append(name, {**end, "key": step.key, "evaluation": None})
            events.publish(end)

    def _gates_judged_by(self, step: PlannedStep) -> list[GateSpec]:
        return [gate for gate in self.spec.gates if gate.step == step.node.id] if step.node.spec.judges else []

    def _compared_by(self, step: PlannedStep) -> tuple[str, ...]:
        """What the gates of a step that judges refer to; the spec's check holds these to be its ancestors."""
        named = {gate.relative_to for gate in self._gates_judged_by(step) if gate.form in ("drop", "gain")}
        return tuple(sorted(named - set(step.node.inputs)))

    def _job(self, step: PlannedStep) -> StepJob:
        spec = self.spec
        judged = self._gates_judged_by(step)
        return StepJob(
            run_id=self.id,
            run_folder=str(self.folder),
            store=str(self.home.store),
            step=step.node.spec.model_dump(mode="json", by_alias=True),
            key=step.key,
            recipe=dict(step.recipe),
            inputs=step.node.inputs,
            task=spec.task,
            model=spec.model.model_dump(mode="json"),
            data=spec.data.model_dump(mode="json"),
            conditions=dict(self.plan.conditions),
            gates=tuple(gate.model_dump(mode="json") for gate in judged),
            compared=self._compared_by(step),
            variables=tuple(sorted(self.loaded.variables)),
            seed=spec.seed,
            device=self.plan.device,
            threads=self.plan.threads,
            patient=self.plan.side_by_side(step.node.id),
            started=self.started,
            force=step.force,
            resume=self.resume,
        )


def _why(name: str, state: State[Any]) -> str:
    """The reason alone; Prefect puts the kind of the exception before it, and the task the step."""
    return (state.message or state.name or "").rpartition(f"StepFailed: {name}: ")[2]


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[None]:
    """The first Ctrl-C or SIGTERM cancels the run in good order; any further one interrupts.

    Raises:
        KeyboardInterrupt: at the second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {}
    asked = False

    def cancel(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        supervise.cancel_all()
        events.publish({"event": "cancelling"})

    for number in (signal.SIGINT, signal.SIGTERM):
        former[number] = signal.signal(number, cancel)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _leave_artifacts(run: Run, outcome: Outcome) -> None:
    """The report's table on the flow run, and on every task run the way to its MLflow run."""
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:  # Prefect's copies are a convenience
        create_table_artifact(key="report", table=outcome.rows, description=f"Run `{run.id}`: {outcome.message}")
        for name, future in run.futures.items():
            address = run_address(run.folder, run.home.root, step=name)
            if address:
                client.create_artifact(
                    ArtifactCreate(
                        key="mlflow",
                        type="markdown",
                        data=f"[{name} in MLflow]({address.split()[0]})",
                        flow_run_id=UUID(str(flow_run.get_id())),
                        task_run_id=future.task_run_id,
                    )
                )
