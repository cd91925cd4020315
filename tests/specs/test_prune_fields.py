"""Which fields of `prune` go with which method."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from specs.schema.steps.prune import FIELDS, Method, PruneSpec, kept_of

GOOD: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0.1},
    "magnitude": {"sparsity": 0.5},
    "movement": {"sparsity": 0.5, "recover": {"epochs": 1}},
    "wanda": {"sparsity": 0.5},
    "sparsegpt": {"pattern": "2:4"},
    "width": {"keep": "50%"},
    "depth": {"keep": "5M"},
    "vocabulary": {},
}
VALUES: dict[str, Any] = {
    "threshold": 0.1,
    "sparsity": 0.5,
    "pattern": "1:4",
    "scope": "global",
    "schedule": "cubic",
    "ramp": 0.5,
    "mask_steps": 3,
    "calibration_examples": 4,
    "damping": 0.1,
    "block_size": 8,
    "keep": "25%",
    "parts": ["ffn"],
    "hidden_by": "pca",
    "stacks": ["decoder"],
    "importance": "taylor",
    "multiple_of": 4,
    "recover": {"epochs": 1},
}


def spec(method: str, **fields: Any) -> PruneSpec:
    return PruneSpec.model_validate({"uses": "prune", "id": "p", "method": method, **fields})


def refusal(method: str, **fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        spec(method, **fields)
    return str(caught.value.errors()[0]["msg"])


def test_every_method_and_every_field_is_in_the_table() -> None:
    assert set(FIELDS) == set(get_args(Method)) == set(GOOD)
    assert {name for fields in FIELDS.values() for name in fields.all} == set(VALUES)
    common = {"uses", "id", "needs", "retries", "retry_delay", "timeout", "evaluate", "method"}
    assert set(VALUES) == set(PruneSpec.model_fields) - common


@pytest.mark.parametrize("method", FIELDS)
def test_a_method_takes_its_own_fields_and_survives_json(method: str) -> None:
    good = spec(method, **GOOD[method])
    assert PruneSpec.model_validate(good.model_dump(mode="json")) == good


@pytest.mark.parametrize(("method", "field"), [(m, f) for m, its in FIELDS.items() for f in VALUES if f not in its.all])
def test_a_foreign_field_is_named_with_the_methods_that_take_it(method: str, field: str) -> None:
    text = refusal(method, **GOOD[method] | {field: VALUES[field]})
    assert f"method {method} takes no `{field}`" in text
    able = [name for name, its in FIELDS.items() if field in its.all]
    assert text.endswith(f"write method: {' or '.join(able)}")


@pytest.mark.parametrize(("method", "group"), [(m, group) for m, its in FIELDS.items() for group in its.one_of])
def test_a_missing_field_is_named_with_an_example(method: str, group: tuple[str, ...]) -> None:
    text = refusal(method, **{name: value for name, value in GOOD[method].items() if name not in group})
    assert f"method {method} needs `{group[0]}`" in text
    assert f"; write for example {group[0]}: " in text


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("magnitude", {"sparsity": 1.0}, "less than 1"),
        ("magnitude", {"sparsity": 0}, "greater than 0"),
        ("wanda", {"sparsity": 0.5, "pattern": "2:4"}, "`sparsity` says how much becomes 0 already"),
        ("magnitude", {"pattern": "4:4"}, "'4:4' keeps every weight; write for example 2:4"),
        ("magnitude", {"pattern": "2-4"}, "match pattern"),
        ("magnitude", {"pattern": "0:4"}, "match pattern"),
        ("magnitude", {"pattern": "2:4", "scope": "global"}, "write scope: layer"),
        ("magnitude", {"pattern": "2:4", "schedule": "cubic", "recover": {}}, "write schedule: one-shot"),
        ("magnitude", {"sparsity": 0.5, "schedule": "cubic"}, "write for example recover: {epochs: 1}"),
        ("magnitude", {"sparsity": 0.5, "ramp": 0.5}, "`ramp` is for a sparsity that rises; write schedule: cubic"),
        ("magnitude", {"sparsity": 0.5, "mask_steps": 5}, "`mask_steps` is for a sparsity that rises"),
        ("wanda", {"sparsity": 0.5, "recover": {"keep_zeros": False}}, "leave keep_zeros out"),
        ("width", {"keep": 0.5, "parts": ["ffn", "ffn"]}, "names the same twice"),
        ("width", {"keep": 0.5, "parts": ["ffn"], "hidden_by": "pca"}, "write for example parts: [heads, ffn, hidden]"),
    ],
)
def test_fields_that_do_not_go_together(method: str, fields: dict[str, Any], message: str) -> None:
    assert message in refusal(method, **fields)


def test_where_no_zeros_are_made_those_that_come_in_may_go() -> None:
    assert spec("width", keep="50%", recover={"keep_zeros": False}).recover is not None


def test_a_pattern_names_what_is_kept() -> None:
    assert kept_of("1:4") == (1, 4)
    assert kept_of("16:32") == (16, 32)
