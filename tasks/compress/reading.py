"""What a model says of a batch, in one form for all tasks: units that are scored, and what each of them counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specs.schema.base import Task
from tasks.data.collate import IGNORED
from tasks.finetune.objective import ctc_logits, ctc_losses, decoder_start
from tasks.models.applications import Family

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class Reading:
    """A model's word on a batch of B examples with U units: tokens, examples, or frames of real audio.

    Args:
        logits: of every unit, [U, C]; padding has none.
        owner: the example of each unit, int64 [U], ascending.
        share: what a unit counts of its example, float32 [U]: 1, or for a frame one over the frames of its recording.
        masks: by role of the stack, which positions are real, bool [B, T]; all are where a role is missing.
        labels: what the data has for each unit, [U] or for several labels [U, C]; None for CTC.
        frames: for CTC all logits, [B, F, C], and how many frames of each recording are audio, int64 [B].
    """

    logits: Tensor
    owner: Tensor
    share: Tensor
    masks: Mapping[str, Tensor]
    labels: Tensor | None = None
    frames: tuple[Tensor, Tensor] | None = None


Reader = Callable[["nn.Module", Batch], Reading]


def reader(task: Task, family: Family) -> Reader:
    """What reads the logits of a task's models. ``scored``, bool [B, T] in a batch, leaves units out."""
    return _READERS.get((task, family)) or _READERS[task, None]


def hard_losses(
    reading: Reading, batch: Batch, model: nn.Module, smoothing: float = 0.0, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of the data of each example, summed over its units, [B]; and whether the example has one, bool [B].

    Next tokens and tokens of the target by cross-entropy, labels by cross-entropy or, where there may be several, by
    their mean binary cross-entropy; CTC by the negative log-likelihood over the length of the transcript.

    Args:
        reading: of the student.
        batch: what it was given, with the labels.
        model: the student.
        smoothing: share of the target probability spread over all classes; CTC has none.
        weights: of several labels, what having each counts against not having it, [C].
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    if reading.frames is not None:
        return ctc_losses(*reading.frames, batch["labels"], model.config.pad_token_id)  # type: ignore
    logits, labels = reading.logits.float(), reading.labels
    assert labels is not None
    examples = len(next(iter(batch.values())))
    if labels.ndim == 2:
        wanted = labels.to(logits) * (1 - smoothing) + smoothing / 2
        losses = binary_cross_entropy_with_logits(logits, wanted, pos_weight=weights, reduction="none").mean(1)
    else:
        losses = cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    known = torch.ones(examples, dtype=torch.bool, device=logits.device)
    return added(losses, reading.owner, examples), known


def added(values: Tensor, owner: Tensor, examples: int) -> Tensor:
    """The sum of the units' values [U] for each example, [B]."""
    return values.new_zeros(examples).index_add(0, owner, values)


def _reading(logits: Tensor, labels: Tensor, scored: Tensor, masks: Mapping[str, Tensor]) -> Reading:
    import torch

    owner = scored.nonzero()[:, 0]
    return Reading(logits[scored], owner, torch.ones(len(owner), device=owner.device), masks, labels[scored])


def _next_token(model: nn.Module, batch: Batch) -> Reading:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    scored = mask[:, 1:].bool()
    if "scored" in batch:
        scored = scored & batch["scored"]
    return _reading(logits[:, :-1], ids[:, 1:], scored, {"decoder": mask.bool()})


def _label(model: nn.Module, batch: Batch) -> Reading:
    import torch

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    every, real = torch.arange(len(logits), device=logits.device), batch["attention_mask"].bool()
    masks = {"encoder": real, "decoder": real}  # a classifier is the one or the other
    return Reading(logits, every, torch.ones_like(every, dtype=torch.float32), masks, batch["labels"])


def _target_token(model: nn.Module, batch: Batch) -> Reading:
    labels = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "scored")}
    logits = model(**inputs, decoder_input_ids=decoder_start(labels, model.config), use_cache=False).logits
    real = labels != IGNORED
    masks = {"decoder": real}
    if "attention_mask" in batch:
        masks["encoder"] = batch["attention_mask"].bool()
    return _reading(logits, labels, real & batch["scored"] if "scored" in batch else real, masks)


def _frames(model: nn.Module, batch: Batch) -> Reading:
    import torch

    logits, frames = ctc_logits(model, batch)
    real = torch.arange(logits.shape[1], device=logits.device) < frames[:, None]
    owner = real.nonzero()[:, 0]
    share = 1.0 / frames.float()[owner]
    return Reading(logits[real], owner, share, {"encoder": real}, frames=(logits, frames))


_READERS: dict[tuple[Task, Family | None], Reader] = {
    ("text-generation", None): _next_token,
    ("text-classification", None): _label,
    ("translation", None): _target_token,
    ("speech-recognition", None): _target_token,
    ("speech-recognition", "ctc"): _frames,
}
"""By task and family; None is every other family."""
