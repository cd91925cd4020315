"""Quantization: fewer bits for the weights of a torch model."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from specs.schema.base import RUNTIME_BYTES, Kind, StepSpec


class QuantizeSpec(StepSpec):
    """Store the weights in fewer bits. ``int8-dynamic`` packs linear layers (GPT-2's Conv1D too) as int8 with one scale
    a row and quantizes activations as they come; ``fp16`` and ``bf16`` halve the file and compute in float32 on a CPU.
    Tied embeddings stay tied."""

    makes: ClassVar[tuple[Kind, ...]] = ("packed", "model")

    uses: Literal["quantize"]
    precision: Literal["int8-dynamic", "fp16", "bf16"] = Field(
        default="int8-dynamic", description="how the weights are stored"
    )
    embeddings: bool = Field(
        default=True, description="whether int8-dynamic also stores embedding tables as int8, one scale a row"
    )
    skip: tuple[str, ...] = Field(
        default=(),
        examples=['["*.lm_head"]'],
        description="layers left alone: shell-style patterns of module names, for example `*.lm_head`",
    )

    def gives(self, taken: tuple[Kind, ...]) -> Kind:
        return "packed" if self.precision == "int8-dynamic" else "model"

    def estimate(self, model: int) -> tuple[int, int]:
        return model // (4 if self.precision == "int8-dynamic" else 2), 3 * model + RUNTIME_BYTES
