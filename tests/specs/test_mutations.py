"""Specs spoilt at random: a list of mistakes or a spec, never anything else, and never slowly."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Sequence
from math import inf, isfinite
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specs.schema.graph import build
from specs.schema.load import LoadedSpec, SpecErrors, load
from specs.schema.units import Limit, parse_bytes, parse_duration, parse_limit, parse_share
from tests.specs.writing import GOOD, write

PIECES = [
    "[", "]", "{", "}", ":", ": ", "- ", "\n", "\n  ", "  ", "\t", ",", "#", "&a ", "*a", "!!str ", "!x ", "|", ">",
    "'", '"', "%", "@", "`", "? ", "<<: ", "---\n", "...\n", "null", "~", "true", "no", "1e999", ".nan", "-1", "0",
    "99999999999999999999999999", "1e308 TiB", "9e400 MiB", "${HOME}", "${", "$${", "${A B}", "\x00", "\x85", "\u2028",
    "\ufeff", "é", "\U0001f600", "[[[[[[", "{a: {b: {c: ", "baseline", "model", "uses", "id: ", "needs: ", "from: ",
]  # fmt: skip
TOKENS = ["student", "slim", "50%", "2", "1e-4", "accuracy", "int8", "prune", "{at_most: 1.5 points}", "[cpu, npu]"]


def _mutated(seed: int) -> str:
    draw = random.Random(seed)
    text = GOOD
    for _ in range(draw.randint(1, 6)):
        at, end = sorted((draw.randrange(len(text)), draw.randrange(len(text))))
        choice = draw.randrange(6)
        if choice == 0:
            text = text[:at] + draw.choice(PIECES) + text[at:]
        elif choice == 1:
            text = text[:at] + text[min(end, at + draw.randint(1, 20)) :]
        elif choice == 2:
            old = draw.choice(TOKENS)
            text = text.replace(old, draw.choice([*PIECES, *TOKENS]), 1)
        elif choice == 3:
            lines = text.split("\n")
            draw.shuffle(lines)
            text = "\n".join(lines) if draw.random() < 0.3 else "\n".join(lines[: len(lines) // 2])
        elif choice == 4:
            text = text[:at] + text[at:end] * 2 + text[end:]
        else:
            text = text[:at] + chr(draw.choice([*range(256), 0x20AC, 0xFFFE])) + text[at + 1 :]
        text = text or "x"
    return text


def _outcome(path: Path, overrides: Sequence[str] = ()) -> LoadedSpec | SpecErrors:
    """What a load ends with; anything else that it raises goes through."""
    try:
        return load(path, overrides)
    except SpecErrors as errors:
        return errors


def _flaw_of(outcome: LoadedSpec | SpecErrors, path: Path, overrides: Sequence[str] = ()) -> str:
    """What is wrong with an outcome: it is neither a spec that makes a graph, nor mistakes that each say what is wrong
    at a place that there is, in the order of their places."""
    if isinstance(outcome, LoadedSpec):
        return "" if len(build(outcome.spec)) == len(outcome.spec.steps) + 1 else "a graph of other steps"
    lines = path.read_bytes().decode("utf-8-sig", "replace").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    sources = {f"--set {override if len(override) <= 80 else override[:80] + '…'}" for override in overrides}
    for mistake in outcome.mistakes:
        inside = mistake.file == str(path) and 1 <= mistake.line <= len(lines)
        if inside and not 1 <= mistake.column <= len(lines[mistake.line - 1]) + 1:
            return f"a column that is not there: {mistake}"
        if not inside and not (mistake.file in sources and mistake.line == 0):
            return f"no place: {mistake}"
        if not mistake.message:
            return f"no message: {mistake}"
    places = [(m.line, m.column) for m in outcome.mistakes if m.file == str(path)]
    return "" if outcome.mistakes and places == sorted(places) else "no mistakes, or out of order"


@pytest.mark.parametrize("batch", range(6))
def test_mutated_specs(batch: int, tmp_path: Path) -> None:
    refused = 0
    for seed in range(batch * 100, batch * 100 + 100):
        text = _mutated(seed)
        path = write(tmp_path, text)
        try:
            outcome = _outcome(path)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{text}") from error
        assert not _flaw_of(outcome, path), f"seed {seed}\n{text}"
        refused += isinstance(outcome, SpecErrors)
    assert refused > 50


_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from([*PIECES, *TOKENS])
)
_VALUES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(
        ["name", "task", "model", "data", "data.train", "seed", "steps", "steps.0", "steps.student.epochs", "gates",
         "steps.slim.uses", "steps.slim.id", "steps.slim.needs", "steps.best.from", "gates.0.drop", "gates.1.at_least",
         "steps.slim.retry_delay", "resources.disk", "schedule.cron", "schedule.timezone", "model.config", "tracking"]
    ),
    value=_VALUES,
)  # fmt: skip
def test_any_value_in_any_field(key: str, value: object, tmp_path: Path) -> None:
    path, overrides = write(tmp_path, GOOD), [f"{key}={json.dumps(value, ensure_ascii=False)}"]
    assert not _flaw_of(_outcome(path, overrides), path, overrides)


FLOODS = {
    "unknown keys": GOOD + "".join(f"key{i}: 1\n" for i in range(4000)),
    "unknown keys of a step": GOOD.replace("epochs: 2", ",\n ".join(f"epoch{i}: 1" for i in range(4000))),
    "steps of unknown kinds": GOOD.replace("gates:", "  - {id: a, uses: prun}\n" * 1500 + "gates:"),
    "steps without inputs": GOOD.replace(
        "gates:", "".join(f"  - {{id: i{i}, uses: finetune, needs: j{i}}}\n" for i in range(1500)) + "gates:"
    ),
    "cycles": GOOD.replace(
        "gates:", "".join(f"  - {{id: i{i}, uses: finetune, needs: i{i ^ 1}}}\n" for i in range(190)) + "gates:"
    ),
    "paths that double at every step": GOOD.replace(
        "gates:",
        "  - {id: p0, uses: quantize, needs: slim}\n  - {id: q0, uses: quantize, needs: slim}\n"
        + "".join(
            f"  - {{id: {x}{i}, uses: select, from: [p{i - 1}, q{i - 1}], minimise: size}}\n"
            for i in range(1, 60)
            for x in "pq"
        )
        + "  - {id: last, uses: finetune}\ngates:",
    ),
    "gates on unknown steps": GOOD.replace(
        "tracking:", "  - {step: bst, metric: size, at_most: 5 MB}\n" * 1500 + "tracking:"
    ),
    "a number behind a desert": GOOD.replace("50%", "'1" + (" " * 9000 + "\n\n ") * 100 + "x\n\n y'"),
    "variables": GOOD.replace("sentiment\n", "x" + "${LATHE_NONE}" * 700 + "\n", 1),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_many_mistakes_are_found_in_little_time(flood: str, tmp_path: Path) -> None:
    path = write(tmp_path, FLOODS[flood])
    start = time.process_time()
    outcome = _outcome(path)
    assert time.process_time() - start < 2
    assert isinstance(outcome, SpecErrors)
    assert not _flaw_of(outcome, path)


@given(value=st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers())))
def test_units_raise_nothing_but_value_errors(value: object) -> None:
    for parse, least, most in (
        (parse_bytes, 0, inf),
        (parse_duration, 0, inf),
        (parse_limit, -inf, inf),
        (parse_share, 0, 1),
    ):
        read = None
        with contextlib.suppress(ValueError):
            read = parse(value)
        number = read.number if isinstance(read, Limit) else read
        assert number is None or (isfinite(number) and least <= number <= most)


_BYTES = [
    *"\r~\n~\r\n~\ufeff~\x85~\u2028~\t~ ~\"~'~!~a: ~- ~{~[~#~|~>~%~*~&a ~${~? ~...~---~name: ~\0".encode().split(b"~"),
    b"\x80",
]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(_BYTES), max_size=14).map(b"".join)))
def test_any_bytes(raw: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, raw)
    outcome = _outcome(path)
    assert isinstance(outcome, SpecErrors)
    assert not _flaw_of(outcome, path)
