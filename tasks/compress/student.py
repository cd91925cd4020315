"""A student: a smaller model of the teacher's kind, made of the teacher's own weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specs.schema.steps.distill import StudentSpec
from tasks.context import StepError
from tasks.models.anatomy import Attention, Block, Stack, anatomy
from tasks.models.layout import linear_layers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tasks.data.encoded import Encoded


@dataclass(frozen=True)
class StackPlan:
    """What is kept of one stack.

    Args:
        role: of the stack.
        blocks: numbers of the teacher's blocks.
        queries, keys: by number of the block and name of the attention within it, the channels of queries and of keys
            and values that are kept.
        ffn: by number of the block, the channels of the feed-forward part.
    """

    role: str
    blocks: tuple[int, ...]
    queries: Mapping[str, Tensor]
    keys: Mapping[str, Tensor]
    ffn: Mapping[int, Tensor]


@dataclass(frozen=True)
class StudentPlan:
    """What is kept of a teacher: fields of the configuration, channels of the width, and the stacks' parts."""

    fields: Mapping[str, Any]
    width: Tensor
    stacks: tuple[StackPlan, ...]


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
    """The mean magnitude of what comes into each linear layer of the blocks, [D] by the layer's name."""
    from tasks.compress.calibrate import observe

    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, vectors: Tensor) -> None:
        sums[name] = sums.get(name, 0) + vectors.abs().sum(0)
        counts[name] = counts.get(name, 0) + len(vectors)

    observe(teacher, [name for block in anatomy(teacher).blocks for name in block.layers], data, see)
    return {name: total / counts[name] for name, total in sums.items()}


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
    import torch

    parts = anatomy(teacher)
    config: Any = teacher.config
    width = parts.stacks[0].width
    hidden = spec.hidden or width
    _not_above("hidden", hidden, width)
    fields: dict[str, Any] = {}
    stacks: list[StackPlan] = []
    totals = torch.zeros(width)
    for stack in parts.stacks:
        own = stack.role == "decoder" and spec.decoder_layers is not None
        depth = len(stack.blocks)
        kept = (spec.decoder_layers if own else spec.layers) or depth
        _not_above("decoder_layers" if own else "layers", kept, depth)
        blocks = picked(kept, depth)
        heads = _heads(stack, spec, hidden, width, config)
        ffn = spec.ffn or (stack.blocks[0].ffn.width * hidden // width)
        _not_above("ffn", ffn, stack.blocks[0].ffn.width)
        for block in stack.blocks:
            for attention in block.attentions:
                totals += scores.get(attention.query, 0)
            totals += scores.get(block.ffn.up, 0)
        fields |= _fields(stack, config, len(blocks), hidden, heads, ffn)
        stacks.append(_stack_plan(stack, blocks, heads, ffn, scores))
    groups = _groups(teacher, width)
    if hidden % groups:
        raise StepError(
            f"student.hidden {hidden} is no multiple of the {groups} groups of the model's convolution; write for "
            f"example {max(groups, hidden // groups * groups)}"
        )
    return StudentPlan(fields, _most(totals.cpu(), hidden, groups), tuple(stacks))


@dataclass(frozen=True)
class Heads:
    """The attention heads of a student: how many, how many of keys and values, and their size."""

    count: int
    kv: int
    size: int


def _heads(stack: Stack, spec: StudentSpec, hidden: int, width: int, config: Any) -> Heads:
    first = stack.blocks[0].attentions[0]
    own_size = "head_size" in stack.fields
    if spec.heads is not None:
        count = spec.heads
    elif own_size:
        count = max(1, first.heads * hidden // width)
        count = next(n for n in range(count, 0, -1) if n % first.kv_heads == 0 or first.kv_heads % n == 0)
    else:
        count = hidden // first.head_size if hidden % first.head_size == 0 else first.heads
    _not_above("heads", count, first.heads)
    if not own_size and hidden % count:
        fitting = [n for n in range(1, first.heads + 1) if hidden % n == 0]
        raise StepError(
            f"student.heads: {count} heads do not divide the width {hidden}; write one of "
            f"{', '.join(map(str, fitting))}"
        )
    group = first.heads // first.kv_heads
    kv = count // group if count % group == 0 else first.kv_heads
    if count % kv:
        raise StepError(
            f"student.heads: {count} heads cannot share the teacher's {first.kv_heads} heads of keys and values; write "
            f"a multiple of {group} or of {first.kv_heads}"
        )
    return Heads(count, kv, first.head_size if own_size else hidden // count)


def _fields(stack: Stack, config: Any, depth: int, hidden: int, heads: Heads, ffn: int) -> dict[str, Any]:
    """What the configuration of the student says otherwise."""
    values = {"depth": depth, "width": hidden, "heads": heads.count, "kv_heads": heads.kv, "head_size": heads.size}
    fields = {stack.fields[what]: value for what, value in values.items() if what in stack.fields}
    return fields | {stack.fields["ffn"]: ffn}


def _stack_plan(
    stack: Stack, blocks: tuple[int, ...], heads: Heads, ffn: int, scores: Mapping[str, Tensor]
) -> StackPlan:
    import torch

    queries: dict[str, Tensor] = {}
    keys: dict[str, Tensor] = {}
    channels: dict[int, Tensor] = {}
    for number in blocks:
        block = stack.blocks[number]
        for attention in block.attentions:
            alike = [attention]
            if attention.positions == "relative":  # one table of positions serves the heads of all blocks
                alike = [other for block in stack.blocks for other in block.attentions if not other.cross]
            matters = [_scores(scores, other.output, other.heads * other.head_size) for other in alike]
            queries[attention.name], keys[attention.name] = _attention(attention, heads, torch.stack(matters).sum(0))
        channels[number] = _most(_scores(scores, block.ffn.down, block.ffn.width), ffn)
    return StackPlan(stack.role, blocks, queries, keys, channels)


def _attention(part: Attention, heads: Heads, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The channels of queries, and of keys and values, that are kept: whole heads, with those that share a head of keys
    and values together; where heads become smaller their first channels, where they become larger several in one."""
    import torch

    size = part.head_size
    matters = scores.view(part.heads, size).mean(1)
    group = part.heads // part.kv_heads
    wanted = -(-heads.count * heads.size // size) if heads.size > size else heads.count
    if group == 1:
        chosen = chosen_kv = _most(matters, wanted)
    elif heads.count % group == 0 and heads.kv == heads.count // group:
        chosen_kv = _most(matters.view(part.kv_heads, group).mean(1), heads.kv)
        chosen = (chosen_kv[:, None] * group + torch.arange(group)).flatten()
    else:
        chosen_kv = torch.arange(part.kv_heads)
        each = heads.count // heads.kv
        chosen = torch.cat([at * group + _most(matters.view(-1, group)[at], each) for at in range(part.kv_heads)])
    within = min(size, heads.size)
    both = [(heads_of[:, None] * size + torch.arange(within)).flatten() for heads_of in (chosen, chosen_kv)]
    return both[0][: heads.count * heads.size], both[1][: heads.kv * heads.size]


def _scores(scores: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    import torch

    return scores.get(name, torch.zeros(size)).cpu()


def _most(scores: Tensor, count: int, groups: int = 1) -> Tensor:
    """The places of the ``count`` largest scores, ascending, as many from each of ``groups`` equal parts; of equal ones
    the first."""
    import torch

    order = torch.argsort(scores.view(groups, -1), dim=1, descending=True, stable=True)[:, : count // groups]
    starts = torch.arange(groups)[:, None] * (len(scores) // groups)
    return (order.sort(1).values + starts).flatten()


def _groups(teacher: nn.Module, width: int) -> int:
    """In how many groups a convolution over the vectors between blocks treats their channels; 1 where there is none."""
    from torch import nn

    found = [m.groups for m in teacher.modules() if isinstance(m, nn.Conv1d) and m.in_channels == width]
    return max(found, default=1)


def _not_above(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise StepError(
            f"student.{name} {value} is more than the teacher's {limit}; write at most {limit}, or give the student a "
            "config of its own"
        )


@dataclass(frozen=True)
class _Cut:
    """What is kept of the rows and columns of a tensor; None for all."""

    rows: Tensor | None = None
    columns: Tensor | None = None


def apply(teacher: nn.Module, plan: StudentPlan) -> nn.Module:
    """The student that ``plan`` describes.

    Raises:
        StepError: the sizes do not go together for this architecture.
    """
    import torch

    config: Any = copy.deepcopy(teacher.config)
    for name, value in plan.fields.items():
        setattr(config, name, value)
    # What transformers has derived for each layer must follow the new depth.
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[at] for at in plan.stacks[-1].blocks]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what is computed and not copied is the same every time
            student = type(teacher)(config)  # type: ignore[arg-type]
    except (ValueError, RuntimeError) as error:
        raise StepError(f"student: these sizes do not go together: {error}; change hidden or heads") from error
    source = dict(teacher.state_dict())
    cuts = _cuts(teacher, plan)
    names = _renamed(teacher, plan)
    computed = set(getattr(student, "_keys_to_ignore_on_save", None) or ())
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            if name not in computed:
                origin = names(name)
                tensor.copy_(_fit(source[origin], tensor, cuts.get(origin), plan.width, name))
        _rescale(student, source)
    if hasattr(teacher, "generation_config"):
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def _renamed(teacher: nn.Module, plan: StudentPlan) -> Any:
    """From a name in the student to the name in the teacher."""
    moved = {
        f"{stack.name}.{new}.": f"{stack.name}.{old}."
        for stack, kept in zip(anatomy(teacher).stacks, plan.stacks, strict=True)
        for new, old in enumerate(kept.blocks)
    }

    def origin(name: str) -> str:
        for new, old in moved.items():
            if name.startswith(new):
                return old + name.removeprefix(new)
        return name

    return origin


def _cuts(teacher: nn.Module, plan: StudentPlan) -> dict[str, _Cut]:
    """What is kept of the outputs (rows) and inputs (columns) of the blocks' layers, by the name of the weight."""
    import torch

    layers = {layer.name: layer for layer in linear_layers(teacher)}
    cuts: dict[str, _Cut] = {}

    def cut(name: str, rows: Tensor | None, columns: Tensor | None) -> None:
        turned = layers[name].kind == "conv1d"
        cuts[f"{name}.weight"] = _Cut(columns, rows) if turned else _Cut(rows, columns)
        cuts[f"{name}.bias"] = _Cut(rows)

    for stack, kept in zip(anatomy(teacher).stacks, plan.stacks, strict=True):
        first = stack.blocks[0].attentions[0]
        heads = kept.queries[first.name][:: first.head_size] // first.head_size
        tables = [name for name, what in stack.embeddings.items() if what == "relative positions"]
        cuts |= {f"{name}.weight": _Cut(None, heads) for name in tables}
        for number in kept.blocks:
            block: Block = stack.blocks[number]
            for part in block.attentions:
                queries, keys = kept.queries[part.name], kept.keys[part.name]
                if part.fused:
                    size = part.heads * part.head_size
                    cut(part.query, torch.cat([queries + at * size for at in range(3)]), plan.width)
                else:
                    cut(part.query, queries, plan.width)
                    cut(part.key, keys, plan.width)
                    cut(part.value, keys, plan.width)
                cut(part.output, plan.width, queries)
            for name in (block.ffn.up, block.ffn.gate):
                if name is not None:
                    cut(name, kept.ffn[number], plan.width)
            cut(block.ffn.down, plan.width, kept.ffn[number])
    return cuts


def _fit(source: Tensor, target: Tensor, cut: _Cut | None, width: Tensor, name: str) -> Tensor:
    """What the student keeps of a tensor of the teacher."""
    if cut is not None:
        found = source if cut.rows is None else source[cut.rows]
        found = found if cut.columns is None or found.ndim < 2 else found[:, cut.columns]
    else:
        found = source
        for at, (old, new) in enumerate(zip(source.shape, target.shape, strict=True)):
            if old != new and new == len(width):
                found = found.index_select(at, width)
            elif old != new and at == 1 and source.ndim == 3:
                found = _grouped(found, width, old, new)
    if found.shape != target.shape:
        raise StepError(
            f"student: {name} of {tuple(source.shape)} cannot be cut to {tuple(target.shape)}; change the other sizes, "
            "or give the student a config of its own"
        )
    return found


def _rescale(student: nn.Module, source: Mapping[str, Tensor]) -> None:
    """Where a weight is stored as lengths and directions, shorten the lengths by what the cut has left out."""
    state = student.state_dict()
    for name, directions in state.items():
        if name.endswith("parametrizations.weight.original1"):
            lengths = state[f"{name.removesuffix('1')}0"]
            over = [at for at, size in enumerate(lengths.shape) if size == 1]
            lengths.mul_(directions.norm(dim=over, keepdim=True) / source[name].norm(dim=over, keepdim=True))


def _grouped(found: Tensor, width: Tensor, old: int, new: int) -> Tensor:
    """The inputs that are kept of a convolution in groups, [O, I, K]: of every output those of its own group."""
    import torch

    groups = len(width) // new
    local = (width.view(groups, new) % old)[torch.arange(len(width)) // new]
    return found.gather(1, local[:, :, None].expand(-1, -1, found.shape[2]))
