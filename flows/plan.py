"""What a run will do: keys, cache hits, estimates, preflight. ``lathe run`` carries out this very plan."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows.errors import PlanError
from flows.home import Home
from flows.places import Problem, named_in, placed
from specs.schema.base import RUNTIME_BYTES, StepSpec
from specs.schema.graph import BaselineSpec, Graph, Node, build
from specs.schema.load import LoadedSpec
from specs.schema.pipeline import PipelineSpec
from specs.schema.suggest import nearest
from tasks import supervise
from tasks.artifacts import Store
from tasks.conditions import DERIVED, conditions, evaluation_key
from tasks.context import Artifact, StepError
from tasks.keys import digest_json, explain, step_key
from tasks.registry import find

if TYPE_CHECKING:
    from flows.preflight import Findings


@dataclass(frozen=True)
class PlannedStep:
    """One step of the plan.

    ``state`` is ``cached`` (artifact and measurement stand), ``measure`` (the artifact stands and will be measured),
    ``run`` (it will be made), ``out`` (outside the selection) or ``unknown`` (a problem keeps the keys from being
    known). ``reason`` says why it runs. ``disk`` and ``memory`` are estimates in bytes, 0 where nothing will run.
    """

    node: Node
    key: str
    recipe: Mapping[str, Any] = field(repr=False)
    state: Literal["cached", "measure", "run", "out", "unknown"]
    force: bool
    reason: str
    disk: int = 0
    memory: int = 0


@dataclass(frozen=True)
class Plan:
    """The whole plan. ``problems``, each with its place, stop a run before it starts; ``warnings`` do not."""

    spec: PipelineSpec
    graph: Graph
    device: str
    threads: int
    fingerprints: Mapping[str, str]
    conditions: Mapping[str, Any] = field(repr=False)
    steps: tuple[PlannedStep, ...]
    facts: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def disk(self) -> int:
        """Bytes that the run will write, roughly."""
        return sum(step.disk for step in self.steps)

    @property
    def memory(self) -> int:
        """Bytes of memory at the busiest moment, roughly: the largest steps that may run side by side."""
        needs = sorted((step.memory for step in self.steps), reverse=True)
        return sum(needs[: self.spec.resources.parallel])

    @property
    def whole(self) -> bool:
        """Whether every step of the spec takes part."""
        return all(step.state != "out" for step in self.steps)

    def selected(self) -> tuple[PlannedStep, ...]:
        """The steps that take part in the run."""
        return tuple(step for step in self.steps if step.state != "out")

    def side_by_side(self, id: str) -> bool:
        """Whether another step of the run may work at the same time as the step ``id``."""
        related = {id, *self.graph.ancestors(id), *self.graph.descendants(id)}
        others = (step for step in self.selected() if step.state != "cached" and step.node.id not in related)
        return self.spec.resources.parallel > 1 and any(others)


def device_of(choice: Literal["auto", "cpu", "cuda"]) -> str:
    """``cpu`` or ``cuda``. torch is asked only where the machine shows an NVIDIA device.

    Raises:
        PlanError: ``cuda`` is asked for and there is none.
    """
    if choice == "cpu":
        return "cpu"
    available = False
    if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
        import torch

        available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise PlanError("resources.device is cuda, but torch finds no CUDA device; write device: auto or cpu")
    return "cuda" if available else "cpu"


def threads_of(spec: PipelineSpec) -> int:
    """The CPU threads of a step: what the spec says, else one for each core that this process may use."""
    return spec.resources.threads or len(os.sched_getaffinity(0))


def make_plan(
    loaded: LoadedSpec,
    home: Home,
    *,
    only: Sequence[str] = (),
    from_step: Sequence[str] = (),
    no_cache: bool = False,
) -> Plan:
    """Work out what a run of the spec will do.

    Args:
        loaded: the spec.
        home: where its artifacts are.
        only: make these steps and what they need, nothing else; empty: all.
        from_step: make these steps and everything after them anew.
        no_cache: make every step anew.

    Raises:
        PlanError: a step named in the arguments does not exist, the device asked for is not there, or nothing can be
            written under ``home``.
        StepError: the look at the model broke.
        RunCancelled: the run was cancelled meanwhile.
    """
    from flows.preflight import inspect

    spec = loaded.spec
    graph = build(spec)
    selection = _selection(graph, only)
    forced = _forced(graph, from_step, no_cache)
    home.require()
    device = _device(loaded)
    threads = threads_of(spec)
    nodes = [node for node in graph if node.id in selection]
    try:
        findings = inspect(spec, nodes, device, threads, home.workers_log)
    except supervise.ChildFailed as error:
        failure = StepError(loaded.redact(f"the look at the model failed: {error}; see {home.workers_log}"))
        failure.add_note(loaded.redact(error.details))
        raise failure from None
    if findings.problems:
        fingerprints: dict[str, str] = {}
        measured: dict[str, Any] = {}
        steps = tuple(PlannedStep(node, "", {}, "unknown", False, "") for node in graph)
    else:
        fingerprints = _fingerprints(spec)
        measured = conditions(spec, fingerprints["eval"], device, threads)
        planner = _Planner(spec, Store(home.store), fingerprints, device, measured, findings)
        steps = tuple(planner.plan(node, node.id in selection, node.id in forced) for node in graph)
    plan = Plan(
        spec=spec,
        graph=graph,
        device=device,
        threads=threads,
        fingerprints=fingerprints,
        conditions=measured,
        steps=steps,
        facts=tuple(findings.facts),
        problems=tuple(placed(loaded, problem) for problem in findings.problems),
        warnings=tuple(loaded.redact(text) for text in findings.warnings),
    )
    return _with_resources(plan, loaded, home)


def _device(loaded: LoadedSpec) -> str:
    try:
        return device_of(loaded.spec.resources.device)
    except PlanError as error:
        raise PlanError(placed(loaded, Problem(str(error), named_in(str(error))))) from None


def _selection(graph: Graph, only: Sequence[str]) -> set[str]:
    names = set(graph.nodes)
    _known(only, names, "--only")
    return set(only).union(*map(graph.ancestors, only)) if only else names


def _forced(graph: Graph, from_step: Sequence[str], no_cache: bool) -> set[str]:
    names = set(graph.nodes)
    _known(from_step, names, "--from")
    return names if no_cache else set(from_step).union(*map(graph.descendants, from_step))


def _known(asked: Sequence[str], names: Collection[str], option: str) -> None:
    for name in asked:
        if name not in names:
            raise PlanError(f"{option} {name}: there is no such step; {nearest(name, sorted(names))}")


def _fingerprints(spec: PipelineSpec) -> dict[str, str]:
    from tasks import data, models

    return {
        "train": data.fingerprint(spec.data, "train", spec.task),
        "eval": data.fingerprint(spec.data, "eval", spec.task),
        "model": models.fingerprint(spec.model),
    }


class _Planner:
    """Plans one node after the other, inputs first."""

    def __init__(
        self,
        spec: PipelineSpec,
        store: Store,
        fingerprints: Mapping[str, str],
        device: str,
        measured: Mapping[str, Any],
        findings: Findings,
    ) -> None:
        self.spec = spec
        self.store = store
        self.fingerprints = fingerprints
        self.device = device
        self.measured = measured
        self.model_bytes = findings.model_bytes
        self.scored = findings.scored
        self.latest = latest_recipes(store, spec.name)
        self.keys: dict[str, str] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.references: dict[str, str | None] = {}
        self.evaluations: dict[str, str] = {}

    def plan(self, node: Node, selected: bool, forced: bool) -> PlannedStep:
        key, recipe = step_key(
            node.spec,
            [self.keys[name] for name in node.inputs],
            data=digest_json({"fingerprint": self.fingerprints["train"], **shaping_data(self.spec)}),
            seed=self.spec.seed,
            device=self.device,
            registered=find(type(node.spec)),
            extra=self._extra(node.spec),
        )
        self.keys[node.id] = key
        recipe["names"] = list(node.inputs)  # the spec may leave them to the default
        if not selected:
            return PlannedStep(node, key, recipe, "out", False, "outside the selection")
        artifact = None if forced else self.store.find(key)
        if artifact is None:
            disk, memory = node.spec.estimate(self.model_bytes)
            disk += node.spec.stores(self.scored)
            reason = "asked for" if forced else _reason(recipe, self.latest.get(node.id))
            return PlannedStep(node, key, recipe, "run", forced, reason, disk, memory)
        self.artifacts[node.id] = artifact
        if not node.spec.evaluate or self._measured(node, artifact):
            return PlannedStep(node, key, recipe, "cached", False, "")
        memory = 2 * self.model_bytes + RUNTIME_BYTES
        return PlannedStep(node, key, recipe, "measure", False, "not measured under these conditions", 0, memory)

    def _measured(self, node: Node, artifact: Artifact) -> bool:
        """Whether the measurement stands; its key is built as ``tasks.run_step`` builds it."""
        reference = self.references[node.id] = self._reference(node, artifact)
        key = self.evaluations[node.id] = evaluation_key(artifact.digest, reference, self.measured)
        return self.store.find(key) is not None

    def _reference(self, node: Node, artifact: Artifact) -> str | None:
        if artifact.kind not in DERIVED:
            return None
        for name in node.inputs:
            taken = self.artifacts.get(name)
            handed_on = taken is not None and taken.digest == artifact.digest
            reference = self.references.get(name) if handed_on else self.evaluations.get(name)
            if reference:
                return reference
        return None

    def _extra(self, step: StepSpec) -> dict[str, Any]:
        if isinstance(step, BaselineSpec):
            return {"model": self.fingerprints["model"]}
        if not step.judges:
            return _sources(step, self.spec)
        gates = [gate.model_dump(mode="json") for gate in self.spec.gates if gate.step == step.id]
        return {"gates": gates, "measured": dict(self.measured)}


def _sources(step: StepSpec, spec: PipelineSpec) -> dict[str, Any]:
    """What identifies the data that a step names itself."""
    from tasks import data

    named = {name: getattr(step, name) for name in step.sources if getattr(step, name) is not None}
    return {
        name: data.fingerprint(spec.data.model_copy(update={"train": source}), "train", "text-generation")
        for name, source in named.items()
    }


def shaping_data(spec: PipelineSpec) -> dict[str, Any]:
    """The parts of the data block that shape a step's result beside the content of the training data."""
    return {"task": spec.task, "fields": spec.data.fields.model_dump(), "max_length": spec.data.max_length}


