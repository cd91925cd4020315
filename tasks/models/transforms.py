"""What a standard Hugging Face folder cannot say about a model, kept beside it as data in ``lathe.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from math import inf
from pathlib import Path
from pkgutil import walk_packages
from typing import TYPE_CHECKING, Any

from specs.schema.suggest import nearest
from tasks.context import StepError

if TYPE_CHECKING:
    from torch import nn

FILE = "lathe.json"
VERSION = 1

Transform = Callable[["nn.Module", Mapping[str, Any]], None]
"""Changes the structure of a model whose weights are not set yet, as ``entry`` says; the weights then come from the
file, and every tensor of the changed model must be there."""

_TRANSFORMS: dict[str, Transform] = {}
_TRAINS: set[str] = set()


@dataclass(frozen=True)
class Extras:
    """The content of ``lathe.json``.

    Args:
        transforms: changes of the structure, in order; each has a ``name`` and whatever its function needs.
        aliases: tensors that are not in the file because they are the tensor of another name.
        compute_dtype: the type in which the model computes on a CPU, where it is stored in another.
    """

    transforms: tuple[Mapping[str, Any], ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    compute_dtype: str | None = None

    def __bool__(self) -> bool:
        return bool(self.transforms or self.aliases or self.compute_dtype)


def transform(name: str, *, trains: bool = False) -> Callable[[Transform], Transform]:
    """Register the decorated function as the replay of transforms called ``name``; ``trains`` where the weights of the
    changed model can be trained."""

    def register(function: Transform) -> Transform:
        _TRANSFORMS[name] = function
        if trains:
            _TRAINS.add(name)
        return function

    return register


def replay(model: nn.Module, extras: Extras) -> None:
    """Apply the recorded transforms to ``model`` in place.

    Raises:
        StepError: a transform has no function in this version of Lathe, or does not fit the model.
    """
    for entry in extras.transforms:
        name = str(entry.get("name"))
        if name not in _TRANSFORMS:
            _import_all()
        if name not in _TRANSFORMS:
            raise StepError(
                f"{FILE} asks for the transform {name!r}, which this version does not have; "
                f"{nearest(name, sorted(_TRANSFORMS))}"
            )
        try:
            _TRANSFORMS[name](model, entry)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise StepError(
                f"what {FILE} says of {name!r} does not fit the model: {error}; make the artifact again"
            ) from error


def positive(value: object, what: str) -> float:
    """``value`` of an entry, a number above 0.

    Raises:
        ValueError: it is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise ValueError(f"{what} is {value!r} and not a number above 0")
    return float(value)


def whole(value: object, what: str, least: int = 1, most: int | None = None) -> int:
    """``value`` of an entry, a whole number from ``least`` to ``most``.

    Raises:
        ValueError: it is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        span = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{what} is {value!r} and not a whole number {span}")
    return value


def shape(entry: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Rows and columns of the weight of the module ``name``.

    Raises:
        ValueError: no matrix is like that.
    """
    rows, columns = entry["shape"]
    return whole(rows, f"the number of rows of {name}"), whole(columns, f"the number of columns of {name}")


def trainable(extras: Extras) -> bool:
    """Whether a model on which ``replay`` was done can be trained."""
    return all(entry["name"] in _TRAINS for entry in extras.transforms)


def _import_all() -> None:
    import tasks

    for module in walk_packages(tasks.__path__, "tasks."):
        if module.name.count(".") >= 2:
            import_module(module.name)


def read_extras(path: Path) -> Extras:
    """The content of ``path/lathe.json``; empty where there is none.

    Raises:
        StepError: the file is damaged or of a newer version.
    """
    file = path / FILE
    if not file.exists():
        return Extras()
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        version = record["version"]
        extras = Extras(
            tuple(dict(one) for one in record["transforms"]), dict(record["aliases"]), record["compute_dtype"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise StepError(f"{file} is damaged ({error}); make the artifact again") from error
    if version != VERSION:
        raise StepError(f"{file} has version {version}, this Lathe reads version {VERSION}; make the artifact again")
    return extras


def write_extras(path: Path, extras: Extras) -> None:
    """Write ``path/lathe.json``; nothing is written where there is nothing to say."""
    if not extras:
        return
    record = {
        "version": VERSION,
        "transforms": [dict(entry) for entry in extras.transforms],
        "aliases": dict(extras.aliases),
        "compute_dtype": extras.compute_dtype,
    }
    (path / FILE).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
