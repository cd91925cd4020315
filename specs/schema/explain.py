"""pydantic's errors in the words of a person who writes a spec."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from specs.schema.base import NAME_PATTERN, TASKS, FieldError, SpecModel, Task
from specs.schema.pipeline import KINDS, PipelineSpec
from specs.schema.suggest import nearest
from specs.schema.units import in_units

Path = tuple[str | int, ...]

_KINDS_OF_VALUE = {
    "int": ("not a whole number", "a whole number"),
    "float": ("not a number", "a number"),
    "string": ("not text", "text"),
    "bool": ("neither true nor false", "true or false"),
    "tuple": ("not a list", "a list"),
    "list": ("not a list", "a list"),
    "dict": ("not a mapping", "a mapping"),
    "model": ("not a mapping", "a mapping"),
    "finite": ("not a finite number", "a number"),
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class Explained:
    """A mistake at a path into the spec; ``at_key`` says that the key itself is wrong, ``of_whole`` that the keys of a
    mapping do not go together."""

    path: Path
    message: str
    remedy: str
    at_key: bool = False
    of_whole: bool = False


def explain_all(errors: Iterable[Mapping[str, Any]], data: Any) -> list[Explained]:
    """The entries of ``ValidationError.errors()`` for the writer of the spec; what fits none of the types that a field
    may have is one mistake, not one for each type."""
    places: dict[tuple[Path, str], list[Explained]] = {}
    for error in errors:
        explained = explain(error, data)
        if explained is not None:
            places.setdefault((explained.path, explained.remedy), []).append(explained)
    return [_one_of(wrongs) for wrongs in places.values()]


def _one_of(wrongs: list[Explained]) -> Explained:
    others = [wrong for wrong in wrongs if not wrong.message.startswith("not ")]
    if others or len(wrongs) == 1:
        return (others or wrongs)[0]
    types = " nor ".join(wrong.message.removeprefix("not ") for wrong in wrongs)
    return replace(wrongs[0], message=f"neither {types}")


def explain(error: Mapping[str, Any], data: Any) -> Explained | None:
    """One entry of ``ValidationError.errors()`` for the writer of the spec; None where it only follows from others.

    Args:
        error: type, location, context and message, as pydantic gives them.
        data: the plain data that was validated.
    """
    kind, context = str(error["type"]), error.get("ctx") or {}
    path, rest = locate(tuple(error["loc"]), data)
    if kind == "missing":
        path = (*path, *rest[-1:])
        return Explained(path, "missing", _example(field_of(path, data), str(path[-1])))
    field = field_of(path, data)
    if kind == "extra_forbidden":
        return Explained(path, f"unknown key {path[-1]!r}", _nearest_key(path, data), at_key=True)
    if kind == "union_tag_not_found":
        return Explained((*path, "uses"), "missing", f"write for example uses: finetune; known: {', '.join(KINDS)}")
    if kind == "union_tag_invalid":
        tag = str(context.get("tag", ""))
        return Explained((*path, "uses"), f"{tag!r} is no kind of step", nearest(tag, KINDS))
    if kind == "value_error":
        message, _, remedy = str(context.get("error", error["msg"])).partition("; ")
        return Explained((*path, *_field_named_by(context.get("error"))), message, remedy, of_whole=True)
    if kind == "literal_error":
        return Explained(path, "not one of the choices", _choose(_at(path, data), _choices(field)))
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = in_units(context[name], *_types(field))
        return Explained(path, f"must be {words} {bound}", _example(field, str(path[-1])))
    if kind == "string_pattern_mismatch" and context.get("pattern") == NAME_PATTERN:
        remedy = "use at most 63 letters, digits, `_`, `.` and `-`, a letter first"
        return Explained(path, "not a name", remedy)
    if kind == "too_short" and context["actual_length"] == 0 and _at(path, data):
        return None  # every entry of the list is wrong, and is reported for itself
    if kind == "too_long":
        return Explained(path, f"more than {context['max_length']} entries", "a spec is written by a person")
    if kind == "too_short" and context["actual_length"] > 0:
        return Explained(path, f"fewer than {context['min_length']} entries", _example(field, str(path[-1])))
    if kind in ("too_short", "string_too_short"):
        return Explained(path, "empty", _example(field, str(path[-1])))
    if kind == "int_from_float":
        return Explained(path, "not a whole number", _example(field, str(path[-1]), "a whole number"))
    wrong, right = _KINDS_OF_VALUE.get(kind.split("_")[0], (str(error["msg"]), "another value"))
    if _at(path, data) is None:
        wrong = "empty"
    if path and isinstance(path[-1], int):
        return Explained(path, wrong, f"write {right}")
    return Explained(path, wrong, _example(field, str(path[-1]) if path else "", right))


def _field_named_by(error: object) -> Path:
    return tuple(error.field.split(".")) if isinstance(error, FieldError) else ()


def false_friend(path: Path, value: Any, data: Any) -> Explained | None:
    """What pydantic would read as something else: ``true`` as the number 1, the text ``no`` as false."""
    field = field_of(path, data)
    types = {field.annotation, *get_args(field.annotation)} if field is not None else set()
    wants_bool = bool in types
    if wants_bool and not isinstance(value, bool) and value not in (None, "true", "false"):
        return Explained(path, "neither true nor false", _example(field, str(path[-1])))
    if isinstance(value, bool) and not wants_bool and types & {int, float}:
        return Explained(path, "not a number", _example(field, str(path[-1])))
    return None


def misplaced(path: Path, value: Any, data: Any, task: Task | None) -> Explained | None:
    """What the task passes over, for example the windows of a classifier in a translation."""
    model, key = model_at(path[:-1], data), str(path[-1])
    if task is None or model is None or value is None:
        return None
    tasks = model.only.get(key, TASKS)
    if task in tasks or value == keys_of(model)[key].default:
        return None
    return Explained(path, f"{key} does nothing for {task}", f"leave it out; it is for {', '.join(tasks)}", at_key=True)


def locate(loc: Path, data: Any) -> tuple[Path, Path]:
    """The part of a location that the data has, and the rest.

    pydantic puts the tags of unions into its locations; a tag is no key of the data and is left out.
    """
    if loc[:1] == ("steps",) and len(loc) > 2:
        loc = (*loc[:2], *loc[3:])
    here: list[str | int] = []
    for number, part in enumerate(loc):
        if not _has(data, part):
            return tuple(here), loc[number:]
        data = data[part]
        here.append(part)
    return tuple(here), ()


def models_of(annotation: Any) -> list[type[SpecModel]]:
    """The models in an annotation, whatever lists, options and unions are around them."""
    if isinstance(annotation, type) and issubclass(annotation, SpecModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_of(part)]


def keys_of(model: type[SpecModel]) -> dict[str, FieldInfo]:
    """The fields of a model by the keys that a spec writes."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def model_at(path: Path, data: Any) -> type[SpecModel] | None:
    """The model that the mapping at ``path`` is read into."""
    model: type[SpecModel] | None = PipelineSpec
    for number, part in enumerate(path):
        if isinstance(part, int):
            continue
        field = keys_of(model).get(part) if model is not None else None
        models = models_of(field.annotation) if field is not None else []
        if len(models) > 1:
            uses = _at((*path[: number + 2], "uses"), data)
            model = KINDS.get(uses) if isinstance(uses, str) else None
        else:
            model = models[0] if models else None
    return model


