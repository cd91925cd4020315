"""As much of the steps and the gates of a spec as could be read, so that one mistake does not hide the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from specs.schema.base import BASELINE, StepSpec
from specs.schema.gates import FORMS, GateSpec
from specs.schema.pipeline import KINDS, MAX_ENTRIES, AnyStep

_STEP: TypeAdapter[Any] = TypeAdapter(AnyStep)
_CHOOSES_BY = ("minimise", "maximise")


@dataclass(frozen=True)
class Outline:
    """As much of a step as could be read.

    Args:
        index: its number in the list.
        id: its id, or its place (``steps[2]``) where that could not be read.
        inputs: the field and the id of each artifact that it takes, the id None where it could not be read; None where
            it takes the step before it.
        uses: the name of its kind; empty where there is no such kind.
        metric: the field and the name of the metric by which it chooses.
        spec: all of it, unless something in it is wrong.
    """

    index: int
    id: str
    inputs: tuple[tuple[str, str | None], ...] | None
    uses: str = ""
    metric: tuple[str, str] | None = None
    spec: StepSpec | None = None

    @property
    def place(self) -> str:
        """What the step goes by where it has no id of its own; no id is written like this."""
        return _place(self.index)

    @property
    def type(self) -> type[StepSpec] | None:
        """The class of its kind, which knows what such a step takes and makes."""
        return type(self.spec) if self.spec is not None else KINDS.get(self.uses)

    @staticmethod
    def of(index: int, spec: StepSpec) -> Outline:
        """The outline of a step in which nothing is wrong."""
        metric = _metric({name: getattr(spec, name, None) for name in _CHOOSES_BY})
        return Outline(index, spec.id, spec.inputs(), spec.uses, metric, spec)

    @staticmethod
    def read(index: int, raw: Mapping[str, Any]) -> Outline:
        """The outline of a step as the file has it."""
        try:
            return Outline.of(index, _STEP.validate_python(raw, by_alias=True, by_name=False))
        except ValidationError:
            id, uses = raw.get("id"), raw.get("uses")
            uses = uses if isinstance(uses, str) and uses in KINDS else ""
            chooses = uses and _CHOOSES_BY[0] in KINDS[uses].model_fields
            return Outline(
                index,
                id if isinstance(id, str) and id else _place(index),
                _inputs(raw, KINDS[uses].names_steps if uses else ("from", "needs")),
                uses,
                _metric(raw) if chooses else None,
            )


@dataclass(frozen=True)
class GateOutline:
    """As much of a gate as could be read.

    Args:
        index: its number in the list.
        step: the step that it judges; None for every final step.
        metric: the metric that it limits; None where it, or the step, could not be read.
        relative_to: the step that it compares with; None where that could not be read.
        form: the one of ``FORMS`` that it has; None where that is not clear.
    """

    index: int
    step: str | None
    metric: str | None
    relative_to: str | None
    form: str | None

    @staticmethod
    def of(index: int, gate: GateSpec) -> GateOutline:
        """The outline of a gate in which nothing is wrong."""
        return GateOutline(index, gate.step, gate.metric, gate.relative_to, gate.form)

    @staticmethod
    def read(index: int, raw: Mapping[str, Any]) -> GateOutline:
        """The outline of a gate as the file has it."""
        step, metric, reference = raw.get("step"), raw.get("metric"), raw.get("relative_to", BASELINE)
        forms = [form for form in FORMS if raw.get(form) is not None]
        return GateOutline(
            index,
            step if isinstance(step, str) else None,
            metric if isinstance(metric, str) and isinstance(step, str | None) else None,
            reference if isinstance(reference, str) else None,
            forms[0] if len(forms) == 1 else None,
        )


def steps(data: Mapping[str, Any]) -> list[Outline]:
    """The outlines of the steps of a spec that is wrong somewhere; entries that are no mappings are left out."""
    return [Outline.read(index, raw) for index, raw in _entries(data, "steps")]


def gates(data: Mapping[str, Any]) -> list[GateOutline]:
    """The outlines of the gates of a spec; entries that are no mappings are left out."""
    return [GateOutline.read(index, raw) for index, raw in _entries(data, "gates")]


def _entries(data: Mapping[str, Any], key: str) -> list[tuple[int, dict[str, Any]]]:
    entries = data.get(key)
    listed = entries[:MAX_ENTRIES] if isinstance(entries, list) else ()
    return [(index, entry) for index, entry in enumerate(listed) if isinstance(entry, dict)]


def _place(index: int) -> str:
    return f"steps[{index}]"


def _metric(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    return next(((name, fields[name]) for name in _CHOOSES_BY if isinstance(fields.get(name), str)), None)


def _inputs(raw: Mapping[str, Any], keys: Sequence[str]) -> tuple[tuple[str, str | None], ...] | None:
    found: list[tuple[str, str | None]] = []
    for name in keys:
        given = raw.get(name)
        if given is not None:
            ids = given if isinstance(given, list) and (given or name == "needs") else [given]
            found += [(name, id if isinstance(id, str) else None) for id in ids]
    return tuple(found) if any(raw.get(name) is not None for name in keys) else None
