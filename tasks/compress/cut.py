"""Which numbers of a model belong together, and the same model with fewer of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from specs.schema.steps.prune import Part

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where the units of an axis stand in a tensor.

    Args:
        tensor: its name.
        dim: the dimension.
        unit: entries of the dimension that belong to one unit, one after the other.
        segments: how often all units stand there one after the other (GPT-2's query, key and value: 3).
        groups: of a convolution in groups, whose outputs (dimension 0) and inputs (dimension 1, those of one group
            alone) both are the axis; 1 for everything else.
    """

    tensor: str
    dim: int
    unit: int = 1
    segments: int = 1
    groups: int = 1


@dataclass(frozen=True)
class Source:
    """Where the importance of the units is seen.

    Args:
        module: whose input or output.
        side: which of them.
        unit: numbers of a vector that belong to one unit.
    """

    module: str
    side: Literal["input", "output"]
    unit: int = 1


@dataclass(frozen=True)
class Axis:
    """Units that are kept or go in all their places at once.

    Args:
        name: what a person knows it by.
        part: of the model.
        size: the number of units: groups of heads, channels, hidden numbers.
        places: where they stand.
        sources: where their importance is seen.
        groups: so many stretches of the axis keep equally many units each.
    """

    name: str
    part: Part
    size: int
    places: tuple[Place, ...]
    sources: tuple[Source, ...]
    groups: int = 1


Kept = Mapping[str, Sequence[int]]
"""The units that stay, ascending, by the name of the axis; an axis that is not named stays whole."""


def choose(scores: Tensor, count: int, groups: int = 1) -> list[int]:
    """The ``count`` most important units, ascending; of equal ones the first.

    Args:
        scores: of each unit, [n].
        count: how many stay.
        groups: so many stretches of equal length keep ``count / groups`` each.
    """
    import torch

    parts = scores.reshape(groups, -1)
    order = torch.argsort(parts, dim=1, descending=True, stable=True)[:, : count // groups]
    return sorted((order + parts.shape[1] * torch.arange(groups)[:, None]).flatten().tolist())


def entries(kept: Sequence[int], size: int, place: Place) -> list[int]:
    """The indices of a dimension that stay, where of ``size`` units those in ``kept`` do."""
    one = [unit * place.unit + offset for unit in kept for offset in range(place.unit)]
    return [segment * size * place.unit + entry for segment in range(place.segments) for entry in one]


def cut(state: Mapping[str, Tensor], axes: Iterable[Axis], kept: Kept) -> dict[str, Tensor]:
    """The tensors of ``state`` with the units in ``kept`` alone; those without a place on a cut axis are the same."""
    import torch

    changed = dict(state)
    for axis in axes:
        if axis.name not in kept:
            continue
        for place in axis.places:
            tensor = changed[place.tensor]
            index = torch.tensor(entries(kept[axis.name], axis.size, place))
            changed[place.tensor] = (
                tensor.index_select(place.dim, index) if place.groups == 1 else _cut_groups(tensor, index, place.groups)
            )
    return changed


def _cut_groups(weight: Tensor, index: Tensor, groups: int) -> Tensor:
    """The weight [out, in / groups, k] of a convolution of which the outputs and inputs ``index`` stay."""
    import torch

    parts = []
    for group in range(groups):
        start, size = group * weight.shape[1], weight.shape[0] // groups
        outputs = index[(index >= group * size) & (index < (group + 1) * size)]
        inputs = index[(index >= start) & (index < start + weight.shape[1])] - start
        parts.append(weight.index_select(0, outputs).index_select(1, inputs))
    return torch.cat(parts)


def state_of(model: nn.Module, named: Iterable[str] = ()) -> dict[str, Tensor]:
    """The model's tensors. Where one in ``named`` is computed from others (weight normalisation), it stands there
    itself, and they do not."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name in named:
        if name not in state:
            owner, _, parameter = name.rpartition(".")
            state = {other: value for other, value in state.items() if not other.startswith(_computed(name))}
            state[name] = getattr(model.get_submodule(owner), parameter).detach()
    return state


def rebuild(model: nn.Module, config: Any, state: Mapping[str, Tensor], untied: Iterable[str] = ()) -> nn.Module:
    """A model of the same class as ``config`` describes it, with the tensors ``state``, in eval mode.

    Args:
        untied: tensors that were tied to others and are no more.

    Raises:
        RuntimeError: they do not fit, or what else was tied is tied no more.
    """
    import torch

    from tasks.models.layout import tied_weights

    with torch.random.fork_rng(devices=[]):
        built: Any = type(model)(config)
    rest = dict(state)
    with torch.no_grad():
        for name in [name for name in state if name not in built.state_dict()]:
            owner, _, parameter = name.rpartition(".")
            setattr(built.get_submodule(owner), parameter, rest.pop(name).clone())
            own = built.state_dict()
            rest |= {other: own[other] for other in own if other.startswith(_computed(name))}
    own = built.state_dict()  # of what the class computes by itself the new sizes have their own
    rest |= {name: own[name] for name in getattr(built, "_keys_to_ignore_on_save", None) or () if name in own}
    built.load_state_dict(rest, strict=True)
    if set(tied_weights(built)) != set(tied_weights(model)) - set(untied):
        raise RuntimeError(f"the cut {config.model_type} model ties other weights than the whole one")
    if getattr(model, "generation_config", None) is not None:
        built.generation_config = copy.deepcopy(model.generation_config)
    return built.eval()


def shell(model: nn.Module, config: Any) -> nn.Module:
    """A model of the same class as ``config`` describes it, without weights."""
    import torch

    with torch.device("meta"):
        return type(model)(config)


def configured(config: Any, fields: Mapping[str, Any]) -> Any:
    """A copy of a configuration with other values."""
    changed = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _computed(name: str) -> str:
    owner, _, parameter = name.rpartition(".")
    return f"{owner}.parametrizations.{parameter}."
