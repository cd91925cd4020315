"""YAML 1.2 text -> a tree of nodes that know their places, with limits counted while the text is parsed.

Only the core schema is read: mappings with text keys, lists, text, whole and decimal numbers, true and false, null.
Anchors, aliases, tags, merge keys, directives and several documents are refused: a spec has no use for them, and they
are what YAML bombs are made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml import events as ev
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from specs.schema.mistakes import Place

MAX_NODES = 10_000
MAX_DEPTH = 40
MAX_LINES = 20_000
MAX_LINE_LENGTH = 10_000
_MAX_FLAWS = 100
_MAX_DIGITS = 400

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_CONTROL = re.compile("[^\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass
class Node:
    """A value with its place. ``spoiled`` marks one that could not be read and already has its flaw."""

    kind: Literal["scalar", "list", "map"]
    place: Place
    value: Any = None
    items: list[Node] = field(default_factory=list)
    entries: dict[str, tuple[Place, Node]] = field(default_factory=dict)
    spoiled: bool = False


@dataclass(frozen=True)
class Flaw:
    """Something in the text that is refused, before any field is known."""

    place: Place
    message: str
    remedy: str
    value: str = ""


def core_scalar(text: str) -> Any:
    """A plain scalar by the core schema of YAML 1.2: ``1e-4`` is a number, ``no`` and ``on`` are text.

    Raises:
        ValueError: an infinite number, or one of too many digits.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _NOT_FINITE.fullmatch(text):
        raise ValueError("numbers are finite here")
    whole = next((base for pattern, base in ((_INT, 10), (_OCTAL, 8), (_HEX, 16)) if pattern.fullmatch(text)), None)
    if whole is not None or _FLOAT.fullmatch(text):
        if len(text) > _MAX_DIGITS:
            raise ValueError(f"the number has more than {_MAX_DIGITS} digits")
        if whole is not None:
            return int(text, whole)
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise ValueError("numbers are finite here")
        return number
    return text


def parse(text: str, file: str) -> tuple[Node | None, list[Flaw]]:
    """The tree of one document, and what was refused in it. The tree is None where the text cannot be read to its end.

    Args:
        text: the YAML.
        file: the name that places carry.
    """
    flaw = _unreadable(text, file)
    if flaw is not None:
        return None, [flaw]
    builder = _Builder(file)
    events = iter(YAML(typ="safe", pure=True).parse(text))
    try:
        return builder.document(events), builder.flaws
    except _Stop:
        return None, builder.flaws
    except MarkedYAMLError as error:
        return None, [*builder.flaws, _syntax(error, file, text)]
    except (YAMLError, ValueError, LookupError, AttributeError) as error:
        # ruamel raises some of these bare, for example on a directive with an absurd version.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return None, [*builder.flaws, Flaw(Place(file, 1, 1), f"not valid YAML: {reason}", "correct the text")]


def plain_data(text: str) -> Any:
    """The data of a short YAML text that we wrote ourselves, for example the example of a field.

    Raises:
        ValueError: the text is not what ``parse`` reads.
    """
    node, flaws = parse(text, "")
    if node is None or flaws:
        raise ValueError(f"{text!r}: {flaws[0].message if flaws else 'empty'}")
    return _plain(node)


def _plain(node: Node) -> Any:
    if node.kind == "list":
        return [_plain(item) for item in node.items]
    if node.kind == "map":
        return {key: _plain(value) for key, (_, value) in node.entries.items()}
    return node.value


def _unreadable(text: str, file: str) -> Flaw | None:
    """What makes the text unfit for the parser: control characters, lines too many or too long to parse quickly."""
    control = _CONTROL.search(text)
    if control is not None:
        return Flaw(
            _place_at(text, control.start(), file),
            f"control character U+{ord(control[0]):04X}",
            "remove it; a spec is plain text",
        )
    lines = text.split("\n")
    if len(lines) > MAX_LINES:
        return Flaw(Place(file, MAX_LINES + 1, 1), f"more than {MAX_LINES} lines", "a spec is written by a person")
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE_LENGTH:
            place = Place(file, number, MAX_LINE_LENGTH + 1)
            return Flaw(place, f"a line of more than {MAX_LINE_LENGTH} characters", "break the line")
    return None


def _place_at(text: str, offset: int, file: str) -> Place:
    before = text[:offset]
    return Place(file, before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1)


class _Stop(Exception):
    """The rest of the text is not worth reading."""


