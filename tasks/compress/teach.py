"""What a student minimises: the loss of the data, what the teacher says, and what it has inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specs.schema.base import Task
from tasks.compress.divergence import (
    Divergence,
    divergence,
    hidden_error,
    largest,
    log_shares,
    matched,
    relation_error,
    relation_heads,
)
from tasks.compress.reading import Batch, Reading, added, hard_losses, reader
from tasks.context import StepError
from tasks.models.anatomy import Attention, Stack, anatomy
from tasks.models.applications import Family

if TYPE_CHECKING:
    from torch import Tensor, nn

PROJECTIONS = "distillation_projections"
"""The child of the student that holds what fits its widths to the teacher's while it learns; not part of what is
saved."""

LOGS, CLASSES, LABELLED = "teacher_logs", "teacher_classes", "labelled"
"""What stands in a batch beside the data: the teacher's log-probabilities of the batch's units, the classes that they
are of where these are not all, and whether an example's own label counts, bool [B]."""


@dataclass(frozen=True)
class Comparison:
    """How a student is compared with its teacher.

    Args:
        task, family: what both do, and how.
        alpha: share of the loss of the data.
        temperature, kind, skew: see ``tasks.compress.divergence``.
        top_k: classes of the teacher that are kept where its outputs are.
        smoothing: label smoothing of the loss of the data.
        class_weights: what an example of each class counts, [C]; of several labels, what having each counts against
            not having it, in the loss of the data.
        several: whether an example may have several labels.
        order: the teacher's class for each class of the student, int64 [C]; None where they are the same.
        reads: the teacher's token for each token that the student is given, int64 [V]; None where they are the same.
    """

    task: Task
    family: Family
    alpha: float = 0.5
    temperature: float = 2.0
    kind: Divergence = "forward"
    skew: float = 0.1
    top_k: int | None = None
    smoothing: float = 0.0
    class_weights: Tensor | None = None
    several: bool = False
    order: Tensor | None = None
    reads: Tensor | None = None

    def asked(self, batch: Batch) -> Batch:
        """What the teacher is given of a batch: the same in its own tokens."""
        asked = dict(batch)
        if self.reads is not None and "input_ids" in batch:
            asked["input_ids"] = self.reads[batch["input_ids"]]
        if self.order is not None and self.task != "text-classification" and "labels" in batch:
            labels = batch["labels"]
            asked["labels"] = self.order[labels.clamp(min=0)].where(labels >= 0, labels)
        return asked

    def said(self, reading: Reading, top_k: int | None) -> tuple[Tensor, Tensor | None]:
        """The teacher's log-probabilities of the units of a batch, and the classes that they are of; the ``top_k``
        largest ones with the rest as one."""
        logits = reading.logits if self.order is None else reading.logits[:, self.order]
        classes = None if top_k is None or self.several else largest(logits, top_k)
        return log_shares(logits, self.temperature, classes, several=self.several), classes


@dataclass(frozen=True)
class Pair:
    """Two blocks whose outputs are compared; ``projection`` fits the student's vectors to the teacher's width."""

    role: str
    student: str
    teacher: str
    projection: str


@dataclass(frozen=True)
class Relation:
    """Two attentions whose queries, keys and values are compared, in so many relation heads."""

    role: str
    student: Attention
    teacher: Attention
    heads: int


@dataclass(frozen=True)
class Inside:
    """What is compared of the inside, and what each part counts; empty where nothing is."""

    pairs: tuple[Pair, ...] = ()
    relations: tuple[Relation, ...] = ()
    hidden: float = 0.0
    relation: float = 0.0

    def names(self, side: str) -> list[str]:
        """The modules of the ``student`` or the ``teacher`` whose outputs are needed."""
        attentions = [getattr(relation, side) for relation in self.relations]
        parts = [name for part in attentions for name in (part.query, part.key, part.value)]
        return list(dict.fromkeys([*(getattr(pair, side) for pair in self.pairs), *parts]))


