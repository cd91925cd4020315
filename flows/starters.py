"""The specs that `lathe init` writes: copies of the shipped ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from shlex import quote

import specs
from specs.schema.base import Task

PACKAGE = Path(specs.__file__).resolve().parent
SCHEMA = "lathe-schema.json"
"""The copy of the schema beside a spec that lies outside of the project."""

STARTERS: dict[Task, str] = {
    "text-generation": "text-generation.yaml",
    "text-classification": "sentiment.yaml",
    "translation": "translation.yaml",
    "speech-recognition": "speech.yaml",
}
"""The shipped spec of each task."""


def starter(task: Task, path: Path) -> str:
    """The spec for ``task`` as it is written to ``path``; its first line tells editors where the schema is."""
    folder = path.absolute().parent
    schema = os.path.relpath(PACKAGE / "schema.json", folder) if _inside(folder) else SCHEMA
    _, rest = (PACKAGE / STARTERS[task]).read_text(encoding="utf-8").split("\n", 1)
    rest = rest.replace(f"specs/{STARTERS[task]}", quote(str(path)))  # the commands in the comments are for this file
    return f"# yaml-language-server: $schema={schema}\n{rest}"


def place_schema(path: Path) -> Path | None:
    """Put a copy of the schema beside the spec ``path``, so that the two can move to another machine.

    Returns:
        The copy; None where the spec lies in the project, or where another file has the name.

    Raises:
        OSError: it cannot be written.
    """
    copy = path.parent / SCHEMA
    text = (PACKAGE / "schema.json").read_text(encoding="utf-8")
    if _inside(path.absolute().parent) or (copy.exists() and not _is_schema(copy, json.loads(text)["title"])):
        return None
    copy.write_text(text, encoding="utf-8")
    return copy


def _inside(folder: Path) -> bool:
    return folder.is_relative_to(PACKAGE.parent)


def _is_schema(file: Path, title: str) -> bool:
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("title") == title
    except (ValueError, AttributeError):
        return False
