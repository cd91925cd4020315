"""Every kind of step is documented from its class."""

from __future__ import annotations

from typing import Literal

import pytest

from specs.schema.base import Needs
from specs.schema.describe import describe, in_words, kinds
from specs.schema.pipeline import KINDS
from specs.schema.steps.finetune import TrainingSpec
from specs.schema.units import Bytes, Duration, Share


def test_every_kind_is_there() -> None:
    assert [doc.name for doc in kinds()] == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_documented(kind: str) -> None:
    doc = describe(kind)
    assert doc.summary
    assert doc.text.startswith(doc.summary)
    assert {field.name for field in doc.fields} == {
        field.alias or name for name, field in KINDS[kind].model_fields.items() if name != "uses"
    }
    for field in doc.fields:
        assert field.description, field.name
        assert field.default, field.name
        assert "[" not in field.type, field.type


def test_fields_in_plain_words() -> None:
    fields = {field.name: field for field in describe("prune").fields}
    assert fields["id"].default == "required"
    methods = "threshold | magnitude | movement | wanda | sparsegpt | width | depth | vocabulary"
    assert fields["method"].type == methods
    assert fields["method"].default == "magnitude"
    assert fields["sparsity"].type == "share, e.g. 50%"
    assert fields["recover"].type == f"mapping of {len(TrainingSpec.model_fields)} fields, see finetune"
    assert fields["retry_delay"].default == "5 s"
    training = {field.name: field.default for field in describe("finetune").fields}
    assert (training["warmup"], training["validation"], training["save_every"]) == ("10%", "5%", "30 s")
    assert (training["batch_size"], training["weight_decay"], training["evaluate"]) == ("32", "0.01", "true")
    assert (describe("quantize").takes, describe("quantize").gives) == (
        "model or swapped",
        "packed or model or swapped",
    )
    assert "from" in {field.name for field in describe("select").fields}


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "whole number"),
        (int | None, "whole number"),
        (float, "number"),
        (bool, "true or false"),
        (Bytes, "size, e.g. 8 MiB"),
        (Bytes | None, "size, e.g. 8 MiB"),
        (Duration, "duration, e.g. 10 min"),
        (Share | None, "share, e.g. 50%"),
        (Needs | None, "step or list of steps"),
        (tuple[str, ...], "list of text"),
        (Literal["a", "b"] | None, "a | b"),
        (int | str, "whole number or text"),
        (dict[str, int], "mapping"),
    ],
)
def test_types_in_words(hint: object, words: str) -> None:
    assert in_words(hint) == words
