"""Where in the spec a problem stands that only shows beside the spec: in its data, its model, or the machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from specs.schema.base import StepSpec
from specs.schema.load import KeyPath, LoadedSpec
from specs.schema.pipeline import PipelineSpec

_DOTTED = re.compile(r"[a-z_]+(?:\.\w+)+")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Problem:
    """What stops a run; ``path`` leads to the field that it is about, and is empty where it is about none."""

    text: str
    path: KeyPath = ()


def named_in(text: str) -> KeyPath:
    """The path of the field whose dotted name a message begins with, for example ``model.config.hidden_size``."""
    found = _DOTTED.match(text)
    path = tuple(found[0].split(".")) if found else ()
    return path if path and path[0] in PipelineSpec.model_fields else ()


def path_of_step(steps: Sequence[StepSpec], step: StepSpec, text: str = "") -> KeyPath:
    """The path of a step, or of its field that a message begins with; the baseline is the model."""
    if step not in steps:
        return ("model",)
    first = _WORD.match(text)
    fields = {field.alias or name for name, field in type(step).model_fields.items()}
    return ("steps", steps.index(step), *((first[0],) if first and first[0] in fields else ()))


def placed(loaded: LoadedSpec, problem: Problem) -> str:
    """``file:line:column: field: text`` without secrets; the text alone where the problem is about no field."""
    text, path = loaded.redact(problem.text), problem.path
    if not path:
        return text
    name = ".".join(part for part in path if isinstance(part, str))
    if path[0] != "steps" and name not in text:
        text = f"{name}: {text}"
    return f"{loaded.positions.key(path)}: {text}"
