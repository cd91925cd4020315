"""Narrower models: fewer attention heads, feed-forward channels and hidden numbers, in every layer the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import TYPE_CHECKING, Any

from specs.schema.steps.prune import Part
from tasks.compress.cut import Axis, Place, Source, configured, shell
from tasks.context import StepError

if TYPE_CHECKING:
    from torch import nn

    from tasks.models.anatomy import Anatomy, Block
    from tasks.models.layout import LinearLayer

PARTS: tuple[Part, ...] = ("heads", "ffn", "hidden")

STREAM = "hidden"
"""The name of the axis of the numbers between the blocks."""

_MIRRORS = ("output_hidden_size",)
"""Fields that hold the hidden size a second time."""

_SCALED = "scale_embedding"
"""The field by which embeddings are multiplied with the root of the hidden size."""


@dataclass(frozen=True)
class Room:
    """What of a model can become narrower.

    Args:
        parts: of it.
        left: what was not asked for, or cannot, with the reason.
        together: whether heads and hidden size go together: the size of a head follows from both.
        step: hidden sizes are multiples of it.
        multiple: so are new widths of ffn, where the old one is.
    """

    parts: tuple[Part, ...]
    left: Mapping[str, str]
    together: bool
    step: int
    multiple: int


def room(model: nn.Module, anatomy: Anatomy, asked: Sequence[Part], multiple: int) -> Room:
    """What can become narrower of what the spec asks for; where it asks for nothing, of heads and ffn.

    An ordinary configuration says one number of heads for all layers of a stack. Llama, Qwen and T5 say the size of a
    head beside it, so that heads can go by themselves. For BERT, GPT-2, BART, Marian, Whisper and wav2vec2 it is the
    hidden size over the number of heads: heads go only with as much of the hidden size, and it only with heads.

    Args:
        model: may be without weights.
        anatomy: of it.
        asked: the parts that the spec names.
        multiple: of which new widths are to be multiples.

    Raises:
        StepError: a part that is asked for cannot become narrower.
    """
    together = any("head_size" not in stack.fields for stack in anatomy.stacks)
    usual: tuple[Part, ...] = ("ffn",) if together else ("heads", "ffn")
    parts: tuple[Part, ...] = tuple([part for part in PARTS if part in asked]) or usual
    kind = anatomy.model_type
    tied = f"the configuration of {kind} makes a head as large as the hidden size over the number of heads"
    reason = _fixed_hidden(model, anatomy) if "hidden" in parts else None
    if reason is not None:
        raise StepError(f"parts: hidden cannot go: {reason}; write parts: [{'ffn' if together else 'heads, ffn'}]")
    if together and ("heads" in parts) != ("hidden" in parts):
        raise StepError(
            f"parts: [{', '.join(parts)}]: {tied}, so that heads and hidden can only go together; write parts: [ffn] "
            "or parts: [heads, ffn, hidden]"
        )
    left = {part: "parts does not name it" for part in PARTS if part not in parts}
    if together and not asked:
        left["heads"] = f"{tied}; they go only together with hidden: parts: [heads, ffn, hidden]"
    return Room(parts, left, together, _step(model, anatomy, together, multiple), multiple)


def _fixed_hidden(model: Any, anatomy: Anatomy) -> str | None:
    """Why no configuration can say the same model with another hidden size; None where one can."""
    computed = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for stack in anatomy.stacks:
        tables = [name for name, what in stack.embeddings.items() if what == "positions"]
        if stack.positions == "absolute" and all(f"{name}.weight" in computed for name in tables):
            return f"{anatomy.model_type} computes its positions from the hidden size, and all of them would be others"
    if getattr(model.config, _SCALED, False):
        return f"{anatomy.model_type} multiplies its embeddings with the root of the hidden size ({_SCALED}: true)"
    return None


def _step(model: nn.Module, anatomy: Anatomy, together: bool, multiple: int) -> int:
    width = anatomy.stacks[0].width
    steps = [module.groups for module in grouped(model, anatomy).values()]
    if together:
        steps += [stack.blocks[0].attentions[0].head_size for stack in anatomy.stacks]
    elif width % multiple == 0 and width >= 2 * multiple:
        steps.append(multiple)
    return lcm(1, *steps)


def grouped(model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
    """Convolutions in groups over the hidden numbers."""
    from torch import nn

    width = anatomy.stacks[0].width
    front = [f"{name}." for name in anatomy.front]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d)
        and module.groups > 1
        and module.in_channels == width
        and any(f"{name}.".startswith(start) for start in front)
    }


def shape(anatomy: Anatomy, space: Room, share: float) -> dict[str, int]:
    """The fields of the configuration of a model of which about ``share`` is kept, in every part at least one unit."""
    fields: dict[str, int] = {}
    width = anatomy.stacks[0].width
    hidden = _rounded(share * width, width, space.step) if "hidden" in space.parts else width
    for stack in anatomy.stacks:
        attention = stack.blocks[0].attentions[0]
        each = attention.heads // attention.kv_heads
        groups = attention.kv_heads
        if "heads" in space.parts:
            groups = hidden // attention.head_size if space.together else _rounded(share * groups, groups, 1)
        if "heads" in space.parts or ("hidden" in space.parts and not space.together):
            fields |= {stack.fields["heads"]: groups * each}
            fields |= {stack.fields[name]: groups for name in ("kv_heads",) if name in stack.fields}
            fields |= {stack.fields[name]: attention.head_size for name in ("head_size",) if name in stack.fields}
        if "ffn" in space.parts or "hidden" in space.parts:  # GPT-2 derives the one from the other unless both are said
            wide = stack.blocks[0].ffn.width
            fits = wide % space.multiple == 0 and wide >= 2 * space.multiple
            kept = _rounded(share * wide, wide, space.multiple if fits else 1) if "ffn" in space.parts else wide
            fields[stack.fields["ffn"]] = kept
        if "hidden" in space.parts:
            fields[stack.fields["width"]] = hidden
    return fields


def _rounded(value: float, most: int, step: int) -> int:
    """The multiple of ``step`` closest to ``value``, from ``step`` to ``most``."""
    return min(most, max(step, step * int(value / step + 0.5)))


def config_of(config: Any, anatomy: Anatomy, fields: Mapping[str, int]) -> Any:
    """The configuration with the fields that ``shape`` gives."""
    old = anatomy.stacks[0].width
    new = fields.get(anatomy.stacks[0].fields["width"], old)
    mirrors = {name: new for name in _MIRRORS if getattr(config, name, None) == old}
    return configured(config, {**fields, **mirrors})


def axes(model: nn.Module, anatomy: Anatomy, space: Room) -> list[Axis]:
    """What goes together, for every part that can become narrower.

    Where one table of relative positions serves all blocks of a stack (T5), the same heads go in all of them.
    """
    found = [*_head_axes(model, anatomy), *ffn_axes(model, anatomy)]
    if "hidden" in space.parts:
        claimed = {(place.tensor, place.dim) for axis in found for place in axis.places}
        least = shape(anatomy, replace(space, parts=("heads", "hidden")), 0)
        found += hidden_axes(model, anatomy, config_of(model.config, anatomy, least), claimed)
    return [axis for axis in found if axis.part in space.parts]


def count(axis: Axis, anatomy: Anatomy, fields: Mapping[str, int]) -> int:
    """How many units of an axis are left in a model of the shape ``fields``."""
    stack = next((stack for stack in anatomy.stacks if axis.name.startswith(f"{stack.name}.")), anatomy.stacks[0])
    attention, ffn = stack.blocks[0].attentions[0], stack.blocks[0].ffn
    whole = {"heads": attention.heads, "ffn": ffn.width, "hidden": stack.width}[axis.part]
    name = stack.fields[{"heads": "heads", "ffn": "ffn", "hidden": "width"}[axis.part]]
    return axis.size * fields.get(name, whole) // whole


def _head_axes(model: nn.Module, anatomy: Anatomy) -> Iterator[Axis]:
    layers = layers_of(model)
    for stack in anatomy.stacks:
        tables = [name for name, what in stack.embeddings.items() if what == "relative positions"]
        shared = 0 < len(tables) < len(stack.blocks)
        joint: list[Axis] = []
        for attention in (part for block in stack.blocks for part in block.attentions):
            each = attention.heads // attention.kv_heads
            segments = 3 if attention.fused else 1
            query = outputs(layers[attention.query], attention.head_size * each, segments)
            places = [*query, *inputs(layers[attention.output], attention.head_size * each)]
            for name in () if attention.fused else (attention.key, attention.value):
                places += outputs(layers[name], attention.head_size)
            table = f"{attention.name}.relative_attention_bias"
            if table in tables:
                places.append(Place(f"{table}.weight", 1, each))
            source = Source(attention.output, "input", attention.head_size)
            axis = Axis(attention.name, "heads", attention.kv_heads, tuple(places), (source,))
            if shared and not attention.cross:
                joint.append(axis)
            else:
                yield axis
        if joint:
            yield replace(
                joint[0],
                name=f"{stack.name}.self-attention",
                places=tuple(place for axis in joint for place in axis.places),
                sources=tuple(source for axis in joint for source in axis.sources),
            )


def ffn_name(block: Block) -> str:
    """The name of the axis of a block's feed-forward channels."""
    return f"{block.name}.ffn"


