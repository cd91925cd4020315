"""Pruning: weights that become zero."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from specs.schema.base import RUNTIME_BYTES, StepSpec
from specs.schema.steps.finetune import TrainingSpec
from specs.schema.units import Share


class PruneSpec(StepSpec):
    """Set weights to zero: those below a threshold, or the smallest until the sparsity is reached. With ``recover`` the
    model is trained afterwards and the zeros stay zero. Zeros alone make neither the file smaller nor the model
    faster on ordinary hardware; the report says so."""

    uses: Literal["prune"]
    method: Literal["threshold", "magnitude"] = Field(
        default="magnitude", description="threshold: |w| < threshold; magnitude: the smallest weights"
    )
    threshold: float | None = Field(
        default=None,
        gt=0,
        examples=["0.02"],
        description="weights of smaller magnitude become 0 (method threshold)",
    )
    sparsity: Share | None = Field(
        default=None,
        gt=0,
        lt=1,
        examples=["50%"],
        description="share of the weights that become 0 (method magnitude)",
    )
    scope: Literal["layer", "global"] = Field(
        default="layer", description="whether the sparsity holds in every layer or over all of them"
    )
    recover: TrainingSpec | None = Field(
        default=None,
        examples=["{epochs: 1}"],
        description="training after pruning, with the zeros kept; default: none",
    )

    def estimate(self, model: int) -> tuple[int, int]:
        trains = self.recover is not None
        return (5 if trains else 1) * model, (5 if trains else 2) * model + RUNTIME_BYTES

    @model_validator(mode="after")
    def _method_has_its_number(self) -> PruneSpec:
        if self.method == "threshold" and (self.threshold is None or self.sparsity is not None):
            raise ValueError("method threshold takes `threshold` and no `sparsity`; write for example threshold: 0.02")
        if self.method == "magnitude" and (self.sparsity is None or self.threshold is not None):
            raise ValueError("method magnitude takes `sparsity` and no `threshold`; write for example sparsity: 50%")
        return self
