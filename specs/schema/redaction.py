"""What came from the environment stays out of records: where it may stand in a spec, and how it is masked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

SHORTEST_SECRET = 4
"""Shorter values are not masked: they occur everywhere by chance, and masking them would garble the record."""

MASK = "***"

FIXED = frozenset(
    {
        ("task",),
        ("name",),
        ("steps", "id"),
        ("steps", "uses"),
        ("steps", "needs"),
        ("steps", "from"),
        ("steps", "teacher"),
        ("steps", "minimise"),
        ("steps", "maximise"),
        ("gates", "step"),
        ("gates", "metric"),
        ("gates", "relative_to"),
        ("tracking", "experiment"),
        ("tracking", "register"),
        ("tracking", "register_step"),
    }
)
"""The fields by which a spec is put together and its records are found again, without the numbers of list entries. They
take nothing from the environment, and so they are never masked."""

_CREDENTIALS = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")


def is_fixed(path: Iterable[str | int]) -> bool:
    """Whether the field at a path into the spec, or at an entry of its list, is one of ``FIXED``."""
    return tuple(part for part in path if isinstance(part, str)) in FIXED


def redact(value: Any, secrets: Iterable[str]) -> Any:
    """A copy in which every secret is masked, inside longer text and in keys too.

    Passwords in addresses (``scheme://user:password@host``) are masked whether they are known or not. Secrets shorter
    than ``SHORTEST_SECRET`` characters are left.

    Args:
        value: JSON data, or text.
        secrets: the values to mask, as they are and as Python shows them.
    """
    return _redact(value, _forms(secrets), keys=True)


def redact_values(value: Any, secrets: Iterable[str], kept: Iterable[str] = ()) -> Any:
    """Like ``redact`` for a record whose structure is read again: keys stay, and so does what stands under ``kept``."""
    return _redact(value, _forms(secrets), keys=False, kept=frozenset(kept))


def redact_spec(spec: Any, secrets: Iterable[str], at: tuple[str | int, ...] = ()) -> Any:
    """Like ``redact_values`` for a spec as JSON data, or the part of it at ``at``; the fields in ``FIXED`` stay."""
    return _redact_spec(spec, _forms(secrets), at)


def _redact_spec(value: Any, forms: list[str], at: tuple[str | int, ...]) -> Any:
    if is_fixed(at):
        return value
    if isinstance(value, Mapping):
        return {key: _redact_spec(item, forms, (*at, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redact_spec(item, forms, (*at, number)) for number, item in enumerate(value)]
    return _redact(value, forms, keys=False)


def _forms(secrets: Iterable[str]) -> list[str]:
    known = {form for secret in secrets if len(secret) >= SHORTEST_SECRET for form in (secret, repr(secret)[1:-1])}
    return sorted(known, key=len, reverse=True)


def _redact(value: Any, forms: list[str], *, keys: bool, kept: frozenset[str] = frozenset()) -> Any:
    if isinstance(value, str):
        for form in forms:
            value = value.replace(form, MASK)
        return _CREDENTIALS.sub(MASK, value) if "://" in value else value
    if isinstance(value, Mapping):
        return {
            (_redact(key, forms, keys=keys) if keys else key): (
                item if key in kept else _redact(item, forms, keys=keys, kept=kept)
            )
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_redact(item, forms, keys=keys, kept=kept) for item in value]
    if isinstance(value, os.PathLike):
        return _redact(os.fspath(value), forms, keys=keys)
    return value
