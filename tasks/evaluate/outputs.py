"""What an artifact makes of the first evaluation examples, as text: kept beside its evaluation, compared in reports."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "outputs.json"
VERSION = 1

SHOWN = 10
"""Changed examples that a report shows at most."""
UNCHANGED = 3
"""Examples that a report shows where fewer changed."""

_LONGEST = 600
"""Characters of a text that are kept."""


@dataclass(frozen=True)
class Example:
    """One input with what came out before and after a step; ``before`` is None where there is nothing before."""

    input: str
    expected: str | None
    before: str | None
    after: str
    probability: float | None = None

    @property
    def changed(self) -> bool:
        return self.before is not None and self.before != self.after


@dataclass(frozen=True)
class Changes:
    """Examples of a step, those that changed first.

    Args:
        examples: those that are shown.
        against: the step whose outputs are the ones before; empty where there is none.
        changed: how many outputs differ.
        total: of how many.
    """

    examples: tuple[Example, ...]
    against: str = ""
    changed: int = 0
    total: int = 0


def write(folder: Path, outputs: Sequence[Mapping[str, Any]]) -> None:
    """Keep ``input``, ``expected``, ``output`` and where there is one ``probability`` of each example."""
    kept = [
        {
            name: value[:_LONGEST] + "…" if isinstance(value, str) and len(value) > _LONGEST else value
            for name, value in one.items()
        }
        for one in outputs
    ]
    text = json.dumps({"version": VERSION, "examples": kept}, ensure_ascii=False, allow_nan=False)
    (folder / FILE).write_text(text.encode("utf-8", "replace").decode() + "\n", encoding="utf-8")


def read(folder: Path) -> list[dict[str, Any]]:
    """The outputs that an evaluation kept; none where the folder is gone, as after a cleaning of the store."""
    try:
        return json.loads((folder / FILE).read_bytes())["examples"]
    except (OSError, ValueError, KeyError):
        return []


def compare(after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]], against: str) -> Changes:
    """What changed, by example; those on other inputs than before are not compared."""
    same = [one["input"] for one in before] == [one["input"] for one in after]
    pairs = list(_paired(after, before if same else ()))
    changed = [example for example in pairs if example.changed]
    kept = [example for example in pairs if not example.changed][: max(0, UNCHANGED - len(changed))]
    return Changes((*changed[:SHOWN], *kept), against if same else "", len(changed), len(pairs))


def _paired(after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> Iterator[Example]:
    for place, one in enumerate(after):
        old = before[place]["output"] if before else None
        yield Example(one["input"], one.get("expected"), old, one["output"], one.get("probability"))
