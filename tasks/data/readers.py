"""Records from files, hub data sets and built-in corpora."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from specs.schema.base import Task
from specs.schema.pipeline import DataSpec, FieldsSpec
from specs.schema.suggest import nearest
from tasks.context import StepError
from tasks.data import builtin, hub
from tasks.data.audio import Audio, audio_of
from tasks.data.bad_rows import BadRow, BadRows
from tasks.data.files import Row, Rows, files_of, rows_of, shown

__all__ = ["Record", "Split", "columns_of", "files_of", "records", "source_of"]

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class Record:
    """One example as the data has it.

    Args:
        text: the text; for translation the one to translate, for speech-recognition the transcript.
        label: its label (text-classification); where several columns hold labels, the names of those that it has.
        place: where it stands, for messages.
        target: its translation (translation).
        audio: what is said in ``text`` (speech-recognition).
    """

    text: str
    label: str | tuple[str, ...] | None
    place: str
    target: str | None = None
    audio: Audio | None = None


ROLES: dict[Task, tuple[str, ...]] = {
    "text-generation": ("text",),
    "text-classification": ("text", "label"),
    "translation": ("source", "target"),
    "speech-recognition": ("audio", "text"),
}
"""The fields of ``FieldsSpec`` whose columns each task needs."""


def records(data: DataSpec, split: Split, task: Task, bad: BadRows | None = None) -> Iterator[Record]:
    """The records of a split in their order, at most as many as its limit.

    A text without any character but white space is a bad row; for text-generation it holds nothing to learn or to
    score and is passed over.

    Args:
        data: where they are; paths absolute.
        split: which of its two splits.
        task: what the model does.
        bad: is told of bad rows; default: one that follows ``data.on_bad_row``.

    Raises:
        StepError: a file is missing or damaged, or nothing is left of the split; and where the spec does not skip bad
            rows, a column is missing or a value is unfit. With the place and the remedy.
    """
    limit = data.train_limit if split == "train" else data.eval_limit
    return islice(_all_records(data, split, task, bad or BadRows(data.on_bad_row)), limit)


def source_of(data: DataSpec, split: Split) -> str:
    """What ``data.train`` or ``data.eval`` says."""
    return data.train if split == "train" else data.eval


def columns_of(fields: FieldsSpec, task: Task) -> tuple[str, ...]:
    """The names of the columns that a task uses."""
    named = (getattr(fields, role) for role in ROLES[task])
    return tuple(column for names in named for column in ((names,) if isinstance(names, str) else names))


def _all_records(data: DataSpec, split: Split, task: Task, bad: BadRows) -> Iterator[Record]:
    source = source_of(data, split)
    number = used = 0
    for row in _rows(source, data.fields, split, task):
        number += 1
        try:
            record = _record(row, data.fields, task)
        except BadRow as error:
            bad.add(error)
            continue
        if record is not None:
            used += 1
            yield record
    if number == 0:
        raise StepError(f"data.{split}: {source} holds no record")
    bad.check_some_left(used, f"data.{split}: {source}")


def _rows(source: str, fields: FieldsSpec, split: Split, task: Task) -> Rows:
    if source.startswith(builtin.PREFIX):
        corpus = builtin.find(source)
        builtin.check_task(corpus, task, ROLES[task])
        for number, values in enumerate(corpus.read(split), 1):
            yield Row(f"{source} record {number}", {_name(fields, role): value for role, value in values.items()})
    elif source.startswith(hub.PREFIX):
        yield from hub.rows(source, split)
    else:
        yield from rows_of(source, fields, columns_of(fields, task))


def _name(fields: FieldsSpec, role: str) -> str:
    name = getattr(fields, role)
    return name if isinstance(name, str) else role


def _record(row: Row | BadRow, fields: FieldsSpec, task: Task) -> Record | None:
    if isinstance(row, BadRow):
        raise row
    return _BUILDERS[task](row, fields)


def _document(row: Row, fields: FieldsSpec) -> Record | None:
    text = _text(row, fields.text, "text")
    return Record(text, None, row.place) if text.strip() else None


def _example(row: Row, fields: FieldsSpec) -> Record:
    text = _some_text(row, fields.text, "text")
    if isinstance(fields.label, str):
        return Record(text, _label(row, fields.label), row.place)
    return Record(text, tuple(name for name in fields.label if _holds(row, name)), row.place)


def _pair(row: Row, fields: FieldsSpec) -> Record:
    source, target = (_some_text(row, getattr(fields, role), role) for role in ("source", "target"))
    return Record(source, None, row.place, target=target)


def _utterance(row: Row, fields: FieldsSpec) -> Record:
    named = _column(row, fields.audio, "audio")
    if isinstance(named, str):
        _check_characters(named, fields.audio, row.place)
    audio = audio_of(named, row.folder, fields.audio, row.place)
    return Record(_some_text(row, fields.text, "text"), None, row.place, audio=audio)


_BUILDERS: dict[Task, Callable[[Row, FieldsSpec], Record | None]] = {
    "text-generation": _document,
    "text-classification": _example,
    "translation": _pair,
    "speech-recognition": _utterance,
}


def _column(row: Row, name: str, field: str) -> Any:
    if name not in row.columns:
        raise BadRow(
            f"{row.place}: no column {name!r}; {nearest(name, map(str, row.columns))} (data.fields.{field} names it)",
            f"no column {name!r}",
        )
    return row.columns[name]


def _text(row: Row, name: str, field: str) -> str:
    text = _column(row, name, field)
    if not isinstance(text, str):
        raise BadRow(f"{row.place}: column {name!r} is {shown(text)}, not text", "not text")
    _check_characters(text, name, row.place)
    return text


def _check_characters(text: str, name: str, place: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{place}: column {name!r} has half a surrogate pair at character {error.start}, which no text can have; "
            "write the file anew as UTF-8",
            "half a surrogate pair",
        ) from error


def _some_text(row: Row, name: str, field: str) -> str:
    text = _text(row, name, field)
    if not text.strip():
        raise BadRow(f"{row.place}: column {name!r} is empty; remove the record or give it text", "empty text")
    return text


def _label(row: Row, name: str) -> str:
    value = _column(row, name, "label")
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"{row.place}: column {name!r} has no label; remove the record or label it", "no label")
    if not isinstance(value, (str, int)):
        raise BadRow(
            f"{row.place}: column {name!r} is {shown(value)}; a label is a name or a whole number",
            "not a label",
        )
    label = str(value).strip()
    _check_characters(label, name, row.place)
    return label


def _holds(row: Row, name: str) -> bool:
    value = _column(row, name, "label")
    text = str(value).strip().lower()
    if text not in ("0", "1", "0.0", "1.0", "false", "true"):
        raise BadRow(
            f"{row.place}: column {name!r} is {shown(value)}; one of several labels is 0 or 1", "neither 0 nor 1"
        )
    return text in ("1", "1.0", "true")
