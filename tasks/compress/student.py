"""A student: a smaller model of the teacher's kind, made of the teacher's own weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specs.schema.steps.distill import StudentSpec
from tasks.compress import cut, depth, width
from tasks.compress.cut import Axis, Place, Source, choose
from tasks.compress.importance import activation
from tasks.context import StepError
from tasks.models.anatomy import Anatomy, Attention, Stack, anatomy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.data.encoded import Encoded


@dataclass(frozen=True)
class StudentPlan:
    """What is kept of a teacher.

    Args:
        fields: what the configuration says otherwise, but for the depths.
        blocks: numbers of the teacher's blocks, by the name of their stack.
        kept: the channels that stay, by the name of their axis; see ``axes``.
    """

    fields: Mapping[str, Any]
    blocks: Mapping[str, Sequence[int]]
    kept: dict[str, Sequence[int]]


def picked(count: int, of: int) -> tuple[int, ...]:
    """``count`` of ``of`` blocks, evenly spread, the first and the last among them (Distil-Whisper, 2311.00430)."""
    if count == 1:
        return (0,)
    return tuple(round(at * (of - 1) / (count - 1)) for at in range(count))


def build(teacher: nn.Module, spec: StudentSpec, data: Encoded | None = None) -> nn.Module:
    """The student, an ordinary model of a smaller configuration, in eval mode.

    Blocks are picked evenly; channels of the width, of feed-forward parts, and whole attention heads are kept by how
    large their activations are on average on training examples (Minitron, 2407.14679). On a small trained language
    model that loses a little less than the first channels do where the width is cut (1.605 against 1.646 at 24 of 32,
    the teacher has 1.420), and the same for feed-forward channels and heads.

    Args:
        teacher: a model in eval mode on the CPU; it is left as it is.
        spec: the sizes.
        data: encoded training examples; needed where a width is cut.

    Raises:
        StepError: a size is not smaller than the teacher's or does not go with the others.
    """
    return apply(teacher, plan(teacher, spec, importance(teacher, data) if data is not None else {}))


def cuts_widths(spec: StudentSpec) -> bool:
    """Whether more than blocks is left out."""
    return any((spec.hidden, spec.heads, spec.ffn))


def importance(teacher: nn.Module, data: Encoded) -> dict[str, Tensor]:
    """The mean magnitude of each channel of the axes that something is seen of, [D] by the axis's name."""
    parts = anatomy(teacher)
    return activation(teacher, [axis for axis in [*_narrow(teacher, parts), _stream(parts)] if axis.sources], data)


