"""Sizes, durations, shares and limits: text with a unit on the way in, plain numbers inside."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import inf, isfinite
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

_NUMBER = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*")
_LONGEST = 500

BYTES = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
SECONDS = {
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "sec": 1.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}


def split_number(value: Any, what: str, example: str) -> tuple[float, str]:
    """A number and the unit text behind it; ``8 MiB`` gives ``(8.0, "MiB")``.

    Raises:
        ValueError: ``value`` is neither a number nor text that starts with one.
    """
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not {what}; write for example {example}")
    if isinstance(value, (int, float)):
        return _finite(value, what, example), ""
    if isinstance(value, str) and len(value) > _LONGEST:  # matching takes time in the square of the length
        raise ValueError(f"text of {len(value)} characters is not {what}; write for example {example}")
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is not {what}; write for example {example}")
    return _finite(match[1], what, example), match[2]


def _finite(value: float | str, what: str, example: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = inf
    if not isfinite(number):
        raise ValueError(f"{value!r} is not {what}: too large; write for example {example}")
    return number


def _scaled(value: Any, units: dict[str, Any], what: str, example: str) -> float:
    number, unit = split_number(value, what, example)
    if unit not in units:
        given = f"unit {unit!r} is unknown" if unit else "the unit is missing"
        raise ValueError(f"{value!r} is not {what}: {given}; use one of {', '.join(units)}, for example {example}")
    if number < 0:
        raise ValueError(f"{value!r} is negative; {what} is 0 or more, for example {example}")
    return _finite(number * units[unit], what, example)


def parse_bytes(value: Any) -> int:
    """``8 MiB`` to 8388608. An integer is taken as bytes.

    Raises:
        ValueError: not a size, negative, or of an unknown unit.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return int(_scaled(value, BYTES, "a size", "8 MiB"))


