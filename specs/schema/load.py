"""YAML -> PipelineSpec; every mistake at once, each with file, line and column."""

from __future__ import annotations

import os
import re
import stat
from codecs import BOM_UTF8
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from glob import iglob
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from specs.schema import check, outline, overrides
from specs.schema.base import TASKS, Task
from specs.schema.explain import Explained, explain_all, false_friend, field_of, locate, misplaced
from specs.schema.mistakes import Mistake, Place, SpecErrors, shown
from specs.schema.pipeline import KINDS, SCHEME, PipelineSpec, parallel_files
from specs.schema.redaction import is_fixed, redact
from specs.schema.suggest import nearest
from specs.schema.yaml_tree import Flaw, Node, parse

__all__ = ["LoadedSpec", "Mistake", "Positions", "SpecErrors", "load"]

MAX_BYTES = 2**20
_MOST_MISTAKES = 500
_LONGEST_MESSAGE = 400

KeyPath = tuple[str | int, ...]

_VARIABLE = re.compile(r"\$(\$)?\{([^{}]*)(\})?")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SPOILED = object()
"""Stands for a value that could not be read: no field takes it, so that nothing is concluded from its absence."""

_PATHS: tuple[KeyPath, ...] = (("model", "source"), ("model", "tokenizer"), ("data", "train"), ("data", "eval"))


@dataclass
class Positions:
    """Where each key and each value of a spec stands, by its path, for example ``("steps", 0, "epochs")``."""

    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)

    def value(self, path: KeyPath) -> Place:
        """The place of a value, or of the nearest thing around it."""
        while path not in self.values:
            path = path[:-1]
        return self.values[path]

    def key(self, path: KeyPath) -> Place:
        """The place of a key, or of its value where it has none (the entries of a list)."""
        return self.keys.get(path) or self.value(path)


@dataclass(frozen=True)
class LoadedSpec:
    """A spec that holds together.

    Args:
        path: the file, absolute.
        text: the file as it stands; overrides and the environment are not in it.
        spec: what it says, overrides applied, ``${VAR}`` replaced, paths absolute.
        positions: where each field stands.
        variables: names of the environment variables whose values it holds as free text. Numbers and choices, files and
            folders are no secrets, and masking them would garble every record.
    """

    path: Path
    text: str
    spec: PipelineSpec
    positions: Positions = field(repr=False)
    variables: frozenset[str]

    @property
    def secrets(self) -> frozenset[str]:
        """What must be kept out of logs and reports (see ``redact``)."""
        return secrets_of(self.variables)

    def redact(self, text: str) -> str:
        """``text`` without any value that came from the environment."""
        return redact(text, self.secrets)


def secrets_of(variables: Iterable[str]) -> frozenset[str]:
    """The values of environment variables, by their names."""
    return frozenset(os.environ[name] for name in variables if os.environ.get(name))


def load(path: Path, overrides: Sequence[str] = ()) -> LoadedSpec:
    """Read and check a spec. No model and no data file is opened.

    Args:
        path: the YAML file.
        overrides: ``dotted.key=value`` each, applied in order before anything is checked.

    Raises:
        SpecErrors: every mistake of the file, in the order of their places.
    """
    text = _read(path)
    root, flaws = parse(text, str(path))
    if root is None or root.kind != "map":
        if root is not None and not root.spoiled:
            example = "write `name:`, `task:`, `model:`, `data:` and `steps:`"
            flaws.append(Flaw(root.place, "a spec is a mapping of keys to values", example, shown(root.value)))
        if not flaws:
            flaws.append(Flaw(Place(str(path), 1, 1), "the file is empty", "`lathe init` writes a spec to start from"))
        raise SpecErrors(
            [_of_flaw(flaw) for flaw in sorted(flaws, key=lambda flaw: (flaw.place.line, flaw.place.column))]
        )
    return _Loader(path, text, root, flaws).load(overrides)


def _read(path: Path) -> str:
    try:
        _refuse_all_but_files(path, path.stat().st_mode)
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            _refuse_all_but_files(path, os.fstat(file.fileno()).st_mode)
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _refusal(path, "no such file", _neighbours(path)) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _refusal(path, f"cannot be read: {reason}", "name a readable file") from None
    if len(raw) > MAX_BYTES:
        raise _refusal(path, f"larger than {MAX_BYTES // 2**20} MiB", "a spec is a page of text")
    try:
        raw = raw.removeprefix(BOM_UTF8)
        return raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        before = raw[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        text = f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise SpecErrors([_of_flaw(Flaw(Place(str(path), line, column), text, "save the file as UTF-8"))]) from None


def _refuse_all_but_files(path: Path, mode: int) -> None:
    """Refuse what has no end, or makes its reader wait: pipes, sockets, devices. Folders go by their own name."""
    if stat.S_ISDIR(mode):
        raise _refusal(path, "a folder, not a file", _neighbours(path / "spec.yaml"))
    if not stat.S_ISREG(mode):
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise _refusal(path, f"a {kind}, not a file", "save the spec to a file and name that")


def _refusal(path: Path, message: str, remedy: str) -> SpecErrors:
    return SpecErrors([_of_flaw(Flaw(Place(str(path)), message, remedy))])


def _neighbours(path: Path) -> str:
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))[:20]
    except OSError:
        return f"there is no folder {str(path.parent)!r}"
    return nearest(path.name, names) if names else f"{path.parent} holds no .yaml file"