def plan(teacher: nn.Module, spec: StudentSpec, scores: Mapping[str, Tensor]) -> StudentPlan:
    """What is kept of ``teacher``.

    Args:
        teacher: the model.
        spec: the sizes.
        scores: how much each channel that comes into a layer matters; channels of a layer without scores are kept from
            the first on.

    Raises:
        StepError: as ``build``.
    """
    parts = anatomy(teacher)
    wide = parts.stacks[0].width
    hidden = spec.hidden or wide
    _not_above("hidden", hidden, wide)
    if spec.decoder_layers is not None and all(stack.role != "decoder" for stack in parts.stacks):
        raise StepError(no_decoder(parts.model_type))
    fields: dict[str, Any] = {}
    blocks: dict[str, Sequence[int]] = {}
    kept: dict[str, Sequence[int]] = {}
    for stack in parts.stacks:
        own = stack.role == "decoder" and spec.decoder_layers is not None
        count = (spec.decoder_layers if own else spec.layers) or len(stack.blocks)
        _not_above("decoder_layers" if own else "layers", count, len(stack.blocks))
        blocks[stack.name] = picked(count, len(stack.blocks))
        heads = _heads(stack, spec, hidden, wide)
        ffn = spec.ffn or (stack.blocks[0].ffn.width * hidden // wide)
        _not_above("ffn", ffn, stack.blocks[0].ffn.width)
        fields |= _fields(stack, hidden, heads, ffn)
        kept |= _stack_kept(stack, blocks[stack.name], heads, ffn, scores)
    groups = max((module.groups for module in width.grouped(teacher, parts).values()), default=1)
    if hidden % groups:
        raise StepError(
            f"student.hidden {hidden} is no multiple of the {groups} groups of the model's convolution; write for "
            f"example {max(groups, hidden // groups * groups)}"
        )
    kept[width.STREAM] = choose(_scores(scores, width.STREAM, wide), hidden, groups)
    return StudentPlan(fields, blocks, kept)


@dataclass(frozen=True)
class Heads:
    """The attention heads of a student: how many, how many of keys and values, and their size."""

    count: int
    kv: int
    size: int


def _heads(stack: Stack, spec: StudentSpec, hidden: int, wide: int) -> Heads:
    first = stack.blocks[0].attentions[0]
    own_size = "head_size" in stack.fields
    group = first.heads // first.kv_heads
    if spec.heads is not None:
        count = spec.heads
    elif own_size:
        most, least = max(1, first.heads * hidden // wide), min(group, first.kv_heads)
        count = next((n for n in range(most, least, -1) if n % group == 0 or n % first.kv_heads == 0), least)
    else:
        count = hidden // first.head_size if hidden % first.head_size == 0 else first.heads
    _not_above("heads", count, first.heads)
    if not own_size and hidden % count:
        fitting = [n for n in range(1, first.heads + 1) if hidden % n == 0]
        one = f"one of {', '.join(map(str, fitting))}" if len(fitting) > 1 else "1"
        if spec.heads is None:
            raise StepError(
                f"student.hidden: the teacher's {first.heads} heads of {first.head_size} do not divide the width "
                f"{hidden}; write a multiple of {first.head_size}, or as heads {one}"
            )
        raise StepError(f"student.heads: {count} heads do not divide the width {hidden}; write {one}")
    kv = count // group if count % group == 0 else first.kv_heads
    if count % kv:
        of = " or of ".join(dict.fromkeys((str(group), str(first.kv_heads))))
        raise StepError(
            f"student.heads: {count} heads cannot share the teacher's {first.kv_heads} heads of keys and values; write "
            f"a multiple of {of}"
        )
    return Heads(count, kv, first.head_size if own_size else hidden // count)


def no_decoder(kind: str) -> str:
    """What is wrong with ``decoder_layers`` for a model of encoders alone."""
    return f"student.decoder_layers: a {kind} model has no decoder; write layers"


def _fields(stack: Stack, hidden: int, heads: Heads, ffn: int) -> dict[str, Any]:
    """What the configuration of the student says otherwise of a stack, but for its depth."""
    values = {"width": hidden, "heads": heads.count, "kv_heads": heads.kv, "head_size": heads.size, "ffn": ffn}
    return {stack.fields[what]: value for what, value in values.items() if what in stack.fields}


def _stack_kept(
    stack: Stack, blocks: Sequence[int], heads: Heads, ffn: int, scores: Mapping[str, Tensor]
) -> dict[str, Sequence[int]]:
    """The channels of queries, of keys and values, and of feed-forward parts that stay, by the name of their axis."""
    import torch

    kept: dict[str, Sequence[int]] = {}
    for block in (stack.blocks[number] for number in blocks):
        for part in block.attentions:
            alike = [part]
            if part.positions == "relative":  # one table of positions serves the heads of all blocks
                alike = [other for block in stack.blocks for other in block.attentions if not other.cross]
            matters = [_scores(scores, other.output, other.heads * other.head_size) for other in alike]
            queries, keys = _attention(part, heads, torch.stack(matters).sum(0))
            kept[part.output] = queries.tolist()
            if not part.fused:
                kept[part.key] = keys.tolist()
        name = width.ffn_name(block)
        kept[name] = choose(_scores(scores, name, block.ffn.width), ffn)
    first = stack.blocks[0].attentions[0]
    for name in _tables(stack):
        kept[name] = [channel // first.head_size for channel in kept[first.output][:: first.head_size]]
    return kept


def _attention(part: Attention, heads: Heads, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The channels of queries, and of keys and values, that are kept: whole heads, with those that share a head of keys
    and values together; where heads become smaller their first channels, where they become larger several in one."""
    import torch

    size = part.head_size
    matters = scores.view(part.heads, size).mean(1)
    group = part.heads // part.kv_heads
    wanted = -(-heads.count * heads.size // size) if heads.size > size else heads.count
    if group == 1:
        chosen = chosen_kv = torch.tensor(choose(matters, wanted))
    elif heads.count % group == 0 and heads.kv == heads.count // group:
        chosen_kv = torch.tensor(choose(matters.view(part.kv_heads, group).mean(1), heads.kv))
        chosen = (chosen_kv[:, None] * group + torch.arange(group)).flatten()
    else:
        chosen_kv = torch.arange(part.kv_heads)
        each = heads.count // heads.kv
        chosen = torch.tensor(choose(matters, each * part.kv_heads, part.kv_heads))
    within = min(size, heads.size)
    both = [(heads_of[:, None] * size + torch.arange(within)).flatten() for heads_of in (chosen, chosen_kv)]
    return both[0][: heads.count * heads.size], both[1][: heads.kv * heads.size]


def _scores(scores: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    import torch

    return scores.get(name, torch.zeros(size)).cpu()


def _not_above(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise StepError(
            f"student.{name} {value} is more than the teacher's {limit}; write at most {limit}, or give the student a "
            "config of its own"
        )


def apply(teacher: nn.Module, plan: StudentPlan) -> nn.Module:
    """The student that ``plan`` describes.

    Raises:
        StepError: the sizes do not go together for this architecture.
    """
    parts = anatomy(teacher)
    config = width.config_of(teacher.config, parts, plan.fields)
    try:
        every = axes(teacher, parts, config)
        kept = plan.kept | {axis.name: plan.kept[width.STREAM] for axis in every if axis.part == "hidden"}
        going = [axis for axis in every if axis.name in kept and len(kept[axis.name]) < axis.size]
        state = cut.state_of(teacher, [place.tensor for axis in going for place in axis.places])
        state = depth.cut(cut.cut(state, going, kept), parts.stacks, plan.blocks)
        return cut.rebuild(teacher, depth.config_of(config, parts.stacks, plan.blocks), state)
    except (ValueError, RuntimeError) as error:
        raise StepError(
            f"student: these sizes do not go together: {error}; change hidden or heads, or give the student a config"
        ) from error


def axes(teacher: nn.Module, parts: Anatomy, config: Any) -> list[Axis]:
    """What can be left out, channel by channel: queries with what reads them, keys and values, heads of a table of
    positions, feed-forward channels, and the numbers between the blocks, which ``config`` has fewer of.

    Unlike in structured pruning heads may become smaller and go by single channels.
    """
    narrow = _narrow(teacher, parts)
    claimed = {(place.tensor, place.dim) for axis in narrow for place in axis.places}
    return [*narrow, *width.hidden_axes(teacher, parts, config, claimed)]


def _narrow(teacher: nn.Module, parts: Anatomy) -> list[Axis]:
    layers = width.layers_of(teacher)
    found = list(width.ffn_axes(teacher, parts))
    for stack in parts.stacks:
        for part in (part for block in stack.blocks for part in block.attentions):
            queries = width.outputs(layers[part.query], segments=3 if part.fused else 1)
            places = (*queries, *width.inputs(layers[part.output]))
            size = part.heads * part.head_size
            found.append(Axis(part.output, "heads", size, places, (Source(part.output, "input"),)))
            if not part.fused:
                keys = tuple(place for name in (part.key, part.value) for place in width.outputs(layers[name]))
                found.append(Axis(part.key, "heads", part.kv_heads * part.head_size, keys, ()))
        heads = stack.blocks[0].attentions[0].heads
        found += [Axis(name, "heads", heads, (Place(f"{name}.weight", 1),), ()) for name in _tables(stack)]
    return found


def _stream(parts: Anatomy) -> Axis:
    """The numbers between the blocks, seen where attention and feed-forward parts read them."""
    readers = [part.query for block in parts.blocks for part in block.attentions]
    readers += [block.ffn.up for block in parts.blocks]
    sources = tuple(Source(name, "input") for name in readers)
    return Axis(width.STREAM, "hidden", parts.stacks[0].width, (), sources)


def _tables(stack: Stack) -> list[str]:
    return [name for name, what in stack.embeddings.items() if what == "relative positions"]
