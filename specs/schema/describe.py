"""The documentation of every kind of step, from its own class."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from specs.schema.base import Name, Needs, StepSpec
from specs.schema.explain import keys_of, models_of
from specs.schema.pipeline import KINDS
from specs.schema.units import Bytes, Duration, KeepField, LimitField, Ratio, Share, in_units

_WORDS: tuple[tuple[Any, str], ...] = (
    (Bytes, "size, e.g. 8 MiB"),
    (Duration, "duration, e.g. 10 min"),
    (Ratio, "ratio, e.g. 24x"),
    (Share, "share, e.g. 50%"),
    (Name, "name"),
    (Needs, "step or list of steps"),
    (LimitField, "number with its unit"),
    (KeepField, "share, parameters or time, e.g. 50%, 5M or 8 ms"),
    (bool, "true or false"),
    (int, "whole number"),
    (float, "number"),
    (str, "text"),
)


@dataclass(frozen=True)
class FieldDoc:
    """A field: its key, what it holds in plain words, its default (``required`` where it has none), its meaning."""

    name: str
    type: str
    default: str
    description: str


@dataclass(frozen=True)
class StepDoc:
    """A kind of step: its name, its first clause and whole description, what it takes and gives, its fields."""

    name: str
    summary: str
    text: str
    takes: str
    gives: str
    tasks: str
    fields: tuple[FieldDoc, ...]


def kinds() -> list[StepDoc]:
    """Every kind of step that a spec may use."""
    return [describe(name) for name in KINDS]


def describe(name: str) -> StepDoc:
    """The documentation of the kind ``name``.

    Raises:
        KeyError: there is no such kind.
    """
    spec = KINDS[name]
    text = " ".join((spec.__doc__ or "").split()).replace("``", "`")
    return StepDoc(
        name=name,
        summary=re.split(r"[.:;] ", text)[0].rstrip("."),
        text=text,
        takes=" or ".join(spec.takes),
        gives=" or ".join(spec.makes),
        tasks=", ".join(spec.tasks),
        fields=_fields(spec),
    )


def _fields(spec: type[StepSpec]) -> tuple[FieldDoc, ...]:
    """The step's own fields, then those that every step has; ``uses`` is the name itself."""
    hints = get_type_hints(spec, include_extras=True)
    common = [name for name in StepSpec.model_fields if name != "uses"]
    own = [name for name in spec.model_fields if name not in StepSpec.model_fields]
    keys = {id(field): key for key, field in keys_of(spec).items()}
    docs = []
    for name in ["id", *own, *(other for other in common if other != "id")]:
        field = spec.model_fields[name]
        default = "required" if field.is_required() else _default(field.default, hints[name])
        docs.append(FieldDoc(keys[id(field)], in_words(hints[name]), default, field.description or ""))
    return tuple(docs)


def _like(model: type[BaseModel]) -> str:
    """The kind of step that has the same fields, or else the published schema."""
    return next((name for name, kind in KINDS.items() if issubclass(kind, model)), "lathe schema")


def _default(value: Any, hint: Any) -> str:
    if value is None or value == ():
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return in_units(value, hint) if isinstance(value, (int, float)) else str(value)


def in_words(hint: Any) -> str:
    """A type as a person says it: ``int | None`` is a whole number."""
    for known, words in _WORDS:
        if hint == known:
            return words
    arguments = [part for part in get_args(hint) if part not in (NoneType, Ellipsis)]
    if get_origin(hint) is Literal:
        return " | ".join(map(str, arguments))
    models = models_of(hint)
    if models:
        return f"mapping of {len(keys_of(models[0]))} fields, see {_like(models[0])}"
    if get_origin(hint) is tuple:
        return f"list of {in_words(arguments[0])}"
    if get_origin(hint) is dict or hint is dict:
        return "mapping"
    return " or ".join(in_words(part) for part in arguments) or str(hint)
