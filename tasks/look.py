"""A look at the model and at what the steps would do with it, before anything runs. It needs torch, the plan does not:
this runs in a child."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specs.schema.base import StepSpec, Task
from specs.schema.pipeline import DataSpec, ModelSpec
from tasks.data.preflight import check_tokens
from tasks.data.tokens import open_tokenizer
from tasks.models import ModelSummary, check_model, family_of
from tasks.models.resolve import resolve
from tasks.models.support import supports
from tasks.registry import find


@dataclass(frozen=True)
class Remark:
    """What there is to say of one step before it runs: ``problems`` stop the run, ``warnings`` do not; ``sized`` are
    problems too, unless a step before makes the model anew in another shape."""

    step: str
    problems: Sequence[str] = ()
    warnings: Sequence[str] = ()
    sized: Sequence[str] = ()


def look(
    model: ModelSpec, task: Task, data: DataSpec, steps: Sequence[StepSpec]
) -> tuple[ModelSummary, tuple[Remark, ...]]:
    """Look at the model of a spec and at each of ``steps`` without loading a weight.

    Raises:
        StepError: the model cannot be had, read, or used for the task and the data.
    """
    summary = check_model(model, task, data)
    named = model.tokenizer or model.source
    folder = resolve(named, None if model.tokenizer else model.revision, weights=False).folder if named else None
    if folder is not None and (folder / "tokenizer.json").is_file():  # one that is trained on the data knows it
        check_tokens(data, task, open_tokenizer(folder))
    family = family_of(summary.config)
    remarks: list[Remark] = []
    for step in steps:
        reason = supports(step, family, task)
        preflight = find(type(step)).preflight
        if reason is not None:
            remarks.append(Remark(step.id, [reason]))
        elif preflight is not None:
            problems, warnings = preflight(step, summary.config, task, data.max_length)
            remarks.append(Remark(step.id, warnings=warnings, sized=problems))
    return summary, tuple(remarks)
