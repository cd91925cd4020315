"""Shallower models: whole blocks go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specs.schema.steps.prune import Side
from tasks.compress.cut import configured
from tasks.context import StepError

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.models.anatomy import Anatomy, Stack

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Fields with an entry for every block."""

_COUNTS_BLOCKS: Mapping[str, str] = {
    "scale_attn_by_inverse_layer_idx": "its attention is scaled by the number of the block, which would be another",
}
"""Fields by which a block works otherwise at another place."""


def chosen(config: Any, anatomy: Anatomy, asked: Sequence[Side]) -> tuple[Stack, ...]:
    """The stacks whose blocks may go.

    Raises:
        StepError: there is no such stack, it has one block alone, or blocks cannot move.
    """
    for name, reason in _COUNTS_BLOCKS.items():
        if getattr(config, name, False):
            raise StepError(f"method: depth cannot take this {anatomy.model_type} model: {reason}; use method: width")
    roles = [stack.role for stack in anatomy.stacks]
    for role in asked:
        if role not in roles:
            raise StepError(
                f"stacks: this {anatomy.model_type} model has no {role}; write stacks: [{', '.join(roles)}]"
            )
    stacks = tuple(stack for stack in anatomy.stacks if stack.role in (asked or roles))
    if all(len(stack.blocks) == 1 for stack in stacks):
        which = " and ".join(stack.role for stack in stacks)
        raise StepError(f"method: depth leaves at least one block, and the {which} has no more; use method: width")
    return stacks


def shape(stacks: Sequence[Stack], share: float) -> dict[str, int]:
    """The depths of a model of which about ``share`` of the blocks is kept, in every stack at least one."""
    return {stack.fields["depth"]: max(1, int(share * len(stack.blocks) + 0.5)) for stack in stacks}


def plan(stacks: Sequence[Stack], scores: Mapping[str, float], fields: Mapping[str, int]) -> dict[str, list[int]]:
    """The blocks that stay, ascending, by the name of their stack; of equal ones the later go."""
    kept = {}
    for stack in stacks:
        order = sorted(stack.blocks, key=lambda block: (-scores[block.name], block.index))
        kept[stack.name] = sorted(block.index for block in order[: fields[stack.fields["depth"]]])
    return kept


def config_of(config: Any, stacks: Sequence[Stack], kept: Mapping[str, Sequence[int]]) -> Any:
    """The configuration of a model with the blocks ``kept``; lists with an entry for each block are cut too."""
    fields: dict[str, Any] = {stack.fields["depth"]: len(kept[stack.name]) for stack in stacks}
    for name in PER_LAYER:
        entries = getattr(config, name, None) or ()
        stack = next((stack for stack in stacks if len(entries) == len(stack.blocks)), None)
        if stack is not None:
            fields[name] = [entries[index] for index in kept[stack.name]]
    return configured(config, fields)


def cut(state: Mapping[str, Tensor], stacks: Sequence[Stack], kept: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The tensors of the blocks that stay, under their new numbers, and all that belongs to no block.

    What the first block alone has (T5's table of relative positions, which all blocks use) stays in the first block.
    """
    changed = dict(state)
    for stack in stacks:
        pattern = re.compile(rf"{re.escape(stack.name)}\.(\d+)\.(.+)")
        blocks: dict[int, dict[str, Tensor]] = {}
        for name in state:
            match = pattern.fullmatch(name)
            if match:
                blocks.setdefault(int(match[1]), {})[match[2]] = changed.pop(name)
        first = {name: tensor for name, tensor in blocks[0].items() if name not in blocks[len(blocks) - 1]}
        for place, index in enumerate(kept[stack.name]):
            owned = {name: tensor for name, tensor in blocks[index].items() if name not in first}
            owned |= first if place == 0 else {}
            changed |= {f"{stack.name}.{place}.{name}": tensor for name, tensor in owned.items()}
    return changed