def ffn_axes(model: nn.Module, anatomy: Anatomy) -> Iterator[Axis]:
    """The feed-forward channels of every block."""
    layers = layers_of(model)
    for block in anatomy.blocks:
        widening = [layers[name] for name in (block.ffn.gate, block.ffn.up) if name is not None]
        places = [place for layer in widening for place in outputs(layer)]
        places += inputs(layers[block.ffn.down])
        yield Axis(ffn_name(block), "ffn", block.ffn.width, tuple(places), (Source(block.ffn.down, "input"),))


def hidden_axes(model: nn.Module, anatomy: Anatomy, config: Any, claimed: set[tuple[str, int]]) -> Iterator[Axis]:
    """The hidden numbers: every dimension that a smaller hidden size makes smaller, but for heads and channels.

    Layers whose output one other layer alone sees have an axis of their own.

    Args:
        config: that of the same model with fewer hidden numbers.
        claimed: dimensions that belong to heads or channels.
    """
    from torch import nn

    width = anatomy.stacks[0].width
    narrow = shell(model, config)
    after = {name: tuple(tensor.shape) for name, tensor in narrow.state_dict().items()}
    shrinking = {
        (name, dim): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        for dim, (old, new) in enumerate(zip(tensor.shape, after[name], strict=True))
        if old != new and (name, dim) not in claimed
    }
    for producer, consumer in anatomy.inner.items():
        places = [(f"{producer}.weight", 0), (f"{producer}.bias", 0), (f"{consumer}.weight", 1)]
        places = [place for place in places if place in shrinking]
        if (f"{producer}.weight", 0) in places:
            for place in places:
                del shrinking[place]
            inner = tuple(Place(name, dim) for name, dim in places)
            yield Axis(producer, "hidden", width, inner, (Source(consumer, "input"),))
    convolutions = grouped(model, anatomy)
    places = [Place(name, dim) for name, dim in shrinking if _grouped_weight(name, convolutions) is None]
    places += [Place(f"{name}.weight", 0, groups=module.groups) for name, module in convolutions.items()]
    names = [norm for stack in anatomy.stacks for norm in stack.norms]
    names += [norm for block in anatomy.blocks for part in (*block.attentions, block.ffn) for norm in part.norms]
    sources = [Source(name, "output") for name in names if (f"{name}.weight", 0) in shrinking]
    groups = lcm(1, *(module.groups for module in convolutions.values() if isinstance(module, nn.Conv1d)))
    yield Axis(STREAM, "hidden", width, tuple(places), tuple(sources), groups)


def _grouped_weight(name: str, convolutions: Mapping[str, Any]) -> str | None:
    """The convolution in groups that a tensor is the weight of, or a part of it; None where it is none's."""
    return next(
        (
            owner
            for owner in convolutions
            if name == f"{owner}.weight" or name.startswith(f"{owner}.parametrizations.weight.")
        ),
        None,
    )


def layers_of(model: nn.Module) -> dict[str, LinearLayer]:
    """The linear layers by name."""
    from tasks.models.layout import linear_layers

    return {layer.name: layer for layer in linear_layers(model)}


def outputs(layer: LinearLayer, unit: int = 1, segments: int = 1) -> list[Place]:
    """Where the units that a layer gives stand in its weight and bias."""
    places = [Place(layer.weight_name, 0 if layer.kind == "linear" else 1, unit, segments)]
    if layer.module.bias is not None:
        places.append(Place(f"{layer.name}.bias", 0, unit, segments))
    return places


def inputs(layer: LinearLayer, unit: int = 1) -> list[Place]:
    """Where the units that a layer reads stand in its weight."""
    return [Place(layer.weight_name, 1 if layer.kind == "linear" else 0, unit)]
