"""The JSON Schema of a spec, for editors: draft 7, which they all read."""

from __future__ import annotations

import json
from typing import Any

from specs.schema.pipeline import PipelineSpec
from specs.schema.yaml_tree import plain_data


def json_schema() -> dict[str, Any]:
    """The schema of the whole spec, steps told apart by ``oneOf`` on ``uses``.

    Departs from what pydantic generates: ``definitions`` and no ``discriminator``, both as draft 7 has it; a reference
    with a description is wrapped, since draft 7 drops what stands beside ``$ref``; examples are values, not YAML text.
    """
    generated = PipelineSpec.model_json_schema(by_alias=True, mode="validation")
    definitions = {name: _definition(_draft7(schema)) for name, schema in generated.pop("$defs").items()}
    root = _definition(_draft7(generated))
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Lathe spec"}
    return {**head, **{key: value for key, value in root.items() if key != "title"}, "definitions": definitions}


def schema_text() -> str:
    """The schema as ``lathe schema`` prints it and ``specs/schema.json`` holds it."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _draft7(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_draft7(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, value in schema.items():
        if key == "discriminator":
            continue
        if key == "$ref":
            result[key] = value.replace("#/$defs/", "#/definitions/")
        elif key == "examples":
            result[key] = [plain_data(example) if isinstance(example, str) else example for example in value]
        else:
            result[key] = _draft7(value)
    if "$ref" in result and len(result) > 1:
        result["allOf"] = [{"$ref": result.pop("$ref")}]
    return result


def _definition(schema: dict[str, Any]) -> dict[str, Any]:
    """A model: its docstring on one line, no made-up titles on its fields, and ``uses`` described by the model."""
    schema["description"] = " ".join(schema.get("description", "").replace("``", "`").split())
    for name, field in schema.get("properties", {}).items():
        field.pop("title", None)
        if name == "uses":
            field["description"] = schema["description"]
    return schema
