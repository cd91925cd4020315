"""Which layers and tables of a model get fewer bits, and which of them share their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from specs.schema.suggest import nearest
from tasks.context import StepError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Selection:
    """Names of the linear layers and embeddings to pack, what is left with the reason, and how many there are.

    ``owner`` gives for each of them the parameter that holds its weights: those of one owner share their integers.
    ``factors`` are what the rows of each table are multiplied with.
    """

    layers: tuple[str, ...]
    embeddings: tuple[str, ...]
    left: Mapping[str, str]
    owner: Mapping[str, str]
    linear: int
    tables: int
    transposed: frozenset[str] = field(default=frozenset())
    factors: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """What is packed, tables first."""
        return (*self.embeddings, *self.layers)

    @property
    def units(self) -> dict[tuple[str, bool], tuple[str, ...]]:
        """What is packed by what it shares: the parameter, and whether it is read transposed."""
        found: dict[tuple[str, bool], tuple[str, ...]] = {}
        for name in self.names:
            place = self.place(name)
            found[place] = (*found.get(place, ()), name)
        return found

    def place(self, name: str) -> tuple[str, bool]:
        """The key of ``units`` for a layer or table."""
        return self.owner[name], name in self.transposed

    @property
    def alone(self) -> tuple[str, ...]:
        """The linear layers that share their weights with nothing."""
        owners = [self.owner[name] for name in self.names]
        return tuple(name for name in self.layers if owners.count(self.owner[name]) == 1)


def select(network: nn.Module, skip: Sequence[str] = (), tables: bool = True) -> Selection:
    """Decide what gets fewer bits. Modules that share a weight are packed together or not at all: were one of them
    packed alone, the other would need the float weight as well, and the file would grow.

    Args:
        network: a float model.
        skip: shell-style patterns of module names that stay as they are.
        tables: whether embeddings are packed.

    Raises:
        StepError: a pattern matches no linear layer and no embedding.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from tasks.models.layout import embeddings, linear_layers, tied_weights

    linear, found_tables, in_bands = linear_layers(network), embeddings(network), banded(network)
    modules: dict[str, Any] = {found.name: found.module for found in (*linear, *found_tables)}
    for pattern in skip:
        known = (*modules, *in_bands)
        if not any(fnmatchcase(name, pattern) for name in known):
            raise StepError(f"skip: {pattern!r} matches no linear layer and no embedding; {nearest(pattern, known)}")
    ties = tied_weights(network)
    owner = {name: ties.get(_weight(name), _weight(name)) for name in modules}
    rows_times = {table.name: table.factor for table in found_tables}
    left: dict[str, str] = {}
    for name, module in modules.items():
        pattern = next((pattern for pattern in skip if fnmatchcase(name, pattern)), None)
        if pattern is not None:
            left[name] = f"skip: {pattern}"
        elif type(module) not in (nn.Linear, Conv1D) and rows_times.get(name) is None:
            left[name] = f"{type(module).__name__} may use its weight in other ways"
        elif name in rows_times and not tables:
            left[name] = "embeddings: false"
        elif module.weight.is_meta or not module.weight.is_floating_point():
            left[name] = f"its weight is {module.weight.dtype}"
    kept = {owner[name]: name for name in left}
    for name in modules:
        if name not in left and owner[name] in kept:
            left[name] = f"tied to {kept[owner[name]]}, which stays float"
    return Selection(
        layers=tuple(layer.name for layer in linear if layer.name not in left),
        embeddings=tuple(table.name for table in found_tables if table.name not in left),
        left=left | in_bands,
        owner=owner,
        linear=len(linear),
        tables=len(found_tables),
        transposed=frozenset(layer.name for layer in linear if layer.kind == "conv1d"),
        factors={name: factor for name, factor in rows_times.items() if factor is not None},
    )


def banded(network: nn.Module) -> dict[str, str]:
    """The embeddings and output layers whose tokens ``adaptive_input`` has put into bands, each with why it is left."""
    from tasks.adaptive_input.rounding import FLOAT
    from tasks.adaptive_input.table import tables

    trained = {id(table): table.layout.bands[0].most == FLOAT for table in tables(network)}
    return {
        name: "its tokens are in bands, whose factors stay in float32 (method: adaptive)"
        if trained[id(module.table)]
        else "its tokens are in bands of bits of their own"
        for name, module in network.named_modules()
        if id(getattr(module, "table", None)) in trained
    }


def rows_of(network: nn.Module, selection: Selection, name: str) -> Tensor:
    """The weights of a layer as [out, in], or the rows of a table: a view, through which the model can be written."""
    module: Any = network.get_submodule(name)
    return module.weight.detach().T if name in selection.transposed else module.weight.detach()


def reasons(left: Mapping[str, str]) -> str:
    """The first things left alone with their reasons, for one line."""
    shown = [f"{name}: {reason}" for name, reason in list(left.items())[:3]]
    more = len(left) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _weight(name: str) -> str:
    return f"{name}.weight" if name else "weight"
