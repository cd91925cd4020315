"""The published schema: an editor can use it, it is the one on disk, and it agrees with the loader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from ruamel.yaml import YAML

import specs
from specs.schema.graph import build
from specs.schema.load import load
from specs.schema.pipeline import KINDS
from specs.schema.publish import json_schema, schema_text
from tests.specs.writing import GOOD

FOLDER = Path(specs.__file__).parent
SHIPPED = sorted(FOLDER.glob("*.yaml"))
SCHEMA = json_schema()


def _plain(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def _properties(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, model in {"spec": schema, **schema["definitions"]}.items():
        for key, field in model.get("properties", {}).items():
            yield f"{name}.{key}", field


def test_the_file_is_what_the_command_prints() -> None:
    assert (FOLDER / "schema.json").read_text(encoding="utf-8") == schema_text(), (
        "run: lathe schema > specs/schema.json"
    )


def test_it_is_draft_7_and_whole() -> None:
    Draft7Validator.check_schema(SCHEMA)
    text = schema_text()
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert SCHEMA["title"]
    assert "$defs" not in text
    assert "discriminator" not in text


def test_every_shipped_spec_is_there() -> None:
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_specs_hold_for_the_loader_and_the_schema(path: Path) -> None:
    loaded = load(path)
    assert len(build(loaded.spec)) == len(loaded.spec.steps) + 1
    errors = [
        f"{error.json_path}: {error.message}" for error in Draft7Validator(SCHEMA).iter_errors(_plain(loaded.text))
    ]
    assert errors == []
    assert loaded.text.splitlines()[0] == "# yaml-language-server: $schema=schema.json"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("epochs: 2", "epoch: 2"),
        ("epochs: 2", "epochs: two"),
        ("uses: prune", "uses: prun"),
        ("sparsity: 50%", "sparsity: 50 parts"),
        ("int4-block32", "int4-block31"),
        ("metric: accuracy", "metric: acuracy"),
        ("minimise: latency_p50", "minimise: latency"),
        ("name: sentiment", "name: 5"),
        ("  eval: ../dev.jsonl\n", ""),
        ("from: [", "from_: ["),
        ("register: minilm", "register_: minilm"),
    ],
)
def test_the_schema_sees_what_the_loader_sees(old: str, new: str) -> None:
    validator = Draft7Validator(SCHEMA)
    assert validator.is_valid(_plain(GOOD))
    assert GOOD.count(old) == 1
    assert not validator.is_valid(_plain(GOOD.replace(old, new)))


def test_every_key_has_a_description_and_a_default_or_is_required() -> None:
    for name, field in _properties(SCHEMA):
        assert len(field.get("description", "")) > 5, name
        model = SCHEMA if name.startswith("spec.") else SCHEMA["definitions"][name.split(".")[0]]
        assert ("default" in field) != (name.split(".")[1] in model.get("required", [])), name


def test_quantities_name_their_unit() -> None:
    units = ("example", "%", " s", "share", "size", "duration")
    for name, field in _properties(SCHEMA):
        if "pattern" in json.dumps(field) and "a-z" not in json.dumps(field).lower():
            assert any(unit in field["description"] for unit in units), name


def test_examples_are_values_that_the_schema_accepts() -> None:
    seen = 0
    for name, field in _properties(SCHEMA):
        for example in field.get("examples", []):
            seen += 1
            schema = {**field, "definitions": SCHEMA["definitions"]}
            assert Draft7Validator(schema).is_valid(example), f"{name}: {example!r}"
    assert seen >= 8


def test_steps_are_told_apart_by_uses() -> None:
    choices = SCHEMA["properties"]["steps"]["items"]["oneOf"]
    names = [choice["$ref"].removeprefix("#/definitions/") for choice in choices]
    assert [SCHEMA["definitions"][name]["properties"]["uses"]["const"] for name in names] == list(KINDS)
    assert all(SCHEMA["definitions"][name]["additionalProperties"] is False for name in names)


def test_no_description_is_lost_beside_a_reference() -> None:
    def walk(part: Any) -> Iterator[dict[str, Any]]:
        if isinstance(part, dict):
            yield part
            part = list(part.values())
        if isinstance(part, list):
            for inner in part:
                yield from walk(inner)

    assert all(len(part) == 1 for part in walk(SCHEMA) if "$ref" in part)