def parse_duration(value: Any) -> float:
    """``10 min`` to 600.0 seconds. A bare number is taken as seconds.

    Raises:
        ValueError: not a duration, negative, or of an unknown unit.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        return _finite(value, "a duration", "10 min")
    return _scaled(value, SECONDS, "a duration", "10 min")


def parse_share(value: Any) -> float:
    """``50%`` or 0.5 to 0.5.

    Raises:
        ValueError: not a share, outside 0 to 1, or of a unit other than ``%``.
    """
    number, unit = split_number(value, "a share", "50%")
    if unit not in ("", "%"):
        raise ValueError(f"{value!r} is not a share: unit {unit!r} is unknown; write 50% or 0.5")
    share = number / 100 if unit == "%" else number
    if not 0 <= share <= 1:
        raise ValueError(f"{value!r} is outside 0% to 100%; write 50% or 0.5")
    return share


def _schema(pattern: str, description: str, number: str = "number") -> WithJsonSchema:
    return WithJsonSchema(
        {"anyOf": [{"type": number, "minimum": 0}, {"type": "string", "pattern": pattern}], "description": description}
    )


_UNITS_OF_SIZE = "|".join(BYTES)
_UNITS_OF_TIME = "|".join(SECONDS)

Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    _schema(rf"^\s*[0-9.]+\s*({_UNITS_OF_SIZE})\s*$", "bytes, for example 8 MiB", "integer"),
]
Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    _schema(rf"^\s*[0-9.]+\s*({_UNITS_OF_TIME})\s*$", "a duration, for example 10 min"),
]
Share = Annotated[
    float,
    BeforeValidator(parse_share),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": r"^\s*[0-9.]+\s*%?\s*$"},
            ],
            "description": "a share, for example 50% or 0.5",
        }
    ),
]


def parse_ratio(value: Any) -> float:
    """``24x`` or 24 to 24.0.

    Raises:
        ValueError: not a number above 1, or of a unit other than ``x``.
    """
    number, unit = split_number(value, "a ratio", "24x")
    if unit not in ("", "x"):
        raise ValueError(f"{value!r} is not a ratio: unit {unit!r} is unknown; write 24x")
    if number <= 1:
        raise ValueError(f"{value!r} makes nothing smaller; write a ratio above 1, for example 24x")
    return number


Ratio = Annotated[
    float,
    BeforeValidator(parse_ratio),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 1},
                {"type": "string", "pattern": r"^\s*[0-9.]+\s*x?\s*$"},
            ],
            "description": "how many times smaller, for example 24x",
        }
    ),
]


def in_units(value: float, *types: Any) -> str:
    """A number as a spec writes it: ``30 s``, ``5%`` or ``8 MiB`` where the field is a duration, a share or a size.

    Args:
        value: seconds, bytes, a share from 0 to 1, or any other number.
        types: the annotation of the field, and whatever pydantic took out of it.
    """
    parser = _parser(types)
    if parser is parse_share:
        return f"{100 * value:g}%"
    units = {parse_duration: SECONDS, parse_bytes: BYTES}.get(parser)
    if units is None:
        return f"{value:g}" if isinstance(value, float) else str(value)
    fitting = [unit for unit, scale in units.items() if scale <= value and (value / scale).is_integer()]
    unit = max(fitting, key=lambda unit: units[unit], default="")
    if not unit or units[unit] < 1 <= value:
        unit = next(unit for unit, scale in units.items() if scale == 1)
    return f"{value / units[unit]:.12g} {unit}"


def _parser(types: Iterable[Any]) -> Any:
    """The function that reads a type written as one of ours, options around it aside."""
    for part in types:
        found = part.func if isinstance(part, BeforeValidator) else _parser(get_args(part))
        if found is not None:
            return found
    return None


Unit = Literal["", "%", "points", "x", "bytes", "seconds"]


_SHOWN = {
    "bytes": (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)),
    "seconds": (("s", 1), ("ms", 1e-3), ("us", 1e-6)),
}


class Limit(tuple[float, str]):
    """A limit as ``(number, unit)``: ``1.5 points`` is ``(1.5, "points")``, ``14 MB`` is ``(14e6, "bytes")``."""

    __slots__ = ()

    @property
    def number(self) -> float:
        return self[0]

    @property
    def unit(self) -> str:
        return self[1]

    def __str__(self) -> str:
        for unit, scale in _SHOWN.get(self.unit, ()):
            if self.number >= scale:
                return f"{self.number / scale:g} {unit}"
        return f"{self.number:g}{'' if self.unit in ('%', 'x') else ' '}{self.unit}".strip()


def parse_limit(value: Any) -> Limit:
    """A number with any unit that a metric can have.

    Raises:
        ValueError: not a number, or of an unknown unit.
    """
    example = "0.85, 99%, 1.5 points, 14 MB, 10 ms or 3x"
    if isinstance(value, Limit):
        return value
    number, unit = split_number(value, "a limit", example)
    if unit in ("", "%", "x"):
        return Limit((number, unit))
    if unit in ("point", "points"):
        return Limit((number, "points"))
    if unit in BYTES:
        return Limit((_finite(number * BYTES[unit], "a limit", example), "bytes"))
    if unit in SECONDS:
        return Limit((number * SECONDS[unit], "seconds"))
    raise ValueError(f"{value!r} is not a limit: unit {unit!r} is unknown; write {example}")


def _written(limit: Limit) -> str:
    """The limit as a spec would say it, so that what was dumped can be read again."""
    unit = {"bytes": "B", "seconds": "s"}.get(limit.unit, limit.unit)
    return f"{limit.number!r} {unit}".strip()


PARAMETERS = {"k": 1e3, "M": 1e6, "B": 1e9, "parameters": 1.0}


class Keep(tuple[float, Literal["share", "parameters", "seconds"]]):
    """How much of a model stays: ``50%`` is ``(0.5, "share")``, ``5M`` is ``(5e6, "parameters")``, ``8 ms`` is
    ``(0.008, "seconds")``."""

    __slots__ = ()

    @property
    def number(self) -> float:
        return self[0]

    @property
    def unit(self) -> Literal["share", "parameters", "seconds"]:
        return self[1]

    def __str__(self) -> str:
        if self.unit == "share":
            return f"{100 * self.number:g}%"
        if self.unit == "seconds":
            return str(Limit((self.number, "seconds")))
        unit = next((unit for unit in ("B", "M", "k") if self.number >= PARAMETERS[unit]), "parameters")
        return f"{self.number / PARAMETERS[unit]:g}{' ' if unit == 'parameters' else ''}{unit}"


def parse_keep(value: Any) -> Keep:
    """A share of the model, a number of parameters, or the time that a forward pass may take.

    Raises:
        ValueError: none of these, nothing or everything.
    """
    example = "50%, 5M or 8 ms"
    if isinstance(value, Keep):
        return value
    number, unit = split_number(value, "a share, a number of parameters or a time", example)
    if unit in ("", "%"):
        share = number / 100 if unit == "%" else number
        if not 0 < share < 1:
            raise ValueError(
                f"{value!r} is outside 0% to 100%, and neither of them prunes; write for example {example}"
            )
        return Keep((share, "share"))
    scales = PARAMETERS if unit in PARAMETERS else SECONDS
    if unit not in scales:
        raise ValueError(f"{value!r}: unit {unit!r} is unknown; write for example {example}")
    if number <= 0:
        raise ValueError(f"{value!r} is not above 0; write for example {example}")
    return Keep(
        (_finite(number * scales[unit], "a target", example), "parameters" if unit in PARAMETERS else "seconds")
    )


def _kept(keep: Keep) -> str:
    """As a spec would say it, so that what was dumped can be read again."""
    unit = {"share": "", "parameters": "parameters", "seconds": "s"}[keep.unit]
    return f"{keep.number!r} {unit}".strip()


KeepField = Annotated[
    Any,
    BeforeValidator(parse_keep),
    PlainSerializer(_kept, when_used="json-unless-none"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                {
                    "type": "string",
                    "pattern": rf"^\s*[0-9.]+(e[+-]?[0-9]+)?\s*(%|{'|'.join(PARAMETERS)}|{_UNITS_OF_TIME})?\s*$",
                },
            ],
            "description": "a share, a number of parameters or a time, for example 50%, 5M or 8 ms",
        }
    ),
]


LimitField = Annotated[
    Any,
    BeforeValidator(parse_limit),
    PlainSerializer(_written, when_used="json-unless-none"),
    Field(description="a number with the unit of the metric"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number"},
                {"type": "string", "pattern": r"^\s*[+-]?[0-9.]+(e[+-]?[0-9]+)?\s*[A-Za-z%]*\s*$"},
            ]
        }
    ),
]
