"""What is handed from the flow to a step: JSON alone, artifacts by their keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from specs.schema.base import StepSpec
from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import AnyStep

_ANY_STEP: TypeAdapter[StepSpec] = TypeAdapter(AnyStep)


def step_from_json(step: Mapping[str, Any]) -> StepSpec:
    """The spec that ``model_dump(mode="json", by_alias=True)`` was called on."""
    if step["uses"] == BaselineSpec.model_fields["uses"].default:
        return BaselineSpec.model_validate(step)
    return _ANY_STEP.validate_python(step)


class StepJob(BaseModel):
    """Everything that one step needs to know, as JSON; artifacts are named by their keys.

    Args:
        conditions: how artifacts are measured, see ``tasks.conditions``.
        compared: further steps whose evaluation a step that judges is given, beside its inputs.
        variables: the environment variables whose values must not reach a record.
        patient: whether the threads of the step should make room for those of another, see ``tasks.supervise``.
        started: when the run began, in seconds since the epoch.
        force: make the step anew though its artifact stands; what was made since ``started`` is new enough.
        resume: the command that goes on after a failure.
    """

    model_config = ConfigDict(frozen=True)

    run_id: str
    run_folder: str
    store: str
    step: dict[str, Any]
    key: str
    recipe: dict[str, Any]
    inputs: tuple[str, ...]
    task: str
    model: dict[str, Any]
    data: dict[str, Any]
    conditions: dict[str, Any]
    gates: tuple[dict[str, Any], ...] = ()
    compared: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    seed: int
    device: str
    threads: int
    patient: bool
    started: float
    force: bool = False
    resume: str = ""
