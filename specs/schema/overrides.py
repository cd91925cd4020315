"""``--set a.b=value``: changes to a spec from the command line, made in its tree so that places stay true."""

from __future__ import annotations

from dataclasses import dataclass

from specs.schema.mistakes import Place
from specs.schema.suggest import nearest
from specs.schema.yaml_tree import Flaw, Node, parse

Path = tuple[str | int, ...]

ALTERNATIVES: dict[Path, str] = {
    ("model", "source"): "config",
    ("model", "config"): "source",
    ("schedule", "cron"): "interval",
    ("schedule", "interval"): "cron",
}
"""Of each of these pairs a spec has one; setting it takes the place of the other."""


@dataclass(frozen=True)
class Change:
    """One override: where in the spec it lands and what it sets."""

    path: Path
    node: Node


def apply(root: Node, overrides: tuple[str, ...]) -> tuple[list[Change], list[Flaw]]:
    """Set the values in the tree, in order; a later one wins.

    Steps are named by their id or their number from 0 (``steps.student.epochs=3``), gates by their number. The value is
    YAML: ``steps.s.needs=[a]`` sets a list, an empty value sets null.

    Args:
        root: the tree of the spec; changed in place.
        overrides: ``dotted.key=value`` each.
    """
    changes, flaws = [], []
    for override in overrides:
        try:
            changes.append(_apply(root, override))
        except _Refused as refused:
            flaws.extend(refused.flaws)
    return changes, flaws


class _Refused(Exception):
    def __init__(self, *flaws: Flaw) -> None:
        self.flaws = flaws


def _apply(root: Node, override: str) -> Change:
    place = Place(f"--set {override if len(override) <= 80 else override[:80] + '…'}")
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise _Refused(Flaw(place, "not an override", "write key=value, for example steps.student.epochs=3"))
    value = _value(text, place)
    path: Path = ()
    node = root
    while parts:
        here = ".".join(map(str, path))
        if node.kind == "scalar" and node.value is None:
            node.kind = "map"
        if node.kind == "list":
            index, parts = _index(node, parts, place, here)
            path += (index,)
            if not parts:
                node.items[index] = value
            node = node.items[index]
        elif node.kind == "map":
            key = parts.pop(0)
            path += (key,)
            if not parts:
                node.entries[key] = (place, value)
            elif key not in node.entries:
                node.entries[key] = (place, Node("map", place))
            node = node.entries[key][1]
        else:
            raise _Refused(Flaw(place, f"{here} is a single value and has no {parts[0]!r}", f"write {here}=…"))
    _replace_alternative(root, path, value)
    return Change(path, value)


def _replace_alternative(root: Node, path: Path, value: Node) -> None:
    other = ALTERNATIVES.get(path[:2])
    if other is not None and (value.kind != "scalar" or value.value is not None):
        root.entries[str(path[0])][1].entries.pop(other, None)


def _value(text: str, place: Place) -> Node:
    node, flaws = parse(text, place.file)
    if node is None and not flaws:
        return Node("scalar", place)
    if flaws or node is None:
        raise _Refused(*(Flaw(place, flaw.message, flaw.remedy, flaw.value) for flaw in flaws))
    _replace_places(node, place)
    return node


def _replace_places(node: Node, place: Place) -> None:
    node.place = place
    for item in node.items:
        _replace_places(item, place)
    for key, (_, value) in node.entries.items():
        node.entries[key] = (place, value)
        _replace_places(value, place)


def _index(node: Node, parts: list[str], place: Place, here: str) -> tuple[int, list[str]]:
    """The entry that ``parts`` begin with, and the parts behind it. An id may hold dots; the longest one wins."""
    ids = [str(item.entries["id"][1].value) if "id" in item.entries else "" for item in node.items]
    for count in range(len(parts), 0, -1):
        if ".".join(parts[:count]) in ids:
            return ids.index(".".join(parts[:count])), parts[count:]
    part = parts[0]
    if part.isascii() and part.isdigit() and len(part) < 6:
        if int(part) < len(node.items):
            return int(part), parts[1:]
        raise _Refused(Flaw(place, f"{here} has {len(node.items)} entries", "they are counted from 0"))
    known = [name for name in ids if name] or [str(number) for number in range(len(node.items))]
    raise _Refused(Flaw(place, f"{here} has no {part!r}", nearest(part, known)))
