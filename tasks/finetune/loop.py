"""The training loop: readable, deterministic, and resumable at any moment with the same result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from specs.schema.steps.finetune import TrainingSpec
from tasks.context import StepContext, StepError
from tasks.data.encoded import Encoded
from tasks.finetune import checkpoints
from tasks.finetune.batches import Batches, Roles
from tasks.finetune.masks import Fixed, Kept, Masks, zero, zero_gradients, zeros_of
from tasks.finetune.numerics import autocast, own_random_state, precision_of
from tasks.finetune.objective import Loss, check, task_loss, weights_of_classes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Beside = Callable[[np.ndarray], "dict[str, Tensor]"]
"""From the numbers of the examples of a batch to tensors by name, on the device of the training."""

CURVE_POINTS = 1000
"""Points of a training curve; longer trainings are thinned to about so many."""


@dataclass
class Progress:
    """What a training knows besides tensors; all of it fits into JSON and goes into every checkpoint.

    Args:
        step: optimiser steps done.
        total: optimiser steps planned.
        steps_per_epoch: optimiser steps that see every training example once.
        first_loss: validation loss before the first step; None without validation.
        best_loss: the lowest validation loss; None without validation.
        best_step: the optimiser step after which it was measured; the last step without validation.
        stale: validations since then.
        scaler: the state of the fp16 gradient scaler.
    """

    total: int
    steps_per_epoch: int
    step: int = 0
    first_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)

    @property
    def epochs(self) -> float:
        """Passes over the training data so far."""
        return self.step / self.steps_per_epoch


@dataclass(frozen=True)
class Trained:
    """What ``train`` did: the final ``Progress``, trained parameters, the masks that held at the end, and what the user
    should know."""

    progress: Progress
    parameters: int
    precision: str
    kept: Kept = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def train(
    model: nn.Module,
    data: Encoded,
    spec: TrainingSpec,
    ctx: StepContext,
    *,
    loss: Loss | None = None,
    masks: Masks | None = None,
    roles: Roles | None = None,
    beside: Beside | None = None,
) -> Trained:
    """Train ``model`` in place and leave the weights of the lowest validation loss in it, in float32 and eval mode.

    AdamW (Loshchilov & Hutter, 1711.05101) without decay for biases, norms and other vectors. The batches and the
    dropout of an optimiser step follow from the seed and the number of the step alone, so a checkpoint needs no random
    state: a training killed at any moment continues from its last checkpoint in ``ctx.checkpoints`` and, on a CPU, ends
    with the same bits.

    Args:
        model: any model whose forward takes ``input_ids`` and ``attention_mask`` and gives ``logits``.
        data: the encoded training split; the validation examples are held out from it.
        spec: how to train.
        ctx: device, seed, checkpoints, metrics and progress.
        loss: what is minimised; default: the loss of ``ctx.task``. Validation always uses the latter, unsmoothed.
            The metric ``tokens_per_second`` counts what is written where the task writes, else what is read.
        masks: which weights are kept, the others are 0; default: with ``keep_zeros`` what is 0 in ``model`` stays 0.
            Validations count from where the masks are the last ones, so that the best weights have the final zeros.
        roles: which examples train and which may measure; default: all do both.
        beside: what ``loss`` is given for examples beside what the data has of them.

    Raises:
        StepError: the data is empty, the precision is not to be had on the device, or the loss is not finite.
    """
    if len(data) == 0:
        raise StepError("data.train has no examples; check its path, its fields and train_limit")
    if masks is None:
        masks = Fixed(zeros_of(model) if spec.keep_zeros else {})
    training = _prepare(model, data, spec, ctx, loss, masks, roles, beside)
    batches = training.batches
    total = spec.max_steps or max(1, math.ceil((spec.epochs or 1) * batches.steps_per_epoch))
    progress = Progress(total=total, steps_per_epoch=batches.steps_per_epoch)
    training.kept.update(masks.start(training.weights, total, int(spec.warmup * total)))
    best: dict[str, Tensor] = {}
    warnings = [*training.warnings, *_resume(training, progress, best, ctx)]
    every = min(spec.eval_steps or max(1, batches.steps_per_epoch // 4), progress.total)
    validating = len(batches.validation) > 0
    curve = max(1, progress.total // CURVE_POINTS)
    ctx.progress(progress.step, progress.total)
    with own_random_state(ctx.device):
        if validating and progress.first_loss is None:
            _validate(training, progress, best, ctx)
        saved, tokens, spent = time.monotonic(), 0, 0.0
        while progress.step < progress.total and not _stopped(progress, spec):
            started = time.monotonic()
            update = _update(training, progress, ctx.seed)
            progress.step += 1
            tokens += update.tokens
            spent += time.monotonic() - started
            if progress.step % curve == 0 or progress.step == progress.total:
                ctx.metric("train_loss", update.loss, progress.step)
                ctx.metric("learning_rate", update.rate, progress.step)
                ctx.metric("tokens_per_second", tokens / max(spent, 1e-9), progress.step)
                if math.isfinite(update.norm):  # fp16 skips the update of an overflow
                    ctx.metric("grad_norm", update.norm, progress.step)
                tokens, spent = 0, 0.0
            ctx.progress(progress.step, progress.total)
            due = validating and (progress.step % every == 0 or progress.step == progress.total)
            if due:
                _validate(training, progress, best, ctx)
            if due or time.monotonic() - saved >= spec.save_every:
                _save(training, progress, best, ctx)
                saved = time.monotonic()
    if best:
        _load_state(model, best)
    else:
        progress.best_step = progress.step
    model.eval()
    parameters = sum(parameter.numel() for parameter in training.weights.values())
    return Trained(progress, parameters, training.precision, training.kept, tuple(warnings))


def schedule(step: int, total: int, warmup: float, kind: str) -> float:
    """The learning rate of optimiser step ``step`` (from 0) as a share of its peak: it rises evenly over the share
    ``warmup`` of the ``total`` steps, reaches the peak, and then falls towards 0 without reaching it."""
    rising = int(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(1, total - rising)
    if kind == "linear":
        return 1 - done
    if kind == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1.0


@dataclass(frozen=True)
class _Training:
    """What stays the same throughout one training, but for what ``kept`` holds: the masks of the last optimiser step.
    ``weights`` are the trained parameters, ``tokens`` those of each example."""

    model: nn.Module
    weights: Mapping[str, nn.Parameter]
    masks: Masks
    kept: dict[str, Tensor]
    batches: Batches
    spec: TrainingSpec
    objective: Loss
    measure: Loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: str
    tokens: np.ndarray
    warnings: tuple[str, ...]
    beside: Beside | None


@dataclass(frozen=True)
class _Update:
    """One optimiser step: mean loss, gradient norm before clipping, learning rate, tokens seen."""

    loss: float
    norm: float
    rate: float
    tokens: int


def _prepare(
    model: nn.Module,
    data: Encoded,
    spec: TrainingSpec,
    ctx: StepContext,
    loss: Loss | None,
    masks: Masks,
    roles: Roles | None,
    beside: Beside | None,
) -> _Training:
    import torch

    from tasks.attention import swap
    from tasks.models import family_of

    config: Any = model.config
    family = family_of(config)
    dropout = swap.without_dropout(config.to_dict()) if swap.swapped(model) else None
    warnings = (*data.warnings, *check(model, data, ctx.task, family), *([] if dropout is None else [dropout]))
    precision = precision_of(spec.precision, ctx.device)
    model.float().to(ctx.device)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    examples = spec.batch_size * spec.gradient_accumulation_steps
    counts = weights_of_classes(data, spec)
    written = data.target_mask
    return _Training(
        model=model,
        weights=weights,
        masks=masks,
        kept={},
        batches=Batches(data, spec.validation, examples, ctx.seed, ctx.device, spec.sampling, roles),
        spec=spec,
        objective=loss or task_loss(ctx.task, family, label_smoothing=spec.label_smoothing, class_weights=counts),
        measure=task_loss(ctx.task, family, class_weights=counts),
        optimizer=torch.optim.AdamW(_groups(weights, spec.weight_decay), lr=spec.learning_rate),
        scaler=torch.amp.GradScaler(ctx.device, enabled=precision == "fp16"),
        precision=precision,
        tokens=data.lengths() if written is None else np.asarray(written).sum(axis=1, dtype=np.int64),
        warnings=warnings,
        beside=beside,
    )


def _update(training: _Training, progress: Progress, seed: int) -> _Update:
    """Carry out optimiser step ``progress.step``."""
    import torch

    spec, batches, scaler, step = training.spec, training.batches, training.scaler, progress.step
    rate = spec.learning_rate * schedule(step, progress.total, spec.warmup, spec.lr_scheduler)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    torch.manual_seed((seed * 1_000_003 + step) % 2**63)
    np.random.seed((seed * 1_000_003 + step) % 2**32)  # SpecAugment draws from numpy's global generator
    training.model.train()
    training.optimizer.zero_grad(set_to_none=True)
    rows = batches.of_step(step)
    tokens = max(1, int(training.tokens[rows].sum()))
    total = weight = 0.0
    for at in range(0, len(rows), spec.batch_size):
        part_rows = rows[at : at + spec.batch_size]
        batch = batches.tensors(part_rows)
        if training.beside is not None:
            batch |= training.beside(part_rows)
        with autocast(training.precision, batches.device):
            part, part_weight = training.objective(training.model, batch)
        # The weight of all parts is known only after the last; dividing by a guess keeps fp16 gradients in range.
        scaler.scale(part / tokens).backward()
        total += float(part.detach())
        weight += float(part_weight)
    mean = total / (weight or 1.0)
    if not math.isfinite(mean):
        raise _diverged(f"the training loss is {mean}", step, spec, training.precision)
    scaler.unscale_(training.optimizer)
    for parameter in training.weights.values():
        if parameter.grad is not None:
            parameter.grad.mul_(tokens / (weight or 1.0))
    training.kept.update(training.masks.at(step, training.weights))
    zero_gradients(training.weights, training.kept)
    norm = float(torch.nn.utils.clip_grad_norm_(training.weights.values(), spec.max_grad_norm))
    if not math.isfinite(norm) and not scaler.is_enabled():
        raise _diverged(f"the norm of the gradient is {norm}", step, spec, training.precision)
    scaler.step(training.optimizer)
    scaler.update()
    zero(training.weights, training.kept)
    return _Update(mean, norm, rate, tokens)


def _validate(training: _Training, progress: Progress, best: dict[str, Tensor], ctx: StepContext) -> None:
    """Measure the held-out loss, and keep the weights in ``best`` where it is the lowest so far."""
    import torch

    training.model.eval()
    total = weight = 0.0
    with torch.no_grad(), autocast(training.precision, ctx.device):
        for rows in training.batches.validation_batches(training.spec.batch_size):
            part, part_weight = training.measure(training.model, training.batches.tensors(rows))
            total += float(part)
            weight += float(part_weight)
    value = total / (weight or 1.0)
    if not math.isfinite(value):
        raise _diverged(f"the validation loss is {value}", progress.step, training.spec, training.precision)
    ctx.metric("validation_loss", value, progress.step)
    if progress.first_loss is None:
        progress.first_loss = value
    if not training.masks.settled(progress.step):
        return
    if progress.best_loss is None or value < progress.best_loss:
        progress.best_loss, progress.best_step, progress.stale = value, progress.step, 0
        best.update({name: tensor.detach().cpu().clone() for name, tensor in _state(training.model).items()})
    else:
        progress.stale += 1


def _save(training: _Training, progress: Progress, best: Mapping[str, Tensor], ctx: StepContext) -> None:
    progress.scaler = dict(training.scaler.state_dict())
    tensors = {f"model.{name}": tensor for name, tensor in _state(training.model).items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for name, parameter in training.weights.items():
        slots = training.optimizer.state.get(parameter, {})
        tensors |= {f"optimizer.{name}.{slot}": value for slot, value in slots.items()}
    tensors |= {f"masks.{name}": tensor for name, tensor in training.masks.tensors().items()}
    checkpoints.save(ctx.checkpoints, progress.step, tensors, vars(progress))


def _resume(training: _Training, progress: Progress, best: dict[str, Tensor], ctx: StepContext) -> list[str]:
    """Continue from the newest whole checkpoint; what was wrong with newer ones."""
    found, damaged = checkpoints.load_latest(ctx.checkpoints)
    if found is not None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}, "masks": {}}
        for name, tensor in found.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        _load_state(training.model, parts["model"])
        best.update(parts["best"])
        for name, tensor in parts["optimizer"].items():
            owner, _, slot = name.rpartition(".")
            parameter = training.weights[owner]
            training.optimizer.state[parameter][slot] = tensor if slot == "step" else tensor.to(parameter.device)
        training.kept.update(training.masks.restore(parts["masks"]))
        for name, value in found.state.items():
            setattr(progress, name, value)
        if progress.scaler:
            training.scaler.load_state_dict(progress.scaler)
        ctx.note(f"continued from step {progress.step} of {progress.total}")
    checkpoints.discard_after(ctx.checkpoints, progress.step)
    zero(training.weights, training.kept)
    return damaged


def _groups(weights: Mapping[str, nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Matrices with decay; biases, norms and other vectors without."""
    matrices = [parameter for parameter in weights.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in weights.values() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def _stopped(progress: Progress, spec: TrainingSpec) -> bool:
    return spec.early_stopping_patience is not None and progress.stale >= spec.early_stopping_patience


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers, each tensor once however many names it has."""
    named = dict(model.named_parameters())
    stored = model.state_dict().keys()
    return named | {name: buffer for name, buffer in model.named_buffers() if name in stored}


def _load_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, tensor in _state(model).items():
            tensor.copy_(tensors[name])


def _diverged(measured: str, step: int, spec: TrainingSpec, precision: str) -> StepError:
    remedy = f"lower learning_rate (now {spec.learning_rate:g}), for example to {spec.learning_rate / 10:g}"
    if precision == "fp16":
        remedy += ", or write precision: bf16 or fp32"
    return StepError(f"the training diverged: {measured} at optimiser step {step}; {remedy}, or raise warmup")
