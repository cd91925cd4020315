"""What steps need to know of a model, in one form for every architecture: blocks, attention, feed-forward, norms,
embeddings, head and ties."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from specs.schema.suggest import nearest
from tasks.context import StepError
from tasks.models.applications import Family, family_of
from tasks.models.layout import linear_layers, tied_weights
from tasks.models.patterns import PATTERNS, AttentionPattern, Pattern, Positions, StackPattern

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Attention:
    """One attention. Names are those of modules in the model.

    Args:
        name: the attention itself.
        query: the linear layers; the first three are one layer where the model computes them together (GPT-2), in the
            order query, key, value.
        heads: of the queries, ``kv_heads`` of keys and values, each of ``head_size`` numbers.
        positions: how it knows positions; None where keys and values come from the encoder.
        norms: normalisations that belong to it.
        cross: whether keys and values come from the encoder.
    """

    name: str
    query: str
    key: str
    value: str
    output: str
    heads: int
    kv_heads: int
    head_size: int
    positions: Positions | None
    norms: tuple[str, ...]
    cross: bool

    @property
    def fused(self) -> bool:
        """Whether one layer gives queries, keys and values."""
        return self.query == self.key

    @property
    def layers(self) -> tuple[str, ...]:
        """Its linear layers, each once."""
        return tuple(dict.fromkeys((self.query, self.key, self.value, self.output)))


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward part of a block: ``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` where it has a gate."""

    up: str
    gate: str | None
    down: str
    width: int
    activation: str
    norms: tuple[str, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Its linear layers."""
        return tuple(name for name in (self.gate, self.up, self.down) if name is not None)


@dataclass(frozen=True)
class Block:
    """One block of a stack, counted from 0."""

    name: str
    index: int
    attentions: tuple[Attention, ...]
    ffn: FeedForward

    @property
    def layers(self) -> tuple[str, ...]:
        """Its linear layers."""
        return tuple(name for part in (*self.attentions, self.ffn) for name in part.layers)


@dataclass(frozen=True)
class Stack:
    """Blocks that follow each other.

    Args:
        role: encoder or decoder.
        name: the list that holds the blocks.
        width: of the vectors between the blocks.
        norm_first: whether blocks normalise what goes in, not what comes out.
        positions: how it knows positions.
        norms: normalisations outside the blocks.
        embeddings: the tables of this stack, to what they hold: tokens, positions, types or relative positions.
        fields: what the configuration calls depth, width, heads, kv_heads, head_size, ffn and activation.
    """

    role: Literal["encoder", "decoder"]
    name: str
    blocks: tuple[Block, ...]
    width: int
    norm_first: bool
    positions: Positions
    norms: tuple[str, ...]
    embeddings: Mapping[str, str]
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Anatomy:
    """A model's parts.

    Args:
        model_type: as the configuration says.
        family: how it works.
        stacks: encoder first.
        embeddings: every table, to what it holds.
        head: the linear layers behind the last block that give the output.
        pooler: those between the last block and the head.
        front: modules that make frames of audio: convolutions and the projection behind them.
        front_layers: the linear layers among them.
        inner: layers whose output no other layer sees but the one that is named for each, in the front and between the
            last block and the output.
        ties: parameter to the parameter that it is.
    """

    model_type: str
    family: Family
    stacks: tuple[Stack, ...]
    embeddings: Mapping[str, str]
    head: tuple[str, ...]
    pooler: tuple[str, ...]
    front: tuple[str, ...]
    front_layers: tuple[str, ...]
    inner: Mapping[str, str]
    ties: Mapping[str, str]

    @property
    def blocks(self) -> Iterator[Block]:
        """The blocks of all stacks."""
        return (block for stack in self.stacks for block in stack.blocks)


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of a transformers model.

    Raises:
        StepError: its model type is not described, or it is not built as described.
    """
    config: Any = model.config
    kind = config.model_type
    if kind not in PATTERNS:
        raise StepError(
            f"the parts of {kind} models are not described, so that this step cannot change them; "
            f"{nearest(kind, sorted(PATTERNS))}"
        )
    return _Reader(model, PATTERNS[kind]).read()


class _Reader:
    """Finds what a pattern names in a model, and what no pattern named."""

    def __init__(self, model: nn.Module, pattern: Pattern) -> None:
        from torch import nn

        self.config: Any = model.config
        self.pattern = pattern
        self.modules = dict(model.named_modules())
        self.linear = {layer.name: layer for layer in linear_layers(model)}
        self.tables = [name for name, module in self.modules.items() if isinstance(module, nn.Embedding)]
        self.ties = tied_weights(model)
        prefix = getattr(model, "base_model_prefix", "")
        self.base = f"{prefix}." if prefix and hasattr(model, prefix) else ""

    def read(self) -> Anatomy:
        stacks = tuple(self._stack(stack) for stack in self.pattern.stacks)
        front = self._present(self.base, self.pattern.front)
        pooler = self._present(self.base, self.pattern.pooler)
        within = {"front": self._under(front), "pooler": self._under(pooler)}
        claimed = [name for stack in stacks for block in stack.blocks for name in block.layers]
        claimed += [name for names in within.values() for name in names]
        head = tuple(name for name in self.linear if name not in claimed and self._outside(name))
        lost = [name for name in self.linear if name not in {*claimed, *head}]
        embeddings = {name: what for stack in stacks for name, what in stack.embeddings.items()}
        embeddings |= self._tables(self.base, self.pattern.embeddings)
        lost += [name for name in self.tables if name not in embeddings]
        if lost or len(set(claimed)) != len(claimed):
            raise StepError(
                f"this {self.config.model_type} model is not built as its type is: {', '.join(lost[:3])} has no known "
                "use; a step that changes parts of a model cannot take it"
            )
        return Anatomy(
            model_type=self.config.model_type,
            family=family_of(self.config),
            stacks=stacks,
            embeddings=embeddings,
            head=head,
            pooler=within["pooler"],
            front=front,
            front_layers=within["front"],
            inner={f"{self.base}{name}": f"{self.base}{next}" for name, next in self.pattern.inner.items()}
            | dict(pairwise((*within["pooler"], *head))),
            ties=self.ties,
        )

    def _stack(self, pattern: StackPattern) -> Stack:
        at = f"{self.base}{pattern.at}." if pattern.at else self.base
        name = f"{at}{pattern.blocks}"
        depth = len(self._module(name))  # type: ignore[arg-type]
        relative = {
            table: "relative positions"
            for table in self.tables
            if table.startswith(f"{name}.") and table.endswith("relative_attention_bias")
        }
        first = pattern.norm_first
        return Stack(
            role=pattern.role,
            name=name,
            blocks=tuple(self._block(f"{name}.{index}", index, pattern) for index in range(depth)),
            width=getattr(self.config, pattern.fields["width"]),
            norm_first=bool(getattr(self.config, first)) if isinstance(first, str) else first,
            positions=pattern.positions,
            norms=self._present(at, pattern.norms),
            embeddings=self._tables(at, pattern.embeddings) | relative,
            fields=pattern.fields,
        )

    def _block(self, name: str, index: int, pattern: StackPattern) -> Block:
        up = next((f"{name}.{part}" for part in pattern.up if f"{name}.{part}" in self.linear), "")
        gate = f"{name}.{pattern.gate}" if f"{name}.{pattern.gate}" in self.linear else None
        down = f"{name}.{pattern.down}"
        for layer in (up, down):
            self._layer(layer)
        return Block(
            name=name,
            index=index,
            attentions=tuple(self._attention(name, part, pattern) for part in pattern.attentions),
            ffn=FeedForward(
                up=up,
                gate=gate,
                down=down,
                width=self.linear[up].shape[0],
                activation=str(getattr(self.config, pattern.fields["activation"])),
                norms=self._present(f"{name}.", pattern.ffn_norms),
            ),
        )

    def _attention(self, block: str, pattern: AttentionPattern, stack: StackPattern) -> Attention:
        at = f"{block}.{pattern.at}"
        query, key, value, output = (
            f"{at}.{part}" for part in (pattern.query, pattern.key, pattern.value, pattern.output)
        )
        for layer in (query, key, value, output):
            self._layer(layer)
        parts = 3 if query == key else 1
        heads = getattr(self.config, stack.fields["heads"])
        size = self.linear[query].shape[0] // parts // heads
        return Attention(
            name=at,
            query=query,
            key=key,
            value=value,
            output=output,
            heads=heads,
            kv_heads=self.linear[key].shape[0] // parts // size,
            head_size=size,
            positions=None if pattern.cross else stack.positions,
            norms=self._present(f"{block}.", pattern.norms),
            cross=pattern.cross,
        )

    def _module(self, name: str) -> nn.Module:
        if name not in self.modules:
            raise StepError(f"this {self.config.model_type} model is not built as its type is: it has no {name}")
        return self.modules[name]

    def _layer(self, name: str) -> None:
        """Refuse what is no linear layer, for example because its weights are packed."""
        module = self._module(name)
        if name not in self.linear:
            raise StepError(
                f"{name} is a {type(module).__name__} and no linear layer of floats any more; put this step before the "
                "one that replaced it"
            )

    def _tables(self, at: str, named: Mapping[str, str]) -> dict[str, str]:
        """Those that are tables of weights: a model may compute its positions instead."""
        return {f"{at}{name}": what for name, what in named.items() if f"{at}{name}" in self.tables}

    def _present(self, at: str, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{at}{name}" for name in names if f"{at}{name}" in self.modules)

    def _under(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(
            layer for layer in self.linear if any(layer == name or layer.startswith(f"{name}.") for name in names)
        )

    def _outside(self, name: str) -> bool:
        """Whether a layer stands behind the model's body: everything else of it is described."""
        return not name.startswith(self.base) if self.base else "." not in name