@dataclass(frozen=True)
class Teaching:
    """A loss for ``tasks.finetune.loop.train``: ``alpha · CE + (1 − alpha) · T² · KL`` for every unit, and the mean
    over the units of the batch; where an example has no label the KL alone.

    The factor T² keeps the gradient of the KL at the size that it has for T = 1 (Hinton et al., 1503.02531). The
    teacher runs in eval mode and without gradients, and all softmaxes are in float32. Frames of CTC count together as
    one unit for each recording. The losses of the inside are means over the real positions of each example, and an
    example counts as many as it has units, so that batches of any size add up exactly.

    Args:
        comparison: how.
        teacher: the model that teaches; None where every batch comes with its outputs.
        inside: what is compared of the inside.
        write: makes another batch of one: what the student writes itself; None where it never does.
        write_share: share of the batches for which it does, drawn from torch's generator.
    """

    comparison: Comparison
    teacher: nn.Module | None
    inside: Inside = field(default_factory=Inside)
    write: Any = None
    write_share: float = 0.0

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        import torch

        how = self.comparison
        given = dict(batch)
        kept, classes, labelled = (given.pop(name, None) for name in (LOGS, CLASSES, LABELLED))
        if self.write is not None and float(torch.rand(())) < self.write_share:
            given, kept, labelled = self.write(model, given), None, torch.zeros(len(next(iter(given.values()))))
        read = reader(how.task, how.family)
        with _watched(model, self.inside.names("student")) as ours:
            reading = read(model, given)
        theirs: dict[str, Tensor] = {}
        if kept is None or self.inside.names("teacher"):
            kept, classes, theirs = self._ask(given)
        logs = log_shares(reading.logits, how.temperature, classes, several=how.several)
        examples = len(next(iter(given.values())))
        soft = added(divergence(kept, logs, how.kind, how.skew) * reading.share, reading.owner, examples)
        counts = added(reading.share, reading.owner, examples)
        weights = None if how.class_weights is None else how.class_weights.to(soft)
        hard, known = hard_losses(reading, given, model, how.smoothing, weights if how.several else None)
        if labelled is not None:
            known = known & labelled.to(known.device).bool()
        alpha = known * how.alpha
        losses = torch.where(known, alpha * hard, 0.0) + (1 - alpha) * how.temperature**2 * soft
        if self.inside.names("student"):
            losses = losses + counts * self._inside(model, reading, ours, theirs)
        if weights is not None and not how.several:
            counted = weights[given["labels"]]
            losses, counts = losses * counted, counts * counted
        return losses.sum(), counts.sum()

    def _ask(self, batch: Batch) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        import torch

        assert self.teacher is not None
        how = self.comparison
        with torch.no_grad(), _watched(self.teacher, self.inside.names("teacher")) as seen:
            return (*how.said(reader(how.task, how.family)(self.teacher, how.asked(batch)), None), seen)

    def _inside(
        self, model: nn.Module, reading: Reading, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
    ) -> Tensor:
        """The losses of the inside, [B]; a block that the student's layer drop has skipped is left out."""
        import torch

        projections: Any = getattr(model, PROJECTIONS, None)
        total = torch.zeros((), device=reading.logits.device)
        pairs = [pair for pair in self.inside.pairs if pair.student in ours]
        for pair in pairs:
            vectors, wanted = ours[pair.student].float(), theirs[pair.teacher].detach()
            projection = projections[pair.projection] if pair.projection else None
            vectors = vectors if projection is None else projection(vectors)
            error = hidden_error(vectors, wanted, _mask(reading, pair.role, wanted))
            total = total + self.inside.hidden / len(pairs) * error
        relations = [relation for relation in self.inside.relations if relation.student.query in ours]
        for relation in relations:
            both = [_parts(part, seen) for part, seen in ((relation.student, ours), (relation.teacher, theirs))]
            for one, other in zip(*both, strict=True):
                mask = _mask(reading, relation.role, other)
                error = relation_error(one, other.detach(), relation.heads, mask, relation.role == "decoder")
                total = total + self.inside.relation / (3 * len(relations)) * error
        return total


