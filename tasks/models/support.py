"""What works with what: kinds of steps, families of models and tasks. Each step says itself what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from specs.schema.base import StepSpec, Task
from specs.schema.pipeline import KINDS
from tasks.models.applications import HEADS, Family, pairs
from tasks.registry import find


@dataclass(frozen=True)
class Row:
    """A kind of step, or a variant of one: for every task and family why it does not work, None where it does."""

    step: str
    reasons: Mapping[tuple[Task, Family], str | None]


def supports(step: StepSpec | type[StepSpec], family: Family, task: Task) -> str | None:
    """Why a step cannot take a model of ``family`` for ``task``; None where it can.

    Args:
        step: a step of a spec, or a kind of step as such.
        family: of the model.
        task: what it does.
    """
    kind, spec = (step, None) if isinstance(step, type) else (type(step), step)
    if task not in kind.tasks:
        return f"this step is for {', '.join(kind.tasks)}, not for {task}"
    if (task, family) not in pairs():
        able = dict.fromkeys(family for head in HEADS[task] for family in head.families)
        return f"{task} needs a model that is {' or '.join(able)}, and this one is {family}"
    refuses = find(kind).refuses
    return refuses(spec, family, task) if refuses is not None else None


def matrix() -> list[Row]:
    """The table: every kind of step that a spec may use, and its variants."""
    rows = []
    for name, kind in KINDS.items():
        steps: dict[str, StepSpec | type[StepSpec]] = {name: kind, **find(kind).variants}
        rows += [
            Row(label, {(task, family): supports(step, family, task) for task, family in pairs()})
            for label, step in steps.items()
        ]
    return rows