def field_of(path: Path, data: Any) -> FieldInfo | None:
    """The field at ``path``, or the one whose list the entry at ``path`` belongs to."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    model = model_at(path[:-1], data) if path else None
    return keys_of(model).get(str(path[-1])) if model is not None else None


def _has(data: Any, part: str | int) -> bool:
    return (isinstance(data, dict) and part in data) or (
        isinstance(data, list) and isinstance(part, int) and part < len(data)
    )


def _at(path: Path, data: Any) -> Any:
    for part in path:
        if not _has(data, part):
            return None
        data = data[part]
    return data


def _nearest_key(path: Path, data: Any) -> str:
    model = model_at(path[:-1], data)
    return nearest(str(path[-1]), keys_of(model)) if model is not None else "leave it out"


def _choices(field: FieldInfo | None) -> list[str]:
    """The choices of a Literal, options and lists around it aside."""

    def walk(annotation: Any) -> list[str]:
        if get_origin(annotation) is Literal:
            return [str(choice) for choice in get_args(annotation)]
        if get_origin(annotation) in (Annotated, Union, types.UnionType, tuple, list):
            return [choice for part in get_args(annotation) for choice in walk(part)]
        return []

    return walk(field.annotation) if field is not None else []


def _choose(value: Any, choices: list[str]) -> str:
    listed = f"choose one of: {', '.join(choices)}"
    near = nearest(str(value), choices)
    return f"{near} {listed}" if near.startswith("did you mean") else listed


def _types(field: FieldInfo | None) -> tuple[Any, ...]:
    return () if field is None else (field.annotation, *field.metadata)


def example_of(field: FieldInfo) -> str | None:
    """A value of the field as a spec writes it: its example, its default, or the first of its choices."""
    if field.examples:
        return str(field.examples[0])
    default = field.default
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, (int, float)):
        return in_units(default, *_types(field))
    return default if isinstance(default, str) and default else next(iter(_choices(field)), None)


def _example(field: FieldInfo | None, key: str, right: str = "") -> str:
    """What to write: an example of the field, with what the field means, which names its unit."""
    example = None if field is None else example_of(field)
    if field is None or example is None:
        return f"write {right}" if right else ""
    meaning = re.split("; | \\(|, for example", field.description or "")[0]
    return f"write for example {key}: {example} – {meaning}"