def plan_inside(
    student: nn.Module,
    teacher: nn.Module,
    hidden: float | None,
    relation: float | None,
    heads: int | None = None,
    layer: int | None = None,
) -> Inside:
    """Which parts of the two models are compared.

    Every block of the student goes with a block of the teacher, the last with the last, in every stack; of relations
    the student's last self-attention goes with that of the teacher's block ``layer``.

    Args:
        student, teacher: models of the same family.
        hidden, relation: what the losses count; None for no such loss.
        heads: relation heads.
        layer: the teacher's block, from 1; default: the last.

    Raises:
        StepError: the models' stacks are not alike, there is no such layer, or ``heads`` does not divide the widths.
    """
    if hidden is None and relation is None:
        return Inside()
    ours, theirs = anatomy(student), anatomy(teacher)
    roles = [[stack.role for stack in parts.stacks] for parts in (ours, theirs)]
    if roles[0] != roles[1]:
        raise StepError(
            f"the student's stacks are {', '.join(roles[0])} and the teacher's {', '.join(roles[1])}; leave hidden and "
            "relations out, or take a student of the teacher's family"
        )
    pairs: list[Pair] = []
    relations: list[Relation] = []
    for one, other in zip(ours.stacks, theirs.stacks, strict=True):
        for block, at in zip(one.blocks, matched(len(one.blocks), len(other.blocks)), strict=True):
            projection = f"{one.role}_{block.index}" if one.width != other.width else ""
            pairs.append(Pair(one.role, block.name, other.blocks[at].name, projection))
        if relation is not None:
            relations.append(_relation(student, teacher, one, other, heads, layer))
    return Inside(
        tuple(pairs) if hidden is not None else (), tuple(relations), hidden=hidden or 0.0, relation=relation or 0.0
    )


def add_projections(student: nn.Module, teacher: nn.Module, inside: Inside, generator: Any) -> None:
    """Give the student, for the time of its training, the linear maps from its widths to the teacher's."""
    from torch import nn
    from torch.nn.utils import skip_init

    wide = {stack.role: stack.width for stack in anatomy(teacher).stacks}
    narrow = {stack.role: stack.width for stack in anatomy(student).stacks}
    maps = nn.ModuleDict()
    for pair in inside.pairs:
        if pair.projection:
            layer: Any = skip_init(nn.Linear, narrow[pair.role], wide[pair.role], bias=False)
            nn.init.normal_(layer.weight, std=narrow[pair.role] ** -0.5, generator=generator)
            maps[pair.projection] = layer
    if len(maps):
        student.add_module(PROJECTIONS, maps)


def remove_projections(student: nn.Module) -> None:
    """Take them out again."""
    if hasattr(student, PROJECTIONS):
        delattr(student, PROJECTIONS)


def _relation(
    student: nn.Module, teacher: nn.Module, one: Stack, other: Stack, heads: int | None, layer: int | None
) -> Relation:
    at = layer or len(other.blocks)
    if at > len(other.blocks):
        raise StepError(
            f"relations.layer {at} is beyond the {len(other.blocks)} blocks of the teacher's {other.role}; write at "
            f"most {len(other.blocks)}"
        )
    ours, theirs = one.blocks[-1].attentions[0], other.blocks[at - 1].attentions[0]
    widths = [width for part in (ours, theirs) for width in (_width(part, part.heads), _width(part, part.kv_heads))]
    if heads is not None and any(width % heads for width in widths):
        best = relation_heads(widths, heads)
        raise StepError(
            f"relations.heads {heads} does not divide the widths {', '.join(map(str, dict.fromkeys(widths)))} of the "
            f"queries, keys and values; write for example {best}"
        )
    return Relation(one.role, ours, theirs, heads or relation_heads(widths, theirs.heads))


def _width(part: Attention, heads: int) -> int:
    return heads * part.head_size


def _parts(part: Attention, seen: Mapping[str, Tensor]) -> list[Tensor]:
    """Queries, keys and values, [B, T, D] each."""
    if part.fused:
        return list(seen[part.query].chunk(3, -1))
    return [seen[name] for name in (part.query, part.key, part.value)]


def _mask(reading: Reading, role: str, vectors: Tensor) -> Tensor:
    import torch

    shape = vectors.shape[:2]
    mask = reading.masks.get(role)
    return torch.ones(shape, dtype=torch.bool, device=vectors.device) if mask is None else mask


@contextmanager
def _watched(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the modules ``names`` by name, filled while the model runs."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def see(module: nn.Module, given: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return see

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
