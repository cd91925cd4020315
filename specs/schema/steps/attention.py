"""Attention that costs less than the square of the length, in place of a trained model's own."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from specs.schema.base import RUNTIME_BYTES, FieldError, Kind, StepSpec
from specs.schema.steps.finetune import TrainingSpec
from specs.schema.steps.quantize import ErrorSpec

AttentionMethod = Literal["lsh", "reformer", "sliding_window", "flex", "sdpa"]

SAMPLES = 8
ROUNDS = 4
CHUNK = 64
"""Calibration examples, rounds of hashing and queries of a chunk where a spec does not say."""

FIELDS: dict[AttentionMethod, tuple[str, ...]] = {
    "lsh": ("layers", "probes", "buckets", "local_window", "hash", "residual", "min_length", "error", "samples"),
    "reformer": ("layers", "buckets", "rounds", "chunk", "min_length", "error", "samples"),
    "sliding_window": ("layers", "local_window", "min_length", "error", "samples"),
    "flex": (),
    "sdpa": (),
}
"""The fields of each method; the others are a mistake there."""


class AttentionSpec(StepSpec):
    """Replace the attention of a trained model where that is close enough and fast enough. ``lsh`` hashes keys into
    buckets: a query meets the keys of few buckets and those near it exactly, all others by their means; a causal model
    stays causal. ``reformer`` sorts and cuts into chunks, as the article does, for models that are not causal;
    ``sliding_window`` lets a query meet only the tokens near it; ``flex`` is torch's FlexAttention, and ``sdpa`` takes
    exact attention back. Which layers, and with how many buckets and probes, is decided on training examples under the
    bound on the error; below the length from which it is faster on this machine the module computes exactly."""

    takes: ClassVar[tuple[Kind, ...]] = ("model", "swapped")
    makes: ClassVar[tuple[Kind, ...]] = ("swapped", "model")

    uses: Literal["attention"]
    method: AttentionMethod = Field(default="lsh", description="which attention takes the place of the exact one")
    layers: Literal["auto"] | tuple[int, ...] | None = Field(
        default=None,
        examples=["[0, 2]"],
        description="numbers of the attentions to replace, counted from 0 in the order of the model, each of which "
        "must keep the bound on the error; default: auto, those that do and get faster",
    )
    probes: int | None = Field(
        default=None,
        gt=0,
        examples=["2"],
        description="lsh: buckets that each query looks into; default: as few as the bound on the error allows",
    )
    buckets: int | None = Field(
        default=None,
        gt=0,
        le=4096,
        examples=["64"],
        description="lsh, reformer: buckets of each head's keys; default: chosen on the training examples",
    )
    local_window: int | None = Field(
        default=None,
        gt=0,
        examples=["128"],
        description="tokens near it that a query always meets; for lsh in blocks of this length; default: 64 for a "
        "causal model, none for another",
    )
    hash: Literal["angular", "e2lsh", "centroid"] | None = Field(
        default=None,
        examples=["centroid"],
        description="lsh: centroid takes the nearest of the centres found in calibration, angular the nearest of "
        "random directions, e2lsh a cell of a random grid; default: centroid",
    )
    residual: bool | None = Field(
        default=None,
        examples=["true"],
        description="lsh: whether buckets that a query does not look into count by the means of their keys and values; "
        "default: true",
    )
    rounds: int | None = Field(
        default=None, gt=0, le=32, examples=["4"], description="reformer: rounds of hashing; default: 4"
    )
    chunk: int | None = Field(
        default=None, gt=1, examples=["64"], description="reformer: queries that are computed together; default: 64"
    )
    min_length: int | None = Field(
        default=None,
        gt=0,
        examples=["2048"],
        description="keys below which attention is exact; default: the length from which the replacement was measured "
        "to be faster on this machine",
    )
    error: ErrorSpec | None = Field(
        default=None,
        examples=["{at_most: 2%}"],
        description="bound on the relative error of a replaced attention's output on training examples; default: 2%",
    )
    samples: int | None = Field(
        default=None,
        gt=1,
        examples=["8"],
        description="training examples to decide by, half of them to fit the hash and half to judge; default: 8",
    )
    recover: TrainingSpec | None = Field(
        default=None,
        examples=["{max_steps: 100, learning_rate: 1e-4}"],
        description="training with the replaced attention, at every length; default: none",
    )

    def gives(self, taken: tuple[Kind, ...]) -> Kind:
        return "model" if self.method == "sdpa" else "swapped"

    def estimate(self, model: int) -> tuple[int, int]:
        trained = self.recover is not None
        return model * (5 if trained else 1), model * (5 if trained else 2) + 2 * RUNTIME_BYTES

    @model_validator(mode="after")
    def _goes_together(self) -> AttentionSpec:
        fields = FIELDS[self.method]
        for name in sorted({name for names in FIELDS.values() for name in names} - set(fields)):
            if getattr(self, name) is not None:
                able = ", ".join(method for method, names in FIELDS.items() if name in names)
                raise FieldError(
                    name, f"{name} does nothing for method: {self.method}; it belongs to {able}: leave it out"
                )
        if self.recover is not None and not fields:
            raise FieldError(
                "recover", f"method: {self.method} is exact, there is nothing to recover; leave recover out"
            )
        if self.method == "sliding_window" and self.local_window is None:
            raise FieldError("local_window", "sliding_window needs its length; write for example local_window: 256")
        if self.probes is not None and self.buckets is not None and self.probes > self.buckets:
            raise FieldError(
                "probes",
                f"there are {self.buckets} buckets to look into, and not {self.probes}; write a smaller number",
            )
        if isinstance(self.layers, tuple) and min(self.layers, default=0) < 0:
            raise FieldError("layers", "attentions are counted from 0; write for example [0, 2]")
        if self.layers == ():
            raise FieldError("layers", "names no attention; write layers: auto, or for example [0, 2]")
        return self
