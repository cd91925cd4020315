"""What is wrong with a spec, and where: for the person who wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_LONGEST_VALUE = 60


@dataclass(frozen=True, order=True)
class Place:
    """A place in a file; line and column count from 1, and both are 0 where the whole source is meant."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Args:
        file: the spec, or the override ``--set a.b=c`` that the value came from.
        line: counted from 1; 0 where the whole file is meant.
        column: counted from 1 in characters; 0 where the whole file is meant.
        field: the field, dotted and with the step's id, for example ``steps.student.epochs``; empty for the file.
        value: what was written, as a person would read it; empty where nothing was.
        message: what is wrong.
        remedy: what to write instead.
    """

    file: str
    line: int
    column: int
    field: str
    value: str
    message: str
    remedy: str

    def __str__(self) -> str:
        where = f"{Place(self.file, self.line, self.column)}: {f'{self.field}: ' if self.field else ''}"
        shown = f"got {self.value}" if self.value and not self._says_value() else ""
        hint = "; ".join(part for part in (shown, self.remedy) if part)
        return f"{where}{self.message}{f' ({hint})' if hint else ''}"

    def _says_value(self) -> bool:
        """Whether the message shows the value: text in its quotes, or a number as its first word; one further back is
        another number, such as a bound."""
        quoted = self.value[0] in "'\"" and self.value in self.message
        return quoted or self.message.startswith(f"{self.value} ")

    def as_dict(self) -> dict[str, Any]:
        """The mistake as plain data, for ``--json``."""
        return asdict(self)


class SpecErrors(Exception):
    """Every mistake of a spec, in the order of their places."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = list(mistakes)
        super().__init__("\n".join(str(mistake) for mistake in self.mistakes))


def shown(value: object) -> str:
    """A value as a mistake shows it: text in quotes, cut where it is long; empty for mappings, lists and nothing."""
    if value is None or isinstance(value, (dict, list, tuple)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}…")
    return str(value)[:_LONGEST_VALUE]