def latest_recipes(store: Store, spec: str) -> dict[str, Mapping[str, Any]]:
    """The newest recipe in the store by step id among those of runs of the spec called ``spec``, to say what has
    changed since."""
    entries = store.ls()
    records = {run: store.run(run) for run in {run for entry in entries for run in entry.runs}}
    mine = {run for run, record in records.items() if record is not None and record.info.get("spec") == spec}
    latest: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for entry in entries:
        name = entry.step
        if (
            name
            and mine.intersection(entry.runs)
            and entry.uses != "evaluate"
            and (name not in latest or latest[name][0] < entry.created)
        ):
            latest[name] = (entry.created, entry.recipe)
    return {name: recipe for name, (_, recipe) in latest.items()}


def _reason(recipe: Mapping[str, Any], former: Mapping[str, Any] | None) -> str:
    if former is None:
        return "new"
    return "; ".join(explain(former, recipe)) or "its artifact is gone"


def _with_resources(plan: Plan, loaded: LoadedSpec, home: Home) -> Plan:
    """Add what is known of disk and memory to the plan's problems and warnings."""
    import psutil

    from tasks.evaluate.format import size

    problems, warnings = list(plan.problems), list(plan.warnings)
    free = shutil.disk_usage(home.root).free
    limit = plan.spec.resources.disk
    if limit is not None and plan.disk > limit:
        text = f"the run may write {size(plan.disk)}; resources.disk allows {size(limit)}"
        problems.append(placed(loaded, Problem(text, ("resources", "disk"))))
    elif plan.disk > free:
        problems.append(f"the run may write {size(plan.disk)}; {size(free)} are free under {home.root}")
    memory = psutil.virtual_memory().available
    if plan.memory > memory:
        warnings.append(
            f"the run may need {size(plan.memory)} of memory; {size(memory)} are available"
            " (lower resources.parallel or the batch size)"
        )
    device = f"{plan.device}, {plan.threads} threads, {plan.spec.resources.parallel} at a time"
    facts = (*plan.facts, ("device", device))
    return replace(plan, facts=facts, problems=tuple(problems), warnings=tuple(warnings))


def missing_packages(needed: Iterable[str]) -> Sequence[str]:
    """Those of the distributions that are not installed."""
    from importlib.metadata import PackageNotFoundError, version

    missing = []
    for name in sorted(set(needed)):
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing
