"""Quantization: fewer bits for the weights of a torch model."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from specs.schema.base import RUNTIME_BYTES, FieldError, Kind, SpecModel, StepSpec
from specs.schema.steps.finetune import TrainingSpec
from specs.schema.units import Bytes, Share

Precision = Literal["int8-dynamic", "int8-static", "int8", "int4", "fp16", "bf16"]
Algorithm = Literal["rtn", "gptq", "awq", "smoothquant"]

SAMPLES = 128
GROUPS: dict[str, int | None] = {"int4": 32, "int8": None}
"""Inputs that share a scale where a spec does not say, by precision; None is a whole row."""


class MixedSpec(SpecModel):
    """Bits layer by layer."""

    budget: Bytes = Field(
        gt=0, examples=["8 MiB"], description="size that the file of the weights must not exceed, for example 8 MiB"
    )


class ErrorSpec(SpecModel):
    """How far the outputs may be from the float model's."""

    at_most: Share = Field(
        gt=0,
        examples=["2%"],
        description="share: the norm of the difference of the outputs over the norm of the float model's, for example "
        "2%",
    )


class QuantizeSpec(StepSpec):
    """Store the weights in fewer bits. ``int8-dynamic`` packs linear layers (GPT-2's Conv1D too) as int8 with one scale
    a row and quantizes activations as they come, ``int8-static`` by ranges from calibration. ``int8`` and ``int4``
    store the weights alone in groups, and ``mixed`` chooses 4, 8 or 16 bits layer by layer for a budget; they compute
    in float32 on a CPU, as ``fp16`` and ``bf16`` do. Tied embeddings stay tied. With ``train`` the model learns to live
    with the rounding first."""

    takes: ClassVar[tuple[Kind, ...]] = ("model", "swapped")
    makes: ClassVar[tuple[Kind, ...]] = ("packed", "model", "swapped")

    uses: Literal["quantize"]
    precision: Precision | None = Field(
        default=None,
        examples=["int4"],
        description="how the weights are stored; default: int8-dynamic, or layer by layer with mixed",
    )
    algorithm: Algorithm = Field(
        default="rtn",
        description="rtn rounds to the nearest; gptq and awq round weight-only int8, int4 and mixed by calibration; "
        "smoothquant moves outliers from activations to weights (int8-dynamic, int8-static)",
    )
    group_size: Literal[32, 64, 128, "per-row"] | None = Field(
        default=None,
        examples=["128"],
        description="inputs of a row that share a scale (int8, int4, mixed); default: 32 for int4, per-row for int8",
    )
    samples: int | None = Field(
        default=None,
        gt=0,
        examples=["128"],
        description="training examples to calibrate with (int8-static, gptq, awq, smoothquant, mixed, sensitivity); "
        "default: 128",
    )
    damping: Share | None = Field(
        default=None,
        gt=0,
        examples=["1%"],
        description="gptq: share of the mean curvature that is added to every input's, for stability; default: 1%",
    )
    act_order: bool | None = Field(
        default=None,
        examples=["true"],
        description="gptq: whether the inputs of the largest activations are rounded first; default: false",
    )
    alpha: Share | None = Field(
        default=None,
        examples=["0.5"],
        description="smoothquant: share of the outliers that moves into the weights; default: 0.5",
    )
    mixed: MixedSpec | None = Field(
        default=None,
        examples=["{budget: 8 MiB}"],
        description="bits of every layer and table from 4, 8 and 16, those that disturb the outputs least within the "
        "budget; default: the same everywhere",
    )
    sensitivity: bool | None = Field(
        default=None,
        examples=["true"],
        description="whether to measure and plot what each layer alone in 4, 8 and 16 bits does to the outputs; "
        "default: with mixed only",
    )
    train: TrainingSpec | None = Field(
        default=None,
        examples=["{epochs: 1, learning_rate: 1e-4}"],
        description="quantization-aware training before the weights are stored, with mixed in the bits that it chose; "
        "default: none",
    )
    error: ErrorSpec | None = Field(
        default=None,
        examples=["{at_most: 2%}"],
        description="the step fails where the outputs are further from the float model's; default: a warning from 10% "
        "on",
    )
    embeddings: bool | None = Field(
        default=None,
        examples=["false"],
        description="whether embedding tables are stored in few bits too; default: true (fp16 and bf16 convert all)",
    )
    skip: tuple[str, ...] = Field(
        default=(),
        examples=['["*.lm_head"]'],
        description="layers left alone: shell-style patterns of module names, for example `*.lm_head`",
    )

    @property
    def stored(self) -> str:
        """The precision, or ``mixed``."""
        return "mixed" if self.mixed is not None else self.precision or "int8-dynamic"

    @property
    def halves(self) -> bool:
        """Whether the whole file becomes fp16 or bf16, an ordinary model."""
        return self.stored in ("fp16", "bf16")

    @property
    def weight_only(self) -> bool:
        """Whether weights are stored as integers and activations stay float."""
        return self.stored in ("int8", "int4", "mixed")

    @property
    def measures(self) -> bool:
        """Whether the sensitivity of each layer is measured."""
        return self.mixed is not None if self.sensitivity is None else self.sensitivity

    @property
    def calibrates(self) -> bool:
        """Whether training examples decide something."""
        return self.algorithm != "rtn" or self.stored == "int8-static" or self.measures

    def group(self, bits: int) -> int | None:
        """Inputs that share a scale; None for a whole row."""
        if self.group_size is None:
            return GROUPS[f"int{bits}"]
        return None if self.group_size == "per-row" else self.group_size

    def gives(self, taken: tuple[Kind, ...]) -> Kind:
        return taken[0] if self.halves else "packed"

    def estimate(self, model: int) -> tuple[int, int]:
        share = {"fp16": 2, "bf16": 2, "int4": 7, "mixed": 4}.get(self.stored, 4)
        size = self.mixed.budget if self.mixed is not None else model // share
        memory = (5 if self.train is not None else 3) * model
        return size + (4 * model if self.train is not None else 0), memory + RUNTIME_BYTES

    @model_validator(mode="after")
    def _goes_together(self) -> QuantizeSpec:
        stored = self.stored
        if self.mixed is not None and self.precision is not None:
            raise FieldError("precision", "mixed chooses the bits layer by layer; leave precision out")
        if self.mixed is not None and self.sensitivity is False:
            raise FieldError("sensitivity", "mixed decides by the sensitivity; leave sensitivity out")
        if self.halves:
            for name in ("skip", "embeddings", "sensitivity", "train"):
                if getattr(self, name):
                    raise FieldError(
                        name,
                        f"{name} does not go with precision: {stored}, which converts the whole file; leave it out",
                    )
        fits = {"gptq": self.weight_only, "awq": self.weight_only, "smoothquant": stored.startswith("int8-")}
        if not fits.get(self.algorithm, True):
            able = "int8-dynamic or int8-static" if self.algorithm == "smoothquant" else "int4 or int8, or mixed"
            raise FieldError(
                "algorithm", f"{self.algorithm} does not go with {stored}; write precision: {able}, or algorithm: rtn"
            )
        if self.train is not None and self.algorithm != "rtn":
            raise FieldError(
                "algorithm", "with train the weights learn to be rounded to the nearest; leave algorithm out, or train"
            )
        self._means_something("group_size", self.weight_only, f"{stored} has one scale a row")
        self._means_something("samples", self.calibrates, "nothing here is calibrated")
        for name, algorithm in (("damping", "gptq"), ("act_order", "gptq"), ("alpha", "smoothquant")):
            self._means_something(name, self.algorithm == algorithm, f"it belongs to algorithm: {algorithm}")
        return self

    def _means_something(self, name: str, used: bool, why: str) -> None:
        if getattr(self, name) is not None and not used:
            raise FieldError(name, f"{name} does nothing here: {why}; leave it out")