class _Builder:
    """Events -> nodes. Recursion is bounded by ``MAX_DEPTH``."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.flaws: list[Flaw] = []
        self.nodes = 0

    def flaw(self, event: Any, message: str, remedy: str, value: str = "") -> None:
        self.flaws.append(Flaw(self.place(event), message, remedy, value))
        if len(self.flaws) >= _MAX_FLAWS:
            raise _Stop

    def stop(self, event: Any, message: str, remedy: str) -> None:
        self.flaws.append(Flaw(self.place(event), message, remedy))
        raise _Stop

    def place(self, event: Any) -> Place:
        return Place(self.file, event.start_mark.line + 1, event.start_mark.column + 1)

    def document(self, events: Iterator[Any]) -> Node | None:
        root = None
        for event in events:
            if isinstance(event, ev.DocumentStartEvent):
                if root is not None:
                    self.stop(event, "a second document", "a spec is one document; leave out the `---`")
                if event.version not in (None, (1, 2)) or event.tags:
                    self.flaw(event, "YAML directives are refused", "leave out the lines that start with %")
                root = self.node(next(events), events, 1)
                if root.kind == "map":
                    root.spoiled = False  # its tag is told, and what it holds is judged all the same
        if root is not None and root.kind == "scalar" and root.value is None and not self.flaws:
            return None
        return root

    def node(self, event: Any, events: Iterator[Any], depth: int) -> Node:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self.stop(event, f"more than {MAX_NODES} values", "a spec is written by a person; make it smaller")
        if depth > MAX_DEPTH:
            self.stop(event, f"nested more than {MAX_DEPTH} deep", "no field of a spec is nested so deep")
        place = self.place(event)
        if isinstance(event, ev.AliasEvent):
            self.flaw(event, f"the alias *{event.anchor} is refused", "write the value out")
            return Node("scalar", place, spoiled=True)
        if event.anchor is not None:
            self.flaw(event, f"the anchor &{event.anchor} is refused", "write the value out where it is needed")
        tag = event.tag if event.tag is None or isinstance(event.tag, str) else str(event.tag)
        if tag is not None:
            self.flaw(event, f"the tag {tag} is refused", "leave it out; the field knows its type")
        if isinstance(event, ev.ScalarEvent):
            return self.scalar(event, tag)
        if isinstance(event, ev.SequenceStartEvent):
            node = Node("list", place, spoiled=tag is not None)
            while not isinstance(inner := next(events), ev.SequenceEndEvent):
                node.items.append(self.node(inner, events, depth + 1))
            return node
        node = Node("map", place, spoiled=tag is not None)
        while not isinstance(key := next(events), ev.MappingEndEvent):
            self.entry(node, key, events, depth)
        return node

    def scalar(self, event: Any, tag: str | None) -> Node:
        node = Node("scalar", self.place(event), event.value, spoiled=tag is not None)
        if event.style is None and tag is None:
            try:
                node.value = core_scalar(event.value)
            except ValueError as error:
                self.flaw(event, str(error), "write an ordinary number", event.value[:40])
                node.spoiled = True
        return node

    def entry(self, mapping: Node, key_event: Any, events: Iterator[Any], depth: int) -> None:
        key = self.node(key_event, events, depth + 1)
        value_event = next(events)
        value = self.node(value_event, events, depth + 1)
        if isinstance(value_event, ev.ScalarEvent) and value_event.value == "" and value_event.style is None:
            value.place = key.place  # ruamel puts a value that is not there at the next thing that is
        if key.spoiled:
            return
        name = key.value
        if name == "<<" and key_event.style is None:
            self.flaw(key_event, "merge keys (<<) are refused", "write the keys out")
        elif key.kind != "scalar":
            self.flaw(key_event, "a key that is a list or a mapping", "keys are text")
        elif not isinstance(name, str):
            written = key_event.value or "nothing"
            self.flaw(key_event, f"the key {written} is not text", f'keys are text; write for example "{written}"')
        elif name in mapping.entries:
            first = mapping.entries[name][0]
            self.flaw(
                key_event, f"the key {name!r} stands twice, first at {first.line}:{first.column}", "keep one of the two"
            )
        else:
            mapping.entries[name] = (key.place, value)


def _syntax(error: MarkedYAMLError, file: str, text: str) -> Flaw:
    problem = str(error.problem or error.context or "unreadable")
    mark = error.problem_mark or error.context_mark
    place = Place(file, mark.line + 1, mark.column + 1) if mark is not None else Place(file, 1, 1)
    context = str(error.context or "")
    start = (
        f" (it starts at {error.context_mark.line + 1}:{error.context_mark.column + 1})" if _has_start(error) else ""
    )
    line = text.split("\n")[mark.line] if mark is not None else ""
    if "flow" in context and "${" in line:
        return Flaw(place, "not valid YAML: ${…} inside brackets", "put text that holds ${…} in quotes")
    if "'\\t'" in problem:
        return Flaw(place, "not valid YAML: a tab", "indent with spaces")
    if "mapping values are not allowed" in problem:
        return Flaw(
            place, "not valid YAML: a `:` where none may stand", "put text that holds `: ` in quotes, and align"
        )
    if "cannot start any token" in problem:
        mark_char = problem.split("'")[1] if "'" in problem else ""
        return Flaw(place, f"not valid YAML: text cannot start with {mark_char}", "put the text in quotes")
    if "quoted scalar" in context:
        return Flaw(place, f"not valid YAML: a quote is not closed{start}", "close the quote")
    if "flow" in context:
        return Flaw(place, f"not valid YAML: a bracket is not closed or a comma is missing{start}", "close the bracket")
    if "block" in context:
        return Flaw(place, f"not valid YAML: the indentation does not fit{start}", "align the keys of one mapping")
    if "could not find expected ':'" in problem:
        return Flaw(
            place, f"not valid YAML: a key without `:`{start}", "write `key: value`, with a space after the colon"
        )
    return Flaw(place, f"not valid YAML: {problem}", "correct the text here")


def _has_start(error: MarkedYAMLError) -> bool:
    return error.context_mark is not None and error.context_mark is not error.problem_mark
