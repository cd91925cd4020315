"""Whether the steps of a spec fit together: references, cycles, kinds of artifacts, gates. Nothing here raises for a
mistake of the user; all of them are gathered, as far as the steps that could be read allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush

from specs.schema.base import BASELINE, MEASURABLE, PREVIOUS, Kind, StepSpec
from specs.schema.metrics import METRICS
from specs.schema.outline import GateOutline, Outline
from specs.schema.suggest import nearest

Path = tuple[str | int, ...]

RESERVED = {"run": "the run's own journal", "system": "the journal of the machine's load"}
"""Ids that no step may take, because a step's records lie in a file of its name."""

_MEASURABLE = frozenset(("any", "model", "derived", "npu"))
"""What may be measured of a step of which too little is known."""


@dataclass(frozen=True)
class Problem:
    """A mistake at a path into the spec, for example ``("steps", 2, "needs", 0)``."""

    path: Path
    message: str
    remedy: str
    value: str = ""


@dataclass
class Survey:
    """What is known of a graph: the steps by id, inputs, order, kinds and measurable metrics by id, and the problems
    found."""

    steps: dict[str, Outline] = field(default_factory=dict)
    inputs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    kinds: dict[str, Kind | None] = field(default_factory=dict)
    measurable: dict[str, frozenset[str] | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def names(self) -> list[str]:
        """The ids that may be named, the baseline's last."""
        return [*(id for id, step in self.steps.items() if id != step.place), BASELINE]

    def spec(self, id: str) -> StepSpec | None:
        """The spec of a step; None for the baseline, and where something in it is wrong."""
        return self.steps[id].spec if id in self.steps else None

    def leaves(self) -> list[str]:
        """The steps that no other step takes, in the order of the spec."""
        taken = {name for names in self.inputs.values() for name in names}
        return [id for id in self.inputs if id not in taken and id != BASELINE]

    def shapers(self, id: str) -> list[StepSpec]:
        """The specs from whose artifacts that of ``id`` has its structure, its own first."""
        shapers: list[StepSpec] = []
        seen, todo = set[str](), [id]
        while todo:
            name = todo.pop(0)
            spec = self.spec(name)
            if spec is not None and name not in seen:
                seen.add(name)
                shapers.append(spec)
                todo.extend(spec.shaped_by(self.inputs[name]))
        return shapers

    def ancestors(self, id: str) -> set[str]:
        """Everything that ``id`` is made from."""
        above: set[str] = set()
        todo = list(self.inputs.get(id, ()))
        while todo:
            name = todo.pop()
            if name not in above:
                above.add(name)
                todo.extend(self.inputs.get(name, ()))
        return above


def survey(task: str | None, outlines: Sequence[Outline]) -> Survey:
    """The graph of the steps.

    Args:
        task: the spec's task; None where it could not be read.
        outlines: the steps in the order of the spec.
    """
    found = Survey(inputs={BASELINE: ()})
    found.steps = steps = _named(outlines, found.problems)
    at = {step.index: id for id, step in steps.items()} | {-1: BASELINE}
    for id, step in steps.items():
        found.inputs[id] = _inputs(step, at.get(step.index - 1), found)
    found.order = _order(found.inputs, steps, found.problems)
    found.kinds[BASELINE] = "model"
    found.measurable[BASELINE] = frozenset(("any", "model"))
    for id in found.order:
        if id in steps:
            _kinds(steps[id], task, found)
    for id in steps:
        found.kinds.setdefault(id)
        found.measurable.setdefault(id)
    return found


def _named(outlines: Iterable[Outline], problems: list[Problem]) -> dict[str, Outline]:
    """The steps by id; one whose id is taken goes by its place."""
    steps: dict[str, Outline] = {}
    for step in outlines:
        path = ("steps", step.index, "id")
        if step.id == BASELINE:
            text = f"the id {BASELINE!r} is taken by the model as it came in"
            problems.append(Problem(path, text, "choose another id"))
        if step.id in RESERVED:
            text = f"the id {step.id!r} is taken by {RESERVED[step.id]}"
            problems.append(Problem(path, text, "choose another id"))
        if step.id in steps:
            text = f"the id {step.id!r} is taken by {steps[step.id].place}"
            problems.append(Problem(path, text, "give every step an id of its own"))
        id = step.place if step.id in steps or step.id == BASELINE else step.id
        steps[id] = replace(step, id=id)
    return steps


def _inputs(step: Outline, before: str | None, found: Survey) -> tuple[str, ...]:
    if step.inputs is None:
        return () if before is None else (before,)
    path, problems = ("steps", step.index), found.problems
    named: list[str] = []
    assumed: str | None = None
    per_field: dict[str, int] = {}
    for name, id in step.inputs:
        number = per_field.get(name, 0)
        per_field[name] = number + 1
        at = (*path, name, number)
        if id == PREVIOUS:
            id, at, assumed = before, (*path, "uses"), before
        if id is None:
            continue
        if id != BASELINE and id not in found.steps:
            problems.append(Problem(at, f"no step has the id {id!r}", nearest(id, found.names())))
        elif id in named and id == assumed:
            text = f"{id!r} is the step before too, which this one takes besides"
            problems.append(Problem(at, text, "name the other one in `needs`"))
        elif id in named and len(per_field) > 1:
            fields = " and in ".join(per_field)
            problems.append(Problem(at, f"{id!r} is named in {fields}", "name two different steps"))
        elif id in named:
            problems.append(Problem(at, f"{id!r} is named twice", "name it once"))
        else:
            named.append(id)
    if not step.inputs:
        problems.append(Problem((*path, "needs"), "the step takes no artifact", "leave `needs` out, or name a step"))
    elif per_field.get("needs", 0) > 1:
        text = f"the step takes one artifact, {per_field['needs']} are named"
        remedy = f"write for example needs: {named[0]}" if named else "name one"
        problems.append(Problem((*path, "needs"), text, remedy))
    return tuple(named)


def _order(
    inputs: Mapping[str, tuple[str, ...]], steps: Mapping[str, Outline], problems: list[Problem]
) -> tuple[str, ...]:
    """The ids, inputs first and otherwise as the spec has them; the members of a cycle are reported and left out."""
    remaining = dict(inputs)
    while True:
        sorter = TopologicalSorter({id: [n for n in needs if n in remaining] for id, needs in remaining.items()})
        try:
            sorter.prepare()
        except CycleError as error:
            cycle = list(error.args[1])
            first = min(range(len(cycle) - 1), key=lambda i: steps[cycle[i]].index)
            turned = [*cycle[first:-1], *cycle[:first], cycle[first]]
            path = ("steps", steps[turned[0]].index)
            name = steps[turned[0]].inputs
            at = (*path, name[0][0]) if name else path
            problems.append(Problem(at, f"the steps need each other: {' -> '.join(turned)}", "break the circle"))
            for id in turned:
                remaining.pop(id, None)
            continue
        break
    rank = {id: number for number, id in enumerate(inputs)}
    ready, order = [], []
    while sorter.is_active():
        for id in sorter.get_ready():
            heappush(ready, (rank[id], id))
        _, id = heappop(ready)
        order.append(id)
        sorter.done(id)
    return tuple(order)


def _kinds(step: Outline, task: str | None, found: Survey) -> None:
    """What the step gives, and whether it can take what it is given; for a step with a mistake, what every step of its
    type takes and gives."""
    if step.type is None:
        return
    inputs = found.inputs[step.id]
    takes: tuple[Kind, ...] = step.type.takes
    makes: tuple[Kind, ...] = step.type.makes
    kinds: list[Kind | None] = [found.kinds.get(id) for id in inputs]
    known: tuple[Kind, ...] = tuple(kind for kind in kinds if kind is not None)
    path = ("steps", step.index)
    if task is not None and task not in step.type.tasks:
        text = f"{step.uses} does not do the task {task}"
        found.problems.append(Problem((*path, "uses"), text, f"it does: {', '.join(step.type.tasks)}"))
    for id, kind in zip(inputs, kinds, strict=True):
        if kind is not None and kind not in takes:
            text = f"{step.uses} takes {_listed(takes)}, and {id!r} gives {_article(kind)}"
            found.problems.append(Problem((*path, *_input_path(step, id)), text, _way_out(takes, id, found)))
    if step.spec is not None:
        _structure(step, step.spec, found)
    sure = _without_swapped(makes)
    kind = sure[0] if len(sure) == 1 else None
    if step.spec is not None and kinds and len(known) == len(kinds):
        try:
            kind = step.spec.gives(known)
        except ValueError as error:
            message, _, remedy = str(error).partition("; ")
            found.problems.append(Problem((*path, *_input_path(step, inputs[0])), message, remedy))
    found.kinds[step.id] = kind
    if kind is not None and step.spec is not None:
        taken = tuple(found.measurable.get(id) or _MEASURABLE for id in inputs)
        found.measurable[step.id] = step.spec.measurable(kind, taken)
    elif kind is not None:
        npu = frozenset(("npu",) if kind == "export" else ())
        found.measurable[step.id] = MEASURABLE.get(kind, frozenset(("any", "model"))) | npu


def _structure(step: Outline, spec: StepSpec, found: Survey) -> None:
    """Whether the structure that steps above gave to the model rules the step out."""
    for id in spec.shaped_by(found.inputs[step.id]):
        for above in found.shapers(id):
            reason = above.forbids(spec)
            if reason is not None:
                text, _, remedy = reason.partition("; ")
                found.problems.append(Problem(("steps", step.index, *_input_path(step, id)), text, remedy))
                return


def _input_path(step: Outline, id: str) -> Path:
    """Where the step names the input ``id``; its ``uses`` where it takes the step before it."""
    named = step.inputs or ()
    for number, (name, other) in enumerate(named):
        if other == id:
            return (name, sum(1 for before, _ in named[:number] if before == name))
    return ("uses",)


def _way_out(takes: Sequence[Kind], id: str, found: Survey) -> str:
    """The nearest step above ``id`` whose artifact fits."""
    above = list(found.inputs.get(id, ()))
    for candidate in above:
        if found.kinds.get(candidate) in takes:
            return f"write for example needs: {candidate}"
        above.extend(other for other in found.inputs.get(candidate, ()) if other not in above)
    return f"put the step before {id!r}"


def _article(kind: str) -> str:
    return {
        "model": "a model",
        "swapped": "a model with replaced attention (its sorting and gathering can neither be exported nor pruned)",
        "packed": "a packed model (it runs, but can be neither trained nor exported)",
        "export": "an export (a file for a device, which cannot be changed)",
        "report": "a report",
        "data": "data",
    }[kind]


def _listed(kinds: Sequence[Kind]) -> str:
    names = {"model": "a model", "packed": "a packed model", "export": "an export"}
    return " or ".join(names.get(kind, kind) for kind in _without_swapped(kinds))


def _without_swapped(kinds: Sequence[Kind]) -> list[Kind]:
    """A model with replaced attention is a model where that goes too."""
    return [kind for kind in kinds if kind != "swapped" or "model" not in kinds]


def metric_problem(found: Survey, task: str | None, name: str, id: str) -> tuple[str, str] | None:
    """Why the artifact of the step ``id`` cannot have the metric ``name``, with the remedy; None where it can."""
    metric = METRICS.get(name)
    if metric is None:
        return f"metric {name!r} is unknown", nearest(name, METRICS)
    if task is not None and task not in metric.tasks:
        fitting = [m.name for m in METRICS.values() if task in m.tasks and m.quality == metric.quality]
        return f"the task {task} has no {name}", f"it has: {', '.join(fitting)}"
    spec = found.spec(id)
    if spec is not None and not spec.evaluate:
        return f"{id!r} has `evaluate: false`, so its {name} is not measured", "write evaluate: true there"
    measurable = found.measurable.get(id)
    if measurable is not None and metric.of not in measurable:
        carrier = {
            "derived": "an export or a packed model",
            "npu": "an NPU build (export_tflite with `npu`)",
            "model": "a torch model",
        }
        having = [other for other, has in found.measurable.items() if has and metric.of in has]
        fitting = f"these have it: {', '.join(having)}" if having else "no step of the spec has it"
        return f"{name} is a metric of {carrier[metric.of]}, which {id!r} is not", fitting
    return None


def check_metrics(
    found: Survey, task: str | None, gates: Sequence[GateOutline], register_step: str | None
) -> list[Problem]:
    """Gates, the metrics of the steps themselves (``select``), and the step to register: do they name what there is?"""
    problems: list[Problem] = []
    names = found.names()
    for id, step in found.steps.items():
        if step.metric is not None:
            name, metric = step.metric
            wrongs = (metric_problem(found, task, metric, taken) for taken in found.inputs[id])
            wrong = next((wrong for wrong in wrongs if wrong), None)
            if wrong:
                problems.append(Problem(("steps", step.index, name), *wrong))
    for gate in gates:
        problems.extend(_gate(found, task, gate, names))
    if register_step is not None and register_step not in names:
        text = f"no step has the id {register_step!r}"
        problems.append(Problem(("tracking", "register_step"), text, nearest(register_step, names)))
    return problems


def _comparable(found: Survey, id: str, reference: str) -> bool:
    """A step that judges its inputs can compare them only with what is there by then."""
    step = found.steps.get(id)
    return step is None or step.type is None or not step.type.judges or reference in found.ancestors(id)


def _gate(found: Survey, task: str | None, gate: GateOutline, names: list[str]) -> list[Problem]:
    problems: list[Problem] = []
    path = ("gates", gate.index)
    for name, id in (("step", gate.step), ("relative_to", gate.relative_to)):
        if id is not None and id not in names:
            problems.append(Problem((*path, name), f"no step has the id {id!r}", nearest(id, names)))
    if gate.metric is None:
        return problems
    judged = [] if problems else found.leaves() if gate.step is None else [gate.step]
    wrongs = [metric_problem(found, task, gate.metric, id) for id in judged or [""]]
    if all(wrongs):
        message, remedy = wrongs[0] or ("", "")
        problems.append(Problem((*path, "metric"), message, remedy))
    elif not problems and gate.form in ("drop", "gain") and gate.relative_to is not None:
        wrong = metric_problem(found, task, gate.metric, gate.relative_to)
        at = (*path, "relative_to")
        if wrong:
            problems.append(Problem(at, f"{gate.form} against {gate.relative_to!r}: {wrong[0]}", wrong[1]))
        elif gate.relative_to == gate.step:
            problems.append(Problem(at, f"{gate.step!r} is compared with itself", "name another step"))
        elif gate.step is not None and not _comparable(found, gate.step, gate.relative_to):
            text = f"{gate.step!r} chooses by this gate before {gate.relative_to!r} is sure to be measured"
            before = [id for id in found.order if id in found.ancestors(gate.step)]
            problems.append(Problem(at, text, f"name a step that {gate.step!r} is made from: {', '.join(before)}"))
    return problems
