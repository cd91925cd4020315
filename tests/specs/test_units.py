"""Sizes, durations, shares and limits."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from specs.schema.suggest import nearest
from specs.schema.units import (
    Bytes,
    Duration,
    Limit,
    Share,
    in_units,
    parse_bytes,
    parse_duration,
    parse_limit,
    parse_share,
)


@pytest.mark.parametrize(
    ("text", "value"), [("8 MiB", 8 << 20), ("1.5kB", 1500), ("14 MB", 14_000_000), (12, 12), ("2e3 B", 2000)]
)
def test_sizes(text: object, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(("text", "value"), [("10 min", 600), ("250ms", 0.25), (3, 3), ("2 h", 7200), ("1 d", 86400)])
def test_durations(text: object, value: float) -> None:
    assert parse_duration(text) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("50%", 0.5), (0.5, 0.5), ("0.25", 0.25), ("100 %", 1), (0, 0)])
def test_shares(text: object, value: float) -> None:
    assert parse_share(text) == value


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("1.5 points", 1.5, "points"),
        ("1 point", 1, "points"),
        ("99%", 99, "%"),
        ("3x", 3, "x"),
        (0.85, 0.85, ""),
        ("14 MB", 14e6, "bytes"),
        ("10 ms", 0.01, "seconds"),
    ],
)
def test_limits(text: object, number: float, unit: str) -> None:
    assert parse_limit(text) == Limit((number, unit))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parse", "value", "words"),
    [
        (parse_bytes, "8 Mib", "unit 'Mib' is unknown; use one of"),
        (parse_bytes, "8", "the unit is missing"),
        (parse_bytes, -1, "the unit is missing"),
        (parse_bytes, True, "not a size"),
        (parse_bytes, "1e308 TiB", "too large"),
        (parse_bytes, float("nan"), "too large"),
        (parse_duration, 10**400, "too large"),
        (parse_duration, "5 weeks", "unit 'weeks' is unknown"),
        (parse_duration, "-5 s", "negative"),
        (parse_share, "101%", "outside 0% to 100%"),
        (parse_share, "5 points", "write 50% or 0.5"),
        (parse_limit, "5 parsecs", "unit 'parsecs' is unknown"),
        (parse_limit, None, "not a limit"),
        (parse_limit, "9e999", "too large"),
    ],
)
def test_what_is_refused(parse, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(value)


@pytest.mark.parametrize(
    ("hint", "value", "text"),
    [
        (Duration, 5.0, "5 s"),
        (Duration, 0.25, "250 ms"),
        (Duration, 90.0, "90 s"),
        (Duration, 600.0, "10 min"),
        (Duration, 0.0, "0 s"),
        (Duration, 1e6 + 0.1, "1000000.1 s"),
        (Duration | None, 7200.0, "2 h"),
        (Share, 0.05, "5%"),
        (Share | None, 0.07, "7%"),
        (Bytes, 8 << 20, "8 MiB"),
        (Bytes, 14_000_000, "14 MB"),
        (Bytes | None, 1001, "1001 B"),
        (Bytes, 0, "0 B"),
        (int, 3, "3"),
        (float | None, 0.5, "0.5"),
    ],
)
def test_numbers_are_shown_as_a_spec_writes_them(hint: object, value: float, text: str) -> None:
    assert in_units(value, hint) == text
    field: TypeAdapter[Any] = TypeAdapter(hint)
    assert field.validate_python(text) == pytest.approx(value)


def test_what_is_far_off_is_not_suggested() -> None:
    for name, known in (
        ("nope.yaml", "e.yaml"),
        ("nope.yml", "e.yaml"),
        ("train.jsonl", "dev.jsonl"),
        ("text-summarization", "text-classification"),
        ("loss", "class"),
    ):
        assert nearest(name, [known]) == f"known: {known}"
    for name, known in (
        ("spce.yaml", "spec.yaml"),
        ("spec.yml", "spec.yaml"),
        ("slim.v1", "slim.v2"),
        ("fine_tuning", "finetune"),
        ("latency", "latency_p50"),
        ("slm", "slim"),
    ):
        assert nearest(name, [known, "zzzz"]) == f"did you mean {known}?"


def test_the_nearest_name() -> None:
    assert nearest("epoch", ["epochs", "seed"]) == "did you mean epochs?"
    assert nearest("zzz", ["epochs", "seed"]) == "known: epochs, seed"
    assert nearest("zzz", []) == "known: none"
    assert nearest("zzz", [f"a{i}" for i in range(40)]).endswith("a29 and 10 more")
