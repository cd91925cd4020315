"""Training of a model on the spec's data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from specs.schema.base import RUNTIME_BYTES, Kind, SpecModel, StepSpec, Task
from specs.schema.units import Duration, Share


class TrainingSpec(SpecModel):
    """How a model is trained: the fields of ``finetune``, and of ``recover`` in other steps."""

    only: ClassVar[Mapping[str, tuple[Task, ...]]] = {
        "class_weights": ("text-classification",),
        "sampling": ("text-classification",),
    }

    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        examples=["3"],
        description="passes over the training data; default 1 unless max_steps is given",
    )
    max_steps: int | None = Field(
        default=None, gt=0, examples=["1000"], description="optimiser steps; takes precedence over epochs"
    )
    batch_size: int = Field(default=32, gt=0, description="examples in one forward pass")
    gradient_accumulation_steps: int = Field(default=1, gt=0, description="forward passes per optimiser step")
    learning_rate: float = Field(default=5e-5, gt=0, lt=10, description="the peak learning rate of AdamW")
    weight_decay: float = Field(
        default=0.01, ge=0, lt=1, description="AdamW's weight decay; biases and norms are exempt"
    )
    warmup: Share = Field(default=0.1, description="share of the steps in which the learning rate rises from 0")
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how the learning rate falls after the warm-up"
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to this norm")
    label_smoothing: Share = Field(
        default=0.0, lt=1, description="share of the target probability spread over all classes"
    )
    class_weights: Literal["none", "balanced"] = Field(
        default="none", description="text-classification: balanced weighs each class by one over its frequency"
    )
    sampling: Literal["natural", "balanced"] = Field(
        default="natural", description="text-classification: balanced draws every class equally often"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="the type of the forward pass; auto is bf16 or fp16 where the GPU has it, else fp32"
    )
    validation: Share = Field(
        default=0.05,
        lt=1,
        description="share of the training data held out to pick the best checkpoint (never the evaluation split)",
    )
    eval_steps: int | None = Field(
        default=None,
        gt=0,
        examples=["100"],
        description="optimiser steps between validations; default: four times an epoch",
    )
    early_stopping_patience: int | None = Field(
        default=None,
        gt=0,
        examples=["3"],
        description="stop after so many validations without improvement; default: never",
    )
    keep_zeros: bool = Field(
        default=True,
        description="whether what is 0 in the weight matrices that come in, as `prune` leaves them, stays 0",
    )
    save_every: Duration = Field(
        default=30.0, description="time between checkpoints from which a killed run continues, for example 30 s"
    )


class FinetuneSpec(StepSpec, TrainingSpec):
    """Train the model on the training data: AdamW with warm-up, clipping and accumulation, mixed precision where the
    device has it, validation on held-out training data, early stopping, and the best checkpoint kept. A killed run
    continues from its last checkpoint and ends with the same weights."""

    takes: ClassVar[tuple[Kind, ...]] = ("model", "swapped")
    makes: ClassVar[tuple[Kind, ...]] = ("model", "swapped")

    uses: Literal["finetune"]

    def gives(self, taken: tuple[Kind, ...]) -> Kind:
        return taken[0]

    def estimate(self, model: int) -> tuple[int, int]:
        # Beside the artifact a checkpoint with AdamW's two moments; in memory weights, gradients and moments.
        return 5 * model, 5 * model + 2 * RUNTIME_BYTES
