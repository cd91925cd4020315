"""What goes together in the step ``quantize``, and what is said where it does not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from specs.schema.base import FieldError
from specs.schema.steps.quantize import QuantizeSpec


def _spec(**fields: Any) -> QuantizeSpec:
    return QuantizeSpec(uses="quantize", id="q", **fields)


@pytest.mark.parametrize(
    ("fields", "stored", "kind", "calibrates"),
    [
        ({}, "int8-dynamic", "packed", False),
        ({"precision": "int8-static"}, "int8-static", "packed", True),
        ({"precision": "int8-static", "algorithm": "smoothquant", "alpha": 0.7}, "int8-static", "packed", True),
        ({"precision": "int4", "group_size": 128}, "int4", "packed", False),
        ({"precision": "int4", "algorithm": "gptq", "damping": "1%", "act_order": True}, "int4", "packed", True),
        ({"mixed": {"budget": "8 MiB"}, "algorithm": "awq", "samples": 16}, "mixed", "packed", True),
        ({"mixed": {"budget": "8 MiB"}, "train": {"epochs": 1}}, "mixed", "packed", True),
        ({"precision": "int8", "sensitivity": True, "samples": 16}, "int8", "packed", True),
        ({"precision": "fp16", "error": {"at_most": "1%"}}, "fp16", "model", False),
        ({"precision": "int4", "train": {"epochs": 1}, "embeddings": False}, "int4", "packed", False),
    ],
)
def test_what_goes_together(fields: dict[str, Any], stored: str, kind: str, calibrates: bool) -> None:
    spec = _spec(**fields)
    assert (spec.stored, spec.gives(("model",)), spec.calibrates) == (stored, kind, calibrates)


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"mixed": {"budget": "8 MiB"}, "precision": "int4"}, "precision", "leave precision out"),
        ({"mixed": {"budget": "8 MiB"}, "sensitivity": False}, "sensitivity", "leave sensitivity out"),
        ({"mixed": {"budget": "8 MiB"}, "algorithm": "gptq", "train": {"epochs": 1}}, "algorithm", "or train"),
        ({"precision": "fp16", "skip": ("lm_head",)}, "skip", "skip does not go with precision: fp16"),
        ({"precision": "bf16", "train": {"epochs": 1}}, "train", "converts the whole file; leave it out"),
        ({"precision": "fp16", "embeddings": True}, "embeddings", "leave it out"),
        ({"algorithm": "gptq"}, "algorithm", "gptq does not go with int8-dynamic; write precision: int4 or int8"),
        ({"precision": "fp16", "algorithm": "awq"}, "algorithm", "awq does not go with fp16"),
        (
            {"precision": "int4", "algorithm": "smoothquant"},
            "algorithm",
            "write precision: int8-dynamic or",
        ),
        ({"precision": "int4", "algorithm": "gptq", "train": {"epochs": 1}}, "algorithm", "leave algorithm out"),
        ({"group_size": 32}, "group_size", "int8-dynamic has one scale a row; leave it out"),
        ({"precision": "int4", "samples": 8}, "samples", "nothing here is calibrated; leave it out"),
        ({"precision": "int4", "damping": 0.1}, "damping", "it belongs to algorithm: gptq"),
        ({"precision": "int4", "algorithm": "awq", "act_order": True}, "act_order", "it belongs to algorithm: gptq"),
        ({"alpha": 0.5}, "alpha", "it belongs to algorithm: smoothquant"),
    ],
)
def test_what_does_not_is_named_with_the_remedy(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _spec(**fields)
    (error,) = caught.value.errors()
    named = error["ctx"]["error"]  # type: ignore[typeddict-item]
    assert isinstance(named, FieldError)
    assert named.field == field
    assert message in str(named)
    assert "; " in str(named)


@pytest.mark.parametrize("fields", [{"mixed": {"budget": 0}}, {"group_size": 48}, {"error": {"at_most": 0}}])
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        _spec(**fields)


def test_groups_by_bits() -> None:
    assert (_spec(precision="int4").group(4), _spec(precision="int8").group(8)) == (32, None)
    per_row = _spec(mixed={"budget": "1 MiB"}, group_size="per-row")
    assert (per_row.group(4), per_row.group(8)) == (None, None)
    assert _spec(precision="int8", group_size=64).group(8) == 64
