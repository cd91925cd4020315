"""PipelineSpec -> nodes in the order in which they can run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from specs.schema.base import BASELINE, Kind, StepSpec
from specs.schema.check import Problem, check_metrics, survey
from specs.schema.outline import GateOutline, Outline
from specs.schema.pipeline import ModelSpec, PipelineSpec


class BaselineSpec(StepSpec):
    """Take the model as it came in, or build it from its configuration. The first step of every graph; it is not
    written in a spec."""

    takes: ClassVar[tuple[Kind, ...]] = ()

    uses: Literal["model"] = "model"
    id: str = BASELINE
    model: ModelSpec = Field(description="the model as it comes in")


@dataclass(frozen=True)
class Node:
    """One step of the graph, the ids of its inputs in the order of the step function, and the kind that it gives."""

    id: str
    spec: StepSpec
    inputs: tuple[str, ...]
    kind: Kind


class GraphError(ValueError):
    """The steps do not fit together."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(f"{'.'.join(map(str, p.path))}: {p.message} ({p.remedy})" for p in problems))


@dataclass(frozen=True)
class Graph:
    """The nodes by id; iteration is in an order in which every input comes before its users."""

    nodes: dict[str, Node]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, id: str) -> Node:
        return self.nodes[id]

    def users(self, id: str) -> tuple[str, ...]:
        """The steps that take the artifact of ``id`` itself."""
        return tuple(node.id for node in self if id in node.inputs)

    def leaves(self) -> tuple[str, ...]:
        """The final steps: those whose artifact no other step takes."""
        return tuple(id for id in self.nodes if not self.users(id))

    def ancestors(self, id: str) -> tuple[str, ...]:
        """Everything that ``id`` is made from, in the graph's order."""
        above = set(self[id].inputs)
        for node in reversed(tuple(self)):
            if node.id in above:
                above.update(node.inputs)
        return tuple(other for other in self.nodes if other in above)

    def descendants(self, id: str) -> tuple[str, ...]:
        """Everything that is made from ``id``, in the graph's order."""
        below = {id}
        for node in self:
            if below.intersection(node.inputs):
                below.add(node.id)
        return tuple(other for other in self.nodes if other in below - {id})


def build(spec: PipelineSpec) -> Graph:
    """The graph of a spec, with the model as it came in as the implicit first node ``baseline``.

    Raises:
        GraphError: the steps do not fit together; ``load`` reports the same with file, line and column.
    """
    found = survey(spec.task, [Outline.of(index, step) for index, step in enumerate(spec.steps)])
    gates = [GateOutline.of(index, gate) for index, gate in enumerate(spec.gates)]
    problems = found.problems + check_metrics(found, spec.task, gates, spec.tracking.register_step)
    if problems:
        raise GraphError(problems)
    specs = {step.id: step for step in (BaselineSpec(model=spec.model), *spec.steps)}
    kinds: dict[str, Kind] = {id: kind for id, kind in found.kinds.items() if kind is not None}
    return Graph({id: Node(id, specs[id], found.inputs[id], kinds[id]) for id in found.order})
