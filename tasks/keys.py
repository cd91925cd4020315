"""Keys: what made an artifact. The same recipe gives the same key, and then there is no work to do."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from specs.schema.base import StepSpec
from tasks.context import StepError
from tasks.registry import RegisteredStep

RECIPE_VERSION = 1

_NOT_HASHED = {"id", "needs", "retries", "retry_delay", "timeout", "evaluate", "from_", "teacher"}
"""Fields of a step that cannot shape its result; the inputs enter by their keys instead of by their
names, and so does the content of what ``sources`` name."""

_PLUMBING = {
    "tasks.artifacts",
    "tasks.context",
    "tasks.events",
    "tasks.journal",
    "tasks.keys",
    "tasks.registry",
    "tasks.run_step",
    "tasks.supervise",
    "tasks.tracking",
    "tasks.worker",
}
"""Modules that carry steps out but cannot shape what a step makes; what only they import is left out too."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_ABSENT = object()


def canonical_json(obj: Any) -> str:
    """The one JSON text of ``obj``: sorted keys, no spaces, ASCII.

    Raises:
        TypeError: a value or a mapping's key that JSON cannot say as it is.
        ValueError: NaN or an infinity.
    """
    return json.dumps(_plain(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        for key in obj:
            if not isinstance(key, str):
                raise TypeError(f"{key!r} cannot name a JSON field: it is a {type(key).__name__}, not a string")
        return {key: _plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    return obj


def digest_json(obj: Any) -> str:
    """SHA-256 of ``canonical_json(obj)`` in hex; a tuple counts as a list.

    Raises:
        TypeError, ValueError: see ``canonical_json``.
    """
    return hashlib.sha256(canonical_json(obj).encode("ascii")).hexdigest()


def source_digest(function: Callable[..., Any]) -> str:
    """One digest over ``source_modules(function)``."""
    return digest_json(source_modules(function))


def source_modules(function: Callable[..., Any]) -> dict[str, str]:
    """Digest of the source of every module that can shape what ``function`` does.

    These are the function's own module and every module under ``tasks`` (and under the function's own top-level
    package) that it imports, transitively and wherever the import stands, less the plumbing that only carries steps
    out. Nothing is imported to find them. A string that is exactly the dotted name of such a module counts as an
    import, because children are started as ``python -m NAME``. The digest is that of the syntax tree: comments and
    layout do not matter, docstrings do.

    Raises:
        StepError: the function's source cannot be found, for example in an interactive session.
    """
    function = inspect.unwrap(function)
    own = function.__module__
    file = getattr(sys.modules.get(own), "__file__", None)
    if file is None or not Path(file).is_file():
        raise StepError(
            f"the source of {function.__qualname__} cannot be found (module {own}); define the step in a .py file"
        )
    roots = {root: folder for root in ("tasks", own.partition(".")[0]) if (folder := _root_folder(root))}
    found: dict[str, str] = {}
    waiting = [(own, Path(file))]
    while waiting:
        name, path = waiting.pop()
        if name in found:
            continue
        found[name], mentioned = _module(name, path, *_stamp(path))
        for other in mentioned:
            if other not in found and not _is_plumbing(other) and (place := _locate(other, roots)):
                waiting.append((other, place))
    return dict(sorted(found.items()))


def _root_folder(root: str) -> Path | None:
    file = getattr(sys.modules.get(root), "__file__", None)
    return Path(file).parent if file and Path(file).name == "__init__.py" else None


def _is_plumbing(name: str) -> bool:
    return any(name == own or name.startswith(f"{own}.") for own in _PLUMBING)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def _locate(name: str, roots: Mapping[str, Path]) -> Path | None:
    root, *parts = name.split(".")
    if root not in roots:
        return None
    place = roots[root].joinpath(*parts)
    for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
        if file.is_file():
            return file
    return None


@lru_cache(maxsize=4096)
def _module(name: str, path: Path, changed: int, size: int) -> tuple[str, tuple[str, ...]]:
    """Digest of the module's syntax tree, and every dotted name in it that may be a module."""
    tree = ast.parse(path.read_bytes(), filename=str(path))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    mentioned = {parent for dotted in _mentioned(tree, package) for parent in _with_parents(dotted)}
    return hashlib.sha256(ast.dump(tree).encode("utf-8", "surrogatepass")).hexdigest(), tuple(sorted(mentioned))


def _mentioned(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _DOTTED.fullmatch(node.value):
            yield node.value


def _with_parents(dotted: str) -> Iterator[str]:
    parts = dotted.split(".")
    return (".".join(parts[: count + 1]) for count in range(len(parts)))


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Version of every named distribution, and of Python, whose minor version shapes results too.

    Raises:
        StepError: a distribution is not installed.
    """
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            raise StepError(
                f"the library {name!r}, whose version is part of a step's key, is not installed; "
                f"run: python -m pip install {name}"
            ) from None
    return dict(sorted(versions.items()))


def machine() -> dict[str, Any]:
    """What figures of speed hold for: the system, the processor and how many of its cores there are."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count() or 1,
    }


@cache
def processor() -> str:
    """The processor as the system names it, or at least its architecture."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Hardware")))
    return next(named, "") or platform.processor() or platform.machine()


def step_key(
    spec: StepSpec,
    inputs: Sequence[str],
    data: str,
    seed: int,
    device: str,
    registered: RegisteredStep,
    extra: Mapping[str, Any] | None = None,
) -> tuple[str, dict[str, Any]]:
    """The key of what a step makes, and the recipe that explains every part of it.

    Args:
        spec: the resolved step; fields that cannot shape the result are left out.
        inputs: the keys of the artifacts it takes, in order.
        data: fingerprint of the data.
        seed: the spec's seed.
        device: ``cpu`` or ``cuda``.
        registered: the step's function and the libraries that shape its result.
        extra: whatever else shapes the result, as JSON.

    Returns:
        The key (64 hex digits) and the recipe. What the recipe says for people alone is not part of the key: ``step``
        (the id), ``uses`` and ``names`` (of the inputs).

    Raises:
        StepError: a library is missing, or the step's source cannot be found.
        TypeError, ValueError: ``extra`` is not JSON.
    """
    hashed = {
        "version": RECIPE_VERSION,
        "spec": spec.model_dump(mode="json", exclude=_NOT_HASHED | set(spec.sources)),
        "inputs": list(inputs),
        "data": data,
        "seed": seed,
        "device": device,
        "sources": source_modules(registered.function),
        "libraries": library_versions(registered.libraries),
        "extra": dict(extra or {}),
    }
    named = spec.inputs() or ()
    names = [named[at][1] if len(named) == len(inputs) else f"{at + 1}" for at in range(len(inputs))]
    recipe = {**hashed, "step": spec.id, "uses": spec.uses, "names": names}
    return digest_json(hashed), json.loads(canonical_json(recipe))


def explain(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why two recipes have different keys, in words: ``learning_rate 1e-4 -> 5e-5``, ``input slim changed``,
    ``source of tasks.compress.prune changed``, ``torch 2.13.0 -> 2.14.0``. Empty where the keys are the same."""
    reasons = _differences(old.get("spec", {}), new.get("spec", {}))
    reasons += _input_differences(old, new)
    if old.get("data") != new.get("data"):
        reasons.append("the data changed")
    for name in ("seed", "device"):
        reasons += _difference(name, old.get(name, _ABSENT), new.get(name, _ABSENT))
    reasons += _differences(old.get("sources", {}), new.get("sources", {}), "source of ")
    reasons += _differences(old.get("libraries", {}), new.get("libraries", {}))
    reasons += _differences(old.get("extra", {}), new.get("extra", {}))
    if old.get("version") != new.get("version"):
        reasons.append("the way in which keys are made changed")
    return reasons


def _input_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = list(old.get("inputs", ())), list(new.get("inputs", ()))
    names = new.get("names", [])
    if len(before) != len(after):
        were = ", ".join(old.get("names", [])) or "none"
        return [f"inputs {were} -> {', '.join(names) or 'none'}"]
    return [f"input {name} changed" for was, now, name in zip(before, after, names, strict=True) if was != now]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    reasons = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            reasons += _differences(before, after, f"{prefix}{name}.")
        else:
            reasons += _difference(f"{prefix}{name}", before, after)
    return reasons


def _difference(name: str, old: Any, new: Any) -> list[str]:
    if old is new or (type(old) is type(new) and old == new):
        return []
    shown = [_shown(value) for value in (old, new)]
    if old is _ABSENT or (old is None and isinstance(new, Mapping)):
        return [f"{name} is new" + (f": {shown[1]}" if shown[1] else "")]
    if new is _ABSENT or (new is None and isinstance(old, Mapping)):
        return [f"{name} is gone" + (f", was {shown[0]}" if shown[0] else "")]
    return [f"{name} {shown[0]} -> {shown[1]}" if all(shown) else f"{name} changed"]


def _shown(value: Any) -> str:
    """The value as a person would write it; empty for what says nothing to a person."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return "" if _DIGEST.fullmatch(value) else value or '""'
    if isinstance(value, float) and math.isfinite(value) and 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.12e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    text = "" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= 80 else ""