def _of_flaw(flaw: Flaw) -> Mistake:
    return Mistake(flaw.place.file, flaw.place.line, flaw.place.column, "", flaw.value, flaw.message, flaw.remedy)


class _Loader:
    """The state of one load: the tree, what it became, and the mistakes so far."""

    def __init__(self, path: Path, text: str, root: Node, flaws: list[Flaw]) -> None:
        self.path = path
        self.text = text
        self.root = root
        self.mistakes = [_of_flaw(flaw) for flaw in flaws]
        self.positions = Positions()
        self.raw: dict[KeyPath, Any] = {}
        self.spoiled: set[KeyPath] = set()
        self.variables: dict[str, list[KeyPath]] = {}
        self.data: Any = None

    def load(self, changes: Sequence[str]) -> LoadedSpec:
        changed, flaws = overrides.apply(self.root, tuple(changes))
        self.mistakes.extend(_of_flaw(flaw) for flaw in flaws)
        self.data = self.plain(self.root, ())
        self.absolute_paths({change.path for change in changed})
        spec = None
        try:
            spec = PipelineSpec.model_validate(self.data, by_alias=True, by_name=False)
        except ValidationError as error:
            entries = error.errors(include_url=False, include_input=False)[:_MOST_MISTAKES]
            for explained in explain_all(entries, self.data):
                self.add(explained)
        task: Task | None = next((known for known in TASKS if known == self.data.get("task")), None)
        wrongs = [false_friend(path, value, self.data) for path, value in self.raw.items()]
        wrongs += [misplaced(path, self.raw.get(path, {}), self.data, task) for path in self.positions.values if path]
        for wrong in filter(None, wrongs):
            self.add(wrong)
        self.check_graph(task)
        if self.mistakes or spec is None:
            raise SpecErrors(self.sorted())
        return LoadedSpec(self.path.absolute(), self.text, spec, self.positions, self.secret_variables())

    def secret_variables(self) -> frozenset[str]:
        """The variables that stand in free text, files and folders aside: masking a path would garble the records."""
        return frozenset(
            name
            for name, paths in self.variables.items()
            if any(_takes_text(path, self.data) for path in paths) and not os.path.lexists(os.environ[name])
        )

    def plain(self, node: Node, path: KeyPath) -> Any:
        """The data of a node; fills the positions, and replaces ``${VAR}`` in text."""
        self.positions.values[path] = node.place
        if node.spoiled:
            self.spoiled.add(path)
            return _SPOILED
        if node.kind == "list":
            return [self.plain(item, (*path, number)) for number, item in enumerate(node.items)]
        if node.kind == "map":
            data = {}
            for key, (place, value) in node.entries.items():
                self.positions.keys[(*path, key)] = place
                data[key] = self.plain(value, (*path, key))
            return data
        self.raw[path] = node.value
        return self.expand(node.value, path) if isinstance(node.value, str) else node.value

    def expand(self, text: str, path: KeyPath) -> str | None:
        """``text`` with every ``${VAR}`` replaced; ``$${`` stands for ``${``."""

        def replace(match: re.Match[str]) -> str:
            escaped, name, closed = match[1], match[2], match[3]
            if escaped:
                return match[0][1:]
            if is_fixed(path):
                setting = ".".join(map(str, path))
                remedy = f"write the value itself, or give it with the command: --set {setting}=VALUE"
                wrongs.append(("takes nothing from the environment", remedy))
                self.variables.setdefault(name, []).append(path)
                return os.environ.get(name, "")
            elif not closed or not _VARIABLE_NAME.fullmatch(name):
                wrongs.append(("`${` does not begin the name of a variable", "write ${NAME}, or $${ for a plain ${"))
            elif name not in os.environ:
                near = nearest(name, os.environ)
                hint = near if near.startswith("did you mean") else f"run `export {name}=…` first"
                wrongs.append((f"the environment has no variable {name}", hint))
            else:
                self.variables.setdefault(name, []).append(path)
                return os.environ[name]
            return ""

        wrongs: list[tuple[str, str]] = []
        result = _VARIABLE.sub(replace, text)
        for message, remedy in wrongs:
            self.add(Explained(path, message, remedy))
        if wrongs:
            self.spoiled.add(path)
        return result

    def absolute_paths(self, changed: set[KeyPath]) -> None:
        for path in (*_PATHS, *self.sources_of_steps()):
            section = self.data
            for part in path[:-1]:
                section = section[part] if isinstance(section, list) else section.get(part)  # type: ignore[index]
            value = section.get(path[-1]) if isinstance(section, dict) else None
            if not isinstance(value, str) or not value.strip() or "\0" in value:
                continue
            from_command_line = any(path[: len(other)] == other for other in changed)
            section[path[-1]] = self.absolute(value, path[0] == "model", from_command_line)

    def sources_of_steps(self) -> list[KeyPath]:
        """The fields of steps that name data."""
        steps = self.data.get("steps")
        listed = enumerate(steps if isinstance(steps, list) else ())
        known = [(at, step.get("uses")) for at, step in listed if isinstance(step, dict)]
        kinds = [(at, KINDS[uses]) for at, uses in known if isinstance(uses, str) and uses in KINDS]
        return [("steps", at, name) for at, kind in kinds for name in kind.sources]

    def absolute(self, value: str, is_model: bool, from_command_line: bool) -> str:
        """A path made absolute; a hub id, ``hub:`` and ``builtin:`` stay as they are."""
        if not is_model and SCHEME.match(value):
            return value
        folders = [Path.cwd(), self.path.absolute().parent] if from_command_line else [self.path.absolute().parent]
        expanded = os.path.expanduser(value)
        candidates = [os.path.normpath(folder / expanded) for folder in folders]
        if not is_model:
            return next((c for c in candidates[:-1] if _data_is_there(c)), candidates[-1])
        found = next((c for c in candidates if os.path.isdir(c)), None)
        if found is None and not value.startswith(("./", "../", "/", "~")) and value not in (".", ".."):
            return value
        return found or candidates[-1]

    def add(self, wrong: Explained) -> None:
        path = wrong.path
        if any(path[: len(spoiled)] == spoiled for spoiled in self.spoiled):
            return
        if wrong.of_whole and any(spoiled[: len(path)] == path for spoiled in self.spoiled):
            return  # it may only follow from what could not be read
        place = self.positions.key(path) if wrong.at_key else self.positions.value(path)
        value = "" if wrong.at_key else shown(self.raw.get(path))
        mistake = Mistake(
            place.file,
            place.line,
            place.column,
            self.name(path),
            value,
            redact(wrong.message, secrets_of(self.variables))[:_LONGEST_MESSAGE],
            redact(wrong.remedy, secrets_of(self.variables))[:_LONGEST_MESSAGE],
        )
        same = (other for other in self.mistakes if (other.field, other.message) == (mistake.field, mistake.message))
        if next(same, None) is None:
            self.mistakes.append(mistake)

    def name(self, path: KeyPath) -> str:
        """The dotted name of a field; a step goes by its id."""
        name = ""
        for number, part in enumerate(path):
            if isinstance(part, str):
                name += f".{part}" if name else part
                continue
            id = self.raw.get((*path[: number + 1], "id")) if path[:number] == ("steps",) else None
            name += f".{id}" if isinstance(id, str) and id else f"[{part}]"
        return name

    def check_graph(self, task: Task | None) -> None:
        """The mistakes between steps, gates and tracking, as far as they could be read one by one."""
        found = check.survey(task, outline.steps(self.data))
        tracking = self.data.get("tracking")
        register_step = tracking.get("register_step") if isinstance(tracking, dict) else None
        for problem in found.problems + check.check_metrics(
            found, task, outline.gates(self.data), register_step if isinstance(register_step, str) else None
        ):
            path = locate(problem.path, self.data)[0] if problem.path[0] != "steps" else self.nearest_path(problem.path)
            self.add(Explained(path, problem.message, problem.remedy))

    def nearest_path(self, path: KeyPath) -> KeyPath:
        while path not in self.positions.values:
            path = path[:-1]
        return path

    def sorted(self) -> list[Mistake]:
        return sorted(self.mistakes, key=lambda m: (m.file != str(self.path), m.file, m.line, m.column))


def _data_is_there(source: str) -> bool:
    """Whether a path, a glob or both of two parallel files exist."""
    names = parallel_files(source) or (source,)
    return all(os.path.lexists(name) or next(iglob(name, recursive=True), None) is not None for name in names)


def _takes_text(path: KeyPath, data: Any) -> bool:
    """Whether any text will do at ``path``; numbers and choices are no secrets, and are found all over the records."""
    field = field_of(path, data)
    return field is None or str in _types(field.annotation)


def _types(annotation: Any) -> list[Any]:
    parts = () if get_origin(annotation) is Literal else get_args(annotation)
    return [annotation, *(inner for part in parts for inner in _types(part))]
