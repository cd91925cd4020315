"""Which layers share an input, what makes that input, and moving a scale from one to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.models.anatomy import Anatomy, Attention, Block, Stack
from tasks.models.layout import linear_layers

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Source:
    """What makes an input: a normalisation, or rows of a linear layer from ``start`` on."""

    name: str
    start: int = 0


@dataclass(frozen=True)
class Shared:
    """Linear layers that read the same input.

    Args:
        layers: their names.
        source: what can give the scaled input instead, as nothing else reads it; None where there is no such thing.
        entry: whether the input is that of an attention or a feed-forward part, and not from within one.
    """

    layers: tuple[str, ...]
    source: Source | None
    entry: bool


def shared_inputs(parts: Anatomy) -> dict[str, tuple[Shared, ...]]:
    """By the name of each block, the layers that share an input."""
    return {block.name: tuple(_of_block(block, stack)) for stack in parts.stacks for block in stack.blocks}


def _of_block(block: Block, stack: Stack) -> list[Shared]:
    found = []
    for attention in block.attentions:
        norm = Source(attention.norms[0]) if stack.norm_first and attention.norms else None
        if attention.cross:
            found.append(Shared((attention.query,), norm, True))
            found.append(Shared((attention.key, attention.value), None, True))
        else:
            names = tuple(dict.fromkeys((attention.query, attention.key, attention.value)))
            found.append(Shared(names, norm, True))
        found.append(Shared((attention.output,), _values(attention), False))
    ffn = block.ffn
    norm = Source(ffn.norms[0]) if stack.norm_first and ffn.norms else None
    found.append(Shared(tuple(name for name in (ffn.gate, ffn.up) if name), norm, True))
    # act(gate(x)) * up(x) takes a scale of up through, and so does ReLU; other activations bend it.
    through = ffn.gate is not None or ffn.activation == "relu"
    found.append(Shared((ffn.down,), Source(ffn.up) if through else None, False))
    return found


def _values(attention: Attention) -> Source | None:
    """The rows that make an attention's values; None where several heads share them."""
    if attention.heads != attention.kv_heads:
        return None
    size = attention.heads * attention.head_size
    return Source(attention.value, 2 * size if attention.fused else 0)


def move(network: nn.Module, shared: Shared, scale: Tensor) -> bool:
    """Multiply the columns of the layers by ``scale`` and divide their input by it, in place; the model computes the
    same as before.

    Args:
        network: a model with float weights.
        shared: the layers.
        scale: float [columns], all above 0.

    Returns:
        Whether the input is divided now; where not, whoever uses the layers has to do it.
    """
    import torch

    layers = {layer.name: layer for layer in linear_layers(network)}
    with torch.no_grad():
        for name in shared.layers:
            layers[name].matrix.mul_(scale)
        if shared.source is None:
            return False
        source: Any = network.get_submodule(shared.source.name)
        rows = slice(shared.source.start, shared.source.start + len(scale))
        if shared.source.name in layers:
            layers[shared.source.name].matrix[rows].div_(scale[:, None])
        else:
            source.weight[rows].div_(scale)
        if getattr(source, "bias", None) is not None:
            source.bias[rows].div_(scale)
    return True


def undivided(network: nn.Module, scales: Mapping[str, Tensor]) -> list[Any]:
    """Divide the inputs of layers by their ``scales`` while the model runs; the handles that end it."""

    def hook(scale: Tensor) -> Any:
        return lambda module, given: (given[0] / scale.to(given[0]), *given[1:])

    return [
        network.get_submodule(name).register_forward_pre_hook(hook(scale), prepend=True)
        for name, scale in scales.items()
    ]
